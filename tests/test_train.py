"""Training: what a step computes, and that stopping, killing and resuming change nothing, bit for bit."""

from __future__ import annotations

import dataclasses
import itertools
import os
import random
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from fastvae.checkpoint import load_checkpoint, save_checkpoint
from fastvae.config import TrainConfig
from fastvae.errors import FastvaeError
from fastvae.models import VAE
from fastvae.run import Run
from fastvae.step import TrainingStep, make_optimizer, stream_seed
from fastvae.train import is_due, resume, train
from tests.runs import ARGUMENTS, assert_same, final, start, train_on

SMALL = TrainConfig(data="digits", hidden=(16,), latent_dim=3, epochs=3, batch_size=100, log_every=4)


def variants() -> dict[str, TrainConfig]:
    return {
        "adam": SMALL,
        "adagrad": dataclasses.replace(SMALL, optimizer="adagrad", lr=0.02, weight_decay=1.0),
        "gaussian": dataclasses.replace(SMALL, likelihood="gaussian", dequantize=True, clip_grad_norm=1.0),
        "schedules": dataclasses.replace(
            SMALL, lr_schedule="cosine", lr_warmup_steps=5, beta=0.5, beta_warmup_steps=20, free_bits=0.1
        ),
        "bf16": dataclasses.replace(SMALL, precision="bf16", activation="tanh", hidden=(16, 8)),
        "iwae": dataclasses.replace(SMALL, objective="iwae", num_samples=4, gradient="dreg"),
        "conv": dataclasses.replace(
            SMALL, architecture="conv", hidden=(4, 8), shared_logvar=True, likelihood="gaussian"
        ),
    }


@pytest.mark.parametrize("variant", variants())
def test_a_resumed_run_is_the_uninterrupted_run(variant: str, tmp_path: Path) -> None:
    config = variants()[variant]
    whole = train(dataclasses.replace(config, out=tmp_path / "whole"))
    assert min(row["negative_elbo"] for row in final(whole)["rows"]) < final(whole)["rows"][0]["negative_elbo"]
    # the same schedule, cut in the middle of an epoch
    parts = train(dataclasses.replace(config, out=tmp_path / "parts", checkpoint_every=17))
    (parts / "checkpoints" / "last.safetensors").unlink()
    os.rename(tmp_path / "parts", tmp_path / "renamed")
    stopped = tmp_path / "stopped"
    interrupt_at(19, dataclasses.replace(config, out=stopped))
    assert int(load_checkpoint(stopped / "checkpoints" / "last.safetensors")[0]["step"]) == 19
    resume(stopped)
    assert_same(final(whole), final(stopped))


def interrupt_at(step: int, config: TrainConfig) -> None:
    """Train, and raise SIGTERM before step number `step`: the run saves after that step and stops."""
    from fastvae.errors import Stopped

    prepare = TrainingStep.prepare

    # a step that is replayed calls nothing else of it
    def prepared(self: TrainingStep, number: int) -> None:
        prepare(self, number)
        if number == step - 1:
            signal.raise_signal(signal.SIGTERM)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TrainingStep, "prepare", prepared)
        with pytest.raises(Stopped, match=f"stopped at step {step}, saved; go on with: fastvae resume"):
            train(config)


def test_checkpoint_and_log_intervals_change_nothing(tmp_path: Path) -> None:
    one = train(dataclasses.replace(SMALL, out=tmp_path / "one", log_every=1, checkpoint_every=1))
    other = train(dataclasses.replace(SMALL, out=tmp_path / "other", log_every=7, eval_every=2))
    a, b = final(one), final(other)
    assert all(torch.equal(a[name], b[name]) for name in a if name.startswith(("model.", "optimizer.")))


def test_steps_that_are_taken_several_at_a_time_change_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # 14 steps an epoch; intervals at which the host wants to look
    config = dataclasses.replace(SMALL, log_every=5, checkpoint_every=11, max_steps=40)
    one = train(dataclasses.replace(config, out=tmp_path / "one"))
    taken: list[int] = []

    def in_groups(step: TrainingStep, *_: Any) -> Callable[[int], int]:
        def take(most: int) -> int:
            count = min(most, 4)
            taken.append(sum(step() for _ in range(count)))
            return count

        return take

    monkeypatch.setattr("fastvae.train.captured", in_groups)
    several = train(dataclasses.replace(config, out=tmp_path / "several"))
    assert sum(taken) == 40
    assert max(taken) == 4
    assert_same(final(one), final(several))


def test_checkpoints_are_due_by_steps_minutes_or_epochs() -> None:
    def due(now: float = 0.0, done: int = 7, end_of_epoch: bool = False, **settings: Any) -> bool:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(time, "monotonic", lambda: 1000.0 + now)
            return is_due(dataclasses.replace(SMALL, **settings), done, end_of_epoch, saved_at=1000.0)

    assert due(end_of_epoch=True)
    assert not due(now=1e9)
    assert due(done=10, checkpoint_every=5)
    assert not due(done=11, checkpoint_every=5, end_of_epoch=True)
    assert due(now=30.0, checkpoint_minutes=0.5)
    assert not due(now=29.0, checkpoint_minutes=0.5, end_of_epoch=True)
    assert due(now=30.0, checkpoint_minutes=0.5, checkpoint_every=5)
    assert due(done=10, checkpoint_minutes=0.5, checkpoint_every=5)


