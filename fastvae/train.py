"""Training, in the order in which things happen."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import math
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastvae.capture import captured
from fastvae.checkpoint import save_checkpoint
from fastvae.config import TrainConfig
from fastvae.data import Dataset, load_dataset
from fastvae.errors import FastvaeError, Stopped
from fastvae.evaluate import Evaluation, advice, evaluate
from fastvae.initial import initialize
from fastvae.models import VAE
from fastvae.nn import BernoulliLikelihood, GaussianLikelihood
from fastvae.pretrained import load_weights
from fastvae.progress import TrainingProgress
from fastvae.run import Run
from fastvae.step import TrainingStep, make_optimizer, matmul_precision

__all__ = ["build_model", "pick_device", "resume", "train"]


def train(config: TrainConfig) -> Path:
    """Train as `config` says, in a new run directory, and return its path.

    Raises:
        FastvaeError: bad settings or data; nothing has been written then.
        Stopped: SIGINT or SIGTERM; the run can be resumed.
    """
    return _train(config, None)


def resume(path: Path, **changes: Any) -> Path:
    """Go on with a run from its newest whole checkpoint, exactly as if it had never stopped.

    `changes` replace fields of its config, such as `epochs` or `max_steps`.
    """
    run = Run.open(path)
    return _train(dataclasses.replace(run.read_config(), **changes), run)


def _train(config: TrainConfig, run: Run | None) -> Path:
    device = pick_device(config.device)
    dataset = load_dataset(config.data, data_dir=config.data_dir)
    check_fits(config, dataset)
    torch.manual_seed(config.seed)
    model = build_model(config, dataset.shape).to(device)
    initialize(model, config.init, dataset.train)
    optimizer = make_optimizer(config, list(model.parameters()), len(dataset.train))
    steps_per_epoch = len(dataset.train) // config.batch_size
    num_steps = min(config.epochs * steps_per_epoch, config.max_steps or config.epochs * steps_per_epoch)
    step = TrainingStep(config, model, optimizer, dataset.train.to(device), num_steps)
    test = dataset.test.to(device)
    done, best = 0, float("inf")

    if run is None:
        run = Run.create(config)
        say = f"{run.path}: {config.data}, {len(dataset.train)} examples, {num_steps} steps on {device}"
    else:
        tensors, metadata, skipped = run.newest_checkpoint()
        _restore(tensors, step, where=str(run.last))
        done, best = int(step.step), float(metadata["best"])
        run.rewind_metrics(done)
        run.write_config(config)
        say = (f"{skipped}\n" if skipped else "") + f"{run.path}: resumed at step {done} of {num_steps} on {device}"

    log, evaluation = _Log(run, config, done), None
    with TrainingProgress(done, num_steps) as progress, _signals() as signals, matmul_precision(config.precision):
        progress.say(f"{say}\nnumbers are nats per example ({config.nll_label})")
        take_step = captured(step, config, progress.say)
        for number in range(done, num_steps):
            if number == done or number % steps_per_epoch == 0:
                step.start_epoch(number // steps_per_epoch)
            take_step()
            done = number + 1
            epoch, end_of_epoch = done / steps_per_epoch, done % steps_per_epoch == 0

            if done % config.log_every == 0 or done == num_steps:
                progress.update(done, log.train(step, done, epoch))
            if done == num_steps or (end_of_epoch and done // steps_per_epoch % config.eval_every == 0):
                images_per_s = log.images_per_s(done)
                with log.pause():
                    evaluation = evaluate(model, test, transform=config.transform, seed=config.seed)
                    progress.report(done, epoch, log.test(evaluation, done, epoch), images_per_s)
                    if evaluation.negative_elbo < best:
                        best = evaluation.negative_elbo
                        _save(run.best, step, config, best)
            checkpoint_due = end_of_epoch if config.checkpoint_every is None else done % config.checkpoint_every == 0
            if checkpoint_due or signals or done == num_steps:
                with log.pause():
                    _save(run.last, step, config, best)
            if signals and done < num_steps:
                raise Stopped(f"stopped at step {done}, saved; go on with: fastvae resume {run.path}", signals[0])

        # a run that was killed after its last step has no evaluation yet
        evaluation = evaluation or evaluate(model, test, transform=config.transform, seed=config.seed)
        model.save_pretrained(run.path)
        _draw(run, config, model, test, evaluation)
        if hint := advice(evaluation):
            progress.say(hint)
        progress.say(f"model, metrics and figures: {run.path}")
    return run.path


def pick_device(name: str) -> torch.device:
    """The device of that name, checked; "auto" is CUDA where there is one."""
    try:
        device = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name)
    except RuntimeError as error:
        raise FastvaeError(f"--device is {name!r}, expected auto, cpu, cuda or cuda:N") from error
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise FastvaeError(f"--device is {name!r}, but there are {torch.cuda.device_count()} CUDA devices here")
    if device.type not in ("cpu", "cuda"):
        raise FastvaeError(f"--device is {name!r}, expected auto, cpu, cuda or cuda:N")
    return device


def check_fits(config: TrainConfig, dataset: Dataset) -> None:
    """What can only be said once the data is known."""
    if config.batch_size > len(dataset.train):
        raise FastvaeError(
            f"--batch-size is {config.batch_size}, expected at most the {len(dataset.train)} training examples"
        )
    if config.transform == "dequantize" and dataset.train.dtype != torch.uint8:
        raise FastvaeError(f"--dequantize needs 8-bit data, got {str(dataset.train.dtype)[6:]}")
    if config.tensorboard and importlib.util.find_spec("tensorboard") is None:
        raise FastvaeError("--tensorboard needs the extra: pip install 'fastvae-kernels[tensorboard]'")


def build_model(config: TrainConfig, data_shape: tuple[int, ...]) -> VAE:
    """The untrained model that `config` describes."""
    if config.likelihood == "bernoulli":
        likelihood: BernoulliLikelihood | GaussianLikelihood = BernoulliLikelihood()
    else:
        likelihood = GaussianLikelihood(shared_logvar=config.shared_logvar, logvar_floor=config.logvar_floor)
    build = VAE.mlp if config.architecture == "mlp" else VAE.conv
    return build(
        data_shape=data_shape,
        latent_dim=config.latent_dim,
        hidden=config.hidden,
        activation=config.activation,
        likelihood=likelihood,
    )


def _save(path: Path, step: TrainingStep, config: TrainConfig, best: float) -> None:
    tensors: dict[str, Tensor] = {f"model.{k}": v for k, v in step.model.state_dict().items()}
    for index, state in step.optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer.{index}.{k}": v for k, v in state.items()}
    tensors |= {"step": step.step, "metrics": step.metrics}
    metadata = {"best": best, "config": dataclasses.asdict(config) | {"data_dir": None, "out": None}}
    save_checkpoint(path, tensors, metadata)


def _restore(tensors: dict[str, Tensor], step: TrainingStep, *, where: str) -> None:
    weights = {k.removeprefix("model."): v for k, v in tensors.items() if k.startswith("model.")}
    load_weights(step.model, weights, where=where)
    state: dict[int, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        if name.startswith("optimizer."):
            _, index, key = name.split(".", 2)
            state.setdefault(int(index), {})[key] = tensor
    groups = step.optimizer.state_dict()["param_groups"]
    step.optimizer.load_state_dict({"state": state, "param_groups": groups})
    step.step.copy_(tensors["step"])
    step.metrics.copy_(tensors["metrics"])


def _draw(run: Run, config: TrainConfig, model: VAE, test: Tensor, evaluation: Evaluation) -> None:
    from fastvae import figures

    model.eval()
    x = test[: 2 * 10].float() / (255.0 if test.dtype == torch.uint8 else 1.0)
    generator = torch.Generator(x.device).manual_seed(config.seed)
    figures.save(figures.curves(run.read_metrics(), config.nll_label), run.figures / "curves.png")
    pictures = x.unflatten(1, model.data_shape)
    figures.save(figures.reconstructions(pictures, model.reconstruct(x)), run.figures / "reconstructions.png")
    figures.save(figures.samples(model.sample(100, generator=generator)), run.figures / "samples.png")
    figures.save(figures.kl_per_dim(evaluation), run.figures / "kl_per_dim.png")
    if model.latent_dim == 2:
        figures.save(figures.manifold(model), run.figures / "manifold.png")


class _Log:
    """Rows of metrics.jsonl, and the clock behind their images/s: evaluation and saving do not count."""

    def __init__(self, run: Run, config: TrainConfig, start: int) -> None:
        self.run, self.config = run, config
        self.start, self.began = start, time.perf_counter()
        self.logged, self.logged_at = start, self.began
        self.writer = _tensorboard(run.path) if config.tensorboard else None

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
        self.run.append_metrics({"step": done, "epoch": round(epoch, 6), "split": split, **row})
        if self.writer is not None:
            for name, value in row.items():
                self.writer.add_scalar(f"{split}/{name}", value, done)
        return row


def _tensorboard(path: Path) -> Any:
    from torch.utils.tensorboard import SummaryWriter

    return SummaryWriter(str(path))


@contextlib.contextmanager
def _signals() -> Iterator[list[int]]:
    """The list holds the number of the first SIGINT or SIGTERM; a second one acts as usual."""
    seen: list[int] = []
    before: dict[signal.Signals, Any] = {}

    def note(signum: int, _: Any) -> None:
        seen.append(signum)
        for number, handler in before.items():
            signal.signal(number, handler)

    try:
        for number in (signal.SIGINT, signal.SIGTERM):
            before[number] = signal.signal(number, note)
    except ValueError:
        # not the main thread: whoever runs us there handles signals
        before.clear()
    try:
        yield seen
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
