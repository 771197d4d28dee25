"""The numbers of a training run as it goes: metrics.jsonl, TensorBoard, images/s; they have to be finite."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fastvae.config import TrainConfig
from fastvae.distributed import Ranks
from fastvae.errors import FastvaeError
from fastvae.evaluate import Evaluation
from fastvae.run import Run
from fastvae.step import TrainingStep

__all__ = ["Log"]


class Log:
    """Rows of metrics.jsonl, and the clock behind their images/s: evaluation and saving do not count.

    Every rank makes the rows, so that all see a loss that is not finite; rank 0 writes them.
    """

    def __init__(self, run: Run, config: TrainConfig, start: int, ranks: Ranks) -> None:
        self.run, self.config, self.ranks = run, config, ranks
        self.start, self.began = start, time.perf_counter()
        self.logged, self.logged_at = start, self.began
        self.writer = _tensorboard(run.path) if config.tensorboard and ranks.is_main else None

    @contextlib.contextmanager
    def pause(self) -> Iterator[None]:
        paused = time.perf_counter()
        yield
        self.began += time.perf_counter() - paused
        self.logged_at += time.perf_counter() - paused

    def images_per_s(self, done: int) -> float:
        """Since the start of this process."""
        return (done - self.start) * self.config.batch_size / (time.perf_counter() - self.began)

    def train(self, step: TrainingStep, done: int, epoch: float) -> dict[str, float]:
        """The mean of the steps since the last row: the one place where the host waits for the device."""
        count = (done - 1) % self.config.log_every + 1
        loss, nll, kl = step.metrics[:count].double().mean(0).tolist()
        if not math.isfinite(loss + nll + kl):
            raise FastvaeError(
                f"the loss is {loss} at step {done}: try a lower --lr or --clip-grad-norm (last save: {self.run.last})"
            )
        now = time.perf_counter()
        images_per_s = (done - self.logged) * self.config.batch_size / (now - self.logged_at)
        self.logged_at, self.logged = now, done
        row = {"negative_elbo": nll + kl, "nll": nll, "kl": kl, "loss": loss}
        row |= {"lr": float(step.lr[done - 1]), "beta": float(step.beta[done - 1]), "images_per_s": images_per_s}
        return self._write("train", done, epoch, row)

    def test(self, evaluation: Evaluation, done: int, epoch: float) -> dict[str, float]:
        row = {"negative_elbo": evaluation.negative_elbo, "nll": evaluation.nll, "kl": evaluation.kl}
        return self._write("test", done, epoch, row | {"active_units": evaluation.active_units})

    def _write(self, split: str, done: int, epoch: float, row: dict[str, float]) -> dict[str, float]:
        if self.ranks.is_main:
            self.run.append_metrics({"step": done, "epoch": round(epoch, 6), "split": split, **row})
        if self.writer is not None:
            for name, value in row.items():
                self.writer.add_scalar(f"{split}/{name}", value, done)
        return row


def _tensorboard(path: Path) -> Any:
    from torch.utils.tensorboard import SummaryWriter

    return SummaryWriter(str(path))
