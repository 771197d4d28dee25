"""A run directory: what a training run leaves on the disk, and how it is read back.

train_config.json                 the resolved `TrainConfig`
metrics.jsonl                     a line per `log_every` steps (split train) and per evaluation (split test)
checkpoints/last.safetensors      everything needed to go on
checkpoints/best.safetensors      the same, at the lowest test negative ELBO so far
config.json, model.safetensors    the model, for `VAE.from_pretrained`
figures/*.png
job                               while it is not at its end: the `torchrun` job that trains it
owner                             likewise: a word that is new with every start
"""

from __future__ import annotations

import json
import secrets
from pathlib import Path
from typing import Any

from torch import Tensor

from fastvae.checkpoint import load_checkpoint, write_atomic
from fastvae.config import TrainConfig
from fastvae.errors import FastvaeError

__all__ = ["Run"]


class Run:
    """The files of one run directory."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config_file = path / "train_config.json"
        self.metrics_file = path / "metrics.jsonl"
        self.last = path / "checkpoints" / "last.safetensors"
        self.best = path / "checkpoints" / "best.safetensors"
        self.figures = path / "figures"
        self.job_file = path / "job"
        self.owner_file = path / "owner"
        self.owner = secrets.token_hex(8)

    @classmethod
    def create(cls, config: TrainConfig, job: str | None = None) -> Run:
        """A new directory: `config.out`, which must not hold anything yet, or the first free runs/DATA.

        Where the same `torchrun` job has begun a run with the same settings and not finished it: that run's.
        """
        if config.out is not None:
            path = config.out
            if cls(path)._is_of(job, config):
                return cls(path)
            if path.exists() and (not path.is_dir() or any(path.iterdir())):
                raise FastvaeError(f"{path} exists already: expected a new --out (to go on: fastvae resume {path})")
        else:
            name = Path(config.data).stem or "run"
            numbered = (Path("runs") / (name if i == 1 else f"{name}-{i}") for i in range(1, 1_000_000))
            path = next(p for p in numbered if not p.exists() or cls(p)._is_of(job, config))
            if path.exists():
                return cls(path)
        run = cls(path)
        try:
            for folder in (run.last.parent, run.figures):
                folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise FastvaeError(f"cannot create {path}: {error.strerror}") from error
        if job is not None:
            write_atomic(run.job_file, _job_text(job, config))
        run.write_config(config)
        return run

    def _is_of(self, job: str | None, config: TrainConfig) -> bool:
        return job is not None and self.job_file.is_file() and self.job_file.read_text() == _job_text(job, config)

    def claim(self) -> None:
        """From now on this process alone writes here: one that did before, cut off from the others perhaps, ends."""
        write_atomic(self.owner_file, self.owner)

    def check_owner(self) -> None:
        """Raises: FastvaeError if another process has claimed the run since."""
        if not self.owner_file.is_file() or self.owner_file.read_text() != self.owner:
            raise FastvaeError(f"another process has gone on with {self.path}: this one ends")

    def finish(self) -> None:
        """The same job may now begin another run."""
        for file in (self.job_file, self.owner_file):
            file.unlink(missing_ok=True)

    @classmethod
    def open(cls, path: Path) -> Run:
        """An existing one."""
        run = cls(path)
        if not run.config_file.is_file():
            raise FastvaeError(f"{path} is no run directory: expected {run.config_file.name} in it")
        return run

    def write_config(self, config: TrainConfig) -> None:
        write_atomic(self.config_file, config.to_json())

    def read_config(self) -> TrainConfig:
        try:
            fields = json.loads(self.config_file.read_text())
        except ValueError as error:
            raise FastvaeError(f"{self.config_file} is damaged: {error}") from error
        return TrainConfig.from_dict(fields)

    def append_metrics(self, row: dict[str, Any]) -> None:
        self.check_owner()
        with self.metrics_file.open("a") as file:
            file.write(json.dumps(row) + "\n")

    def read_metrics(self) -> list[dict[str, Any]]:
        """All whole lines: a process that was killed may have left half of the last one."""
        if not self.metrics_file.is_file():
            return []
        lines = self.metrics_file.read_text().split("\n")
        return [json.loads(line) for line in lines[:-1]]

    def rewind_metrics(self, step: int) -> None:
        """Drop what was logged after `step`: a resumed run logs it again."""
        rows = [row for row in self.read_metrics() if row["step"] <= step]
        write_atomic(self.metrics_file, "".join(json.dumps(row) + "\n" for row in rows))

    def newest_checkpoint(self) -> tuple[dict[str, Tensor], dict[str, Any], str | None]:
        """Tensors and metadata of the newest whole checkpoint, and a line about a damaged one that was skipped."""
        whole, skipped = [], None
        for path in self.checkpoints():
            try:
                whole.append(load_checkpoint(path))
            except FastvaeError as error:  # noqa: PERF203 (two files)
                skipped = f"skipped a checkpoint: {error}"
        if whole:
            return *max(whole, key=lambda loaded: int(loaded[0]["step"])), skipped
        if skipped:
            raise FastvaeError(f"no whole checkpoint in {self.last.parent}; {skipped}")
        raise FastvaeError(f"no checkpoint in {self.last.parent}: the run ended before its first one; start it again")

    def checkpoints(self) -> list[Path]:
        """The files that are there."""
        return [path for path in (self.last, self.best) if path.is_file()]


def _job_text(job: str, config: TrainConfig) -> str:
    return f"{job}\n{config.to_json()}"