def test_the_newest_whole_checkpoint_may_be_the_best_one(tmp_path: Path) -> None:
    run = Run.create(dataclasses.replace(SMALL, out=tmp_path / "run"))
    for path, step in ((run.last, 5), (run.best, 8)):
        save_checkpoint(path, {"step": torch.tensor([step])}, {})
    assert run.newest_checkpoint()[0]["step"].item() == 8
    run.best.write_bytes(b"damaged")
    tensors, _, said = run.newest_checkpoint()
    assert tensors["step"].item() == 5
    assert said is not None
    assert "skipped a checkpoint" in said


def killed_run(times: int, tmp_path: Path) -> None:
    """Kill -9 a real process after a random number of steps, resume, again; compare with a run that nobody killed."""
    arguments = [*ARGUMENTS, "--checkpoint-every", "3", "--epochs", str(20 + 5 * times)]
    assert start("train", *arguments, "--out", str(tmp_path / "whole")).wait() == 0
    random.seed(times)
    out = tmp_path / "killed"
    process = start("train", *arguments, "--out", str(out))
    for _ in range(times):
        train_on(out, process, random.randint(20, 40))
        process.kill()
        process.wait()
        process = start("resume", str(out))
    assert process.wait() == 0
    assert_same(final(tmp_path / "whole"), final(out))


def test_resume_after_kill_9(tmp_path: Path) -> None:
    killed_run(1, tmp_path)


@pytest.mark.slow
def test_resume_after_kill_9_twenty_times(tmp_path: Path) -> None:
    killed_run(20, tmp_path)


def test_the_seed_decides_and_only_the_seed(tmp_path: Path) -> None:
    short = dataclasses.replace(SMALL, max_steps=8)
    a, b, c = (
        final(train(dataclasses.replace(short, out=tmp_path / name, seed=seed)))
        for name, seed in (("a", 1), ("b", 1), ("c", 2))
    )
    assert_same(a, b)
    assert not torch.equal(a["model.encoder.head.weight"], c["model.encoder.head.weight"])


def test_keys_of_neighbouring_seeds_do_not_meet() -> None:
    keys = [stream_seed(seed) for seed in range(1000)]
    assert len(set(keys)) == 1000
    assert min(abs(a - b) for a, b in itertools.pairwise(keys)) > 2**32
    # SplitMix64's published first output for state 0
    assert stream_seed(0) % 2**64 == 0xE220A8397B1DCDAF


def test_every_example_is_seen_once_per_epoch() -> None:
    data = torch.arange(40, dtype=torch.uint8).unsqueeze(1)
    config = TrainConfig(batch_size=10, binarize="none")
    seen: list[int] = []
    model = VAE.mlp(data_shape=(1,), latent_dim=1, hidden=(2,))
    model.register_forward_pre_hook(lambda _, args: seen.extend((args[0] * 255).round().flatten().int().tolist()))
    step = TrainingStep(config, model, make_optimizer(config, list(model.parameters()), 40), data, 8)
    for epoch in range(2):
        step.start_epoch(epoch)
        for _ in range(4):
            step()
    assert sorted(seen[:40]) == sorted(seen[40:]) == list(range(40))
    assert seen[:40] != seen[40:]


def test_weight_decay_is_the_gaussian_prior_on_the_parameters() -> None:
    config = TrainConfig(optimizer="adagrad", weight_decay=2.0, lr=0.1)
    weight = torch.nn.Parameter(torch.tensor([3.0]))
    optimizer = make_optimizer(config, [weight], num_train=100)
    weight.grad = torch.tensor([0.5])
    optimizer.step()
    # d/dw of the loss plus 2 w^2 / 2 / 100
    assert optimizer.state[weight]["sum"].item() == pytest.approx((0.5 + 2.0 * 3.0 / 100) ** 2)


def test_a_loss_that_is_not_finite_ends_the_run(tmp_path: Path) -> None:
    with pytest.raises(FastvaeError, match=r"the loss is .* at step"):
        train(dataclasses.replace(SMALL, out=tmp_path / "run", lr=1e18, likelihood="gaussian", log_every=1))


def test_resuming_a_finished_run_further(tmp_path: Path) -> None:
    whole = train(dataclasses.replace(SMALL, out=tmp_path / "whole"))
    grown = train(dataclasses.replace(SMALL, out=tmp_path / "grown", epochs=1))
    resume(grown, epochs=3)
    assert all(torch.equal(a, b) for a, b in zip(final(whole).values(), final(grown).values()) if torch.is_tensor(a))


def test_tensorboard_files(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    run = train(dataclasses.replace(SMALL, out=tmp_path / "run", max_steps=5, tensorboard=True))
    assert list(run.glob("events.out.tfevents.*"))


def test_of_two_that_train_the_same_run_the_first_ends(tmp_path: Path) -> None:
    first = Run.create(dataclasses.replace(SMALL, out=tmp_path / "run"))
    first.claim()
    first.append_metrics({"step": 1})
    second = Run.open(first.path)
    second.claim()
    with pytest.raises(FastvaeError, match="another process has gone on with"):
        first.append_metrics({"step": 2})
    second.append_metrics({"step": 3})
    assert [row["step"] for row in first.read_metrics()] == [1, 3]
