"""Training, in the order in which things happen."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import math
import signal
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastvae.capture import captured
from fastvae.checkpoint_writer import CheckpointWriter
from fastvae.config import TrainConfig
from fastvae.data import Dataset, load_dataset
from fastvae.distributed import ALONE, Meetings, Ranks, join, torchrun_job
from fastvae.errors import FastvaeError, Stopped
from fastvae.evaluate import Evaluation, advice, evaluate
from fastvae.initial import initialize
from fastvae.log import Log
from fastvae.models import VAE
from fastvae.nn import BernoulliLikelihood, GaussianLikelihood
from fastvae.placement import placed
from fastvae.progress import TrainingProgress
from fastvae.run import Run
from fastvae.step import TrainingStep, make_optimizer, matmul_precision
from fastvae.stream import HostRows
from fastvae.training_state import restore, snapshot, version_changes
from fastvae.versions import library_versions

__all__ = ["build_model", "pick_device", "resume", "train"]


def train(config: TrainConfig) -> Path:
    """Train as `config` says, in a new run directory, and return its path; under `torchrun` with all its ranks as one.

    A `torchrun` that starts its workers again goes on with the run that they had begun.

    Raises:
        FastvaeError: bad settings or data; nothing has been written then.
        Stopped: SIGINT or SIGTERM; the run can be resumed.
    """
    with join() as ranks:
        return _train(config, None, ranks)


def resume(path: Path, **changes: Any) -> Path:
    """Go on with a run from its newest whole checkpoint, exactly as if it had never stopped.

    `changes` replace fields of its config, such as `epochs` or `max_steps`.
    """
    with join() as ranks:
        run, config = ranks.from_main(lambda: _reopened(path, changes))
        return _train(config, run, ranks)


def _train(config: TrainConfig, run: Run | None, ranks: Ranks) -> Path:
    settings = {name: value for name, value in dataclasses.asdict(config).items() if name != "data_dir"}
    ranks.check_same(library_versions() | settings)
    device, dataset = ranks.together(lambda: _checked(config, ranks))
    ranks.check_same({"the training set": dataset.train.shape, "the test set": dataset.test.shape})
    torch.manual_seed(config.seed)
    model = build_model(config, dataset.shape).to(device)
    initialize(model, config.init, dataset.train)
    optimizer = make_optimizer(config, list(model.parameters()), len(dataset.train))
    steps_per_epoch = len(dataset.train) // config.batch_size
    num_steps = min(config.epochs * steps_per_epoch, config.max_steps or config.epochs * steps_per_epoch)
    with contextlib.ExitStack() as stack:
        data, test = stack.enter_context(placed(dataset, config, device, num_steps, ranks))
        step = TrainingStep(config, model, optimizer, data, num_steps, ranks)
        done, best = 0, float("inf")

        run, saved = ranks.from_main(lambda: _begun(config, run))
        say = f"{run.path}: {config.data}, {len(dataset.train)} examples, {num_steps} steps on {device}"
        if saved is not None:
            tensors, metadata, skipped = saved
            restore(tensors, step, where=str(run.last))
            done, best = int(step.step), float(metadata["best"])
            if ranks.is_main:
                run.rewind_metrics(done)
                run.write_config(config)
            say = f"{run.path}: resumed at step {done} of {num_steps} on {device}"
            say = "\n".join([*filter(None, (skipped, version_changes(metadata))), say])
        say += f", {ranks.size} ranks" if ranks.size > 1 else ""
        say += f"\nthe data ({dataset.num_bytes / 1e9:.3g} GB) stays on the host" if isinstance(test, HostRows) else ""

        log, evaluation = Log(run, config, done, ranks), None
        evaluate_test = partial(evaluate, model, test, transform=config.transform, seed=config.seed, ranks=ranks)
        progress = stack.enter_context(TrainingProgress(done, num_steps, quiet=not ranks.is_main))
        signals = stack.enter_context(_signals())
        stack.enter_context(matmul_precision(config.precision))
        writer = stack.enter_context(CheckpointWriter())
        meet, saved_at = Meetings(ranks, done), time.monotonic()
        progress.say(f"{say}\nnumbers are nats per example ({config.nll_label})")
        take_steps = captured(step, config, progress.say)
        while done < num_steps:
            step.prepare(done)
            done += take_steps(min(step.ahead(done), steps_until_due(config, done), num_steps - done))
            epoch, end_of_epoch = done / steps_per_epoch, done % steps_per_epoch == 0
            stop, save_to = meet(done, signals[0] if signals else 0), []

            if done % config.log_every == 0 or done == num_steps:
                progress.update(done, log.train(step, done, epoch))
            if done == num_steps or (end_of_epoch and done // steps_per_epoch % config.eval_every == 0):
                images_per_s = log.images_per_s(done)
                with log.pause():
                    evaluation = evaluate_test()
                    progress.report(done, epoch, log.test(evaluation, done, epoch), images_per_s)
                if evaluation.negative_elbo < best:
                    best = evaluation.negative_elbo
                    save_to = [run.best]
            if stop or done == num_steps or is_due(config, done, end_of_epoch, saved_at):
                saved_at, save_to = time.monotonic(), [run.last, *save_to]
            if save_to and ranks.is_main:
                with log.pause():
                    run.check_owner()
                    writer.save(save_to, *snapshot(step, config, best))
            if stop and done < num_steps:
                writer.wait()
                raise Stopped(f"stopped at step {done}, saved; go on with: fastvae resume {run.path}", stop)

        # a run that was killed after its last step has no evaluation yet
        evaluation = evaluation or evaluate_test()
        if ranks.is_main:
            model.save_pretrained(run.path)
            _draw(run, config, model, test, evaluation)
            run.finish()
        if hint := advice(evaluation):
            progress.say(hint)
        progress.say(f"model, metrics and figures: {run.path}")
    return run.path


def _reopened(path: Path, changes: dict[str, Any]) -> tuple[Run, TrainConfig]:
    run = Run.open(path)
    return run, dataclasses.replace(run.read_config(), **changes)


def _checked(config: TrainConfig, ranks: Ranks) -> tuple[torch.device, Dataset]:
    """What can fail on one rank and not on another."""
    device = pick_device(config.device, ranks)
    dataset = load_dataset(config.data, data_dir=config.data_dir)
    check_fits(config, dataset, ranks)
    return device, dataset


def _begun(
    config: TrainConfig, run: Run | None
) -> tuple[Run, tuple[dict[str, Tensor], dict[str, Any], str | None] | None]:
    """The run directory, and its newest checkpoint if there is something to go on from."""
    if run is None:
        run = Run.create(config, torchrun_job())
        run.claim()
        if not run.checkpoints():
            # a start of the same job may have logged, but not saved
            run.rewind_metrics(0)
            run.write_config(config)
            return run, None
    saved = run.newest_checkpoint()
    run.claim()
    return run, saved


def pick_device(name: str, ranks: Ranks = ALONE) -> torch.device:
    """The device of that name, checked; "auto" is CUDA where there is one. Each of many ranks has a CUDA device."""
    try:
        device = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name)
    except RuntimeError as error:
        raise FastvaeError(f"--device is {name!r}, expected auto, cpu, cuda or cuda:N") from error
    if device.type == "cuda" and ranks.size > 1:
        if device.index is not None:
            raise FastvaeError(f"--device is {name!r}, expected auto, cpu or cuda: the ranks share the devices out")
        device = torch.device("cuda", ranks.local_rank)
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise FastvaeError(f"--device is {name!r}, but there are {torch.cuda.device_count()} CUDA devices here")
    if device.type not in ("cpu", "cuda"):
        raise FastvaeError(f"--device is {name!r}, expected auto, cpu, cuda or cuda:N")
    return device


def check_fits(config: TrainConfig, dataset: Dataset, ranks: Ranks = ALONE) -> None:
    """What can only be said once the data and the ranks are known."""
    if config.batch_size % ranks.size:
        raise FastvaeError(f"--batch-size is {config.batch_size}, expected a multiple of the {ranks.size} ranks")
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


def steps_until_due(config: TrainConfig, done: int) -> int:
    """Steps from `done` on until the next metrics are logged or the next checkpoint is due by its number of steps."""
    return min(every - done % every for every in (config.log_every, config.checkpoint_every) if every is not None)


def is_due(config: TrainConfig, done: int, end_of_epoch: bool, saved_at: float) -> bool:
    """Whether it is time for a checkpoint after `done` steps."""
    if config.checkpoint_every is None and config.checkpoint_minutes is None:
        return end_of_epoch
    by_step = config.checkpoint_every is not None and done % config.checkpoint_every == 0
    return by_step or time.monotonic() - saved_at >= 60 * (config.checkpoint_minutes or math.inf)


def _draw(run: Run, config: TrainConfig, model: VAE, test: Tensor | HostRows, evaluation: Evaluation) -> None:
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
