"""The whole training step on each backend, from the same noise."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from fastvae.cli import main
from fastvae.config import TrainConfig
from fastvae.step import TrainingStep, make_optimizer
from fastvae.train import build_model

STEPS = 200
VARIANTS = {
    "bernoulli": TrainConfig(hidden=(16,), latent_dim=3, batch_size=20, log_every=STEPS),
    "gaussian": TrainConfig(
        hidden=(16,), latent_dim=3, batch_size=20, log_every=STEPS, likelihood="gaussian", dequantize=True
    ),
}


def losses(config: TrainConfig) -> Tensor:
    """Loss, nll and kl of 200 optimiser steps, `[200, 3]`."""
    data = torch.randint(0, 256, (100, 13), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    torch.manual_seed(0)
    model = build_model(config, (13,))
    step = TrainingStep(config, model, make_optimizer(config, list(model.parameters()), 100), data, STEPS)
    for number in range(STEPS):
        if number % step.steps_per_epoch == 0:
            step.start_epoch(number // step.steps_per_epoch)
        step()
    return step.metrics


@pytest.mark.skipif(torch.cuda.is_available(), reason="the backends meet on CPU tensors")
@pytest.mark.parametrize("variant", ["bernoulli", pytest.param("gaussian", marks=pytest.mark.slow)])
def test_200_steps_agree_on_every_backend(variant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    runs = {}
    for backend in ("reference", "numba", "triton"):
        monkeypatch.setenv("FASTVAE_BACKEND", backend)
        runs[backend] = losses(VARIANTS[variant])
    reference = runs["reference"]
    assert reference[-20:, 0].mean() < reference[:20, 0].mean()
    for backend in ("numba", "triton"):
        # rounding grows along the trajectory: 1e-6 at the first steps, 1e-4 after 200
        torch.testing.assert_close(runs[backend][:5], reference[:5], rtol=2e-6, atol=2e-6)
        torch.testing.assert_close(runs[backend], reference, rtol=1e-4, atol=1e-4)


def test_the_triton_kernels_train_on_a_cpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FASTVAE_BACKEND", "triton")
    monkeypatch.setattr(sys, "argv", ["fastvae", "train", "digits", "--max-steps", "3", "--out", str(tmp_path / "run")])
    main()
    assert "step 3/3" in capsys.readouterr().out
