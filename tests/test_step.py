"""The first and the last kernel of a training step are the reference's, and the fused step is the plain one."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor

from fastvae import reference
from fastvae.capture import captured
from fastvae.config import TrainConfig
from fastvae.flat_adam import FlatAdam
from fastvae.step import TrainingStep, make_optimizer
from fastvae.train import build_model
from tests.op_checks import BACKENDS, DEVICE, INTERPRETED, device_of, load_backend, randn


def begin(kernels: object, device: str, B: int, with_order: bool, cast: bool) -> list[Tensor]:
    """All that `begin_step` writes at step 7."""
    order = torch.randperm(5000, generator=torch.Generator().manual_seed(0)).to(device) if with_order else None
    lr, beta = randn(20, seed=1, device=device), randn(20, seed=2, device=device)
    seed, index = torch.zeros(1, dtype=torch.int64, device=device), torch.arange(B, device=device)
    out = seed, torch.zeros((), device=device), torch.zeros(3, device=device), index
    # what bfloat16 can hold: the interpreter cuts the rest where a GPU rounds it
    wide = randn(3001, seed=3, device=device).bfloat16().float()
    narrow = torch.zeros(3001, dtype=torch.bfloat16, device=device)
    step = torch.tensor([7], device=device)
    given = (wide, narrow) if cast else None
    kernels.begin_step(step, -(2**63) + 5, lr, beta, order, 1200, 50, out, given)  # type: ignore[attr-defined]
    assert int(step) == 7
    return [*out, narrow]


@pytest.mark.parametrize(("with_order", "cast"), [(True, False), (False, False), (True, True)])
@pytest.mark.parametrize("B", [1, 1100])
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_step_begins_as_the_reference(backend: str, B: int, with_order: bool, cast: bool) -> None:
    device = device_of(backend)
    ours = begin(load_backend(backend), device, B, with_order, cast)
    expected = begin(reference, device, B, with_order, cast)
    for a, b in zip(ours, expected):
        torch.testing.assert_close(a, b, rtol=1e-7, atol=0.0)
    assert int(ours[0]) == -(2**63) + 12


@pytest.mark.parametrize("with_loss", [True, False])
@pytest.mark.parametrize("B", [1, 3001])
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_step_ends_as_the_reference(backend: str, B: int, with_loss: bool) -> None:
    device, metrics = device_of(backend), []
    for kernels in (load_backend(backend), reference):
        nll, kl = randn(B, seed=1, device=device) + 100.0, randn(B, seed=2, device=device)
        loss, beta = torch.tensor([3.5], device=device), torch.tensor([0.5], device=device)
        ring, step = torch.zeros(5, 3, device=device), torch.tensor([13], device=device)
        kernels.end_step(step, loss if with_loss else None, nll, kl, beta, ring)
        assert int(step) == 14
        assert ring[[0, 1, 2, 4]].eq(0).all()
        metrics.append(ring[3])
    torch.testing.assert_close(metrics[0], metrics[1], rtol=2e-6, atol=1e-6)


CONFIG = TrainConfig(hidden=(16, 10), latent_dim=3, batch_size=32, lr_schedule="cosine", beta_warmup_steps=50)


def steps(config: TrainConfig, *, fused: bool, count: int = 3) -> tuple[Tensor, list[Tensor]]:
    """Metrics and parameters after some steps."""
    data = torch.randint(0, 256, (320, 12), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    torch.manual_seed(0)
    model = build_model(config, (3, 4)).to(DEVICE)
    step = TrainingStep(config, model, make_optimizer(config, list(model.parameters()), 320), data, 200)
    if not fused:
        # a hook that sees a forward asks for one
        model.encoder.register_forward_hook(lambda *_: None)
    assert (isinstance(step.optimizer, FlatAdam) and step.without_autograd()) == fused
    for number in range(count):
        step.prepare(number)
        step()
    return step.metrics[:count], [p.detach() for p in model.parameters()]


@pytest.mark.parametrize("binarize", ["none", "dynamic"])
@pytest.mark.parametrize("precision", ["float32", "bf16"])
def test_the_fused_step_on_a_gpu_is_the_plain_step(
    precision: str, binarize: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    load_backend("triton")
    monkeypatch.setenv("FASTVAE_BACKEND", "triton")
    config = dataclasses.replace(CONFIG, precision=precision, binarize=binarize)
    metrics, parameters = steps(config, fused=True)
    plain_metrics, plain_parameters = steps(config, fused=False)
    # Adam's first steps are the signs of gradients, of which rounding may turn the smallest
    tolerance = 1e-6 if precision == "float32" else 2e-2 if INTERPRETED else 1e-2
    torch.testing.assert_close(metrics, plain_metrics, rtol=tolerance, atol=tolerance)
    for p, q in zip(parameters, plain_parameters):
        torch.testing.assert_close(p, q, rtol=tolerance, atol=tolerance)


def test_triton_on_a_cpu_is_not_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    load_backend("triton")
    monkeypatch.setenv("FASTVAE_BACKEND", "triton")
    model = build_model(CONFIG, (3, 4))
    data = torch.zeros(64, 12, dtype=torch.uint8)
    step = TrainingStep(CONFIG, model, make_optimizer(CONFIG, list(model.parameters()), 64), data, 2)
    assert captured(step, CONFIG, print) is step
