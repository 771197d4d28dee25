"""Initial parameters and the learning rate's stages, as the papers have them."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch

from fastvae import initial
from fastvae.config import TrainConfig
from fastvae.errors import FastvaeError
from fastvae.initial import initialize
from fastvae.models import VAE
from fastvae.nn import GaussianLikelihood
from fastvae.step import IWAE_STAGE_ENDS, TrainingStep, make_optimizer
from fastvae.train import build_model

CONFIG = TrainConfig(hidden=(50, 40), latent_dim=10, batch_size=2)


def data() -> torch.Tensor:
    x = torch.randint(256, (600, 30), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    x[:, 0] = 0
    return x


def test_normal_is_of_variance_a_hundredth_in_every_parameter() -> None:
    model = build_model(CONFIG, (30,))
    initialize(model, "normal", data())
    values = torch.cat([parameter.detach().flatten() for parameter in model.parameters()])
    assert all(bool(parameter.any()) for parameter in model.parameters())
    assert abs(float(values.var()) - 0.01) < 4 * 0.01 * math.sqrt(2 / len(values))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_glorot_begins_at_the_mean_image(dtype: torch.dtype) -> None:
    model, x = build_model(CONFIG, (30,)), data()
    mean = x.double().mean(0) / 255
    initialize(model, "glorot", x if dtype == torch.uint8 else x.float() / 255)
    decoder = model.decoder
    assert isinstance(decoder.head, torch.nn.Linear)
    torch.testing.assert_close(torch.sigmoid(decoder.head.bias.detach()).double()[1:], mean[1:], rtol=1e-5, atol=1e-6)
    assert float(torch.sigmoid(decoder.head.bias.detach()[0])) == pytest.approx(0.001, rel=1e-4)
    for layer in model.modules():
        if isinstance(layer, torch.nn.Linear):
            bound = math.sqrt(6 / sum(layer.weight.shape))
            assert 0.9 * bound < float(layer.weight.detach().abs().max()) <= bound
            assert layer is decoder.head or not layer.bias.any()


def test_the_mean_image_of_much_data_is_that_of_blocks_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    x = data()
    torch.testing.assert_close(initial._mean_image(x), x.double().mean(0) / 255)
    # blocks of 10 examples; room for 120, so that it is every fifth
    monkeypatch.setattr(initial, "BLOCK_BYTES", 10 * 30)
    monkeypatch.setattr(initial, "MEAN_BYTES", 120 * 30)
    chosen = x.unflatten(0, (60, 10))[::5]
    torch.testing.assert_close(initial._mean_image(x), chosen.flatten(0, 1).double().mean(0) / 255)


def test_what_it_does_not_fit_is_refused() -> None:
    gaussian = VAE.mlp(data_shape=(30,), latent_dim=2, likelihood=GaussianLikelihood())
    with pytest.raises(FastvaeError, match="belongs to --architecture mlp and --likelihood bernoulli"):
        initialize(gaussian, "glorot", data())
    with pytest.raises(FastvaeError, match="unknown initialisation 'zeros', expected torch, normal or glorot"):
        initialize(build_model(CONFIG, (30,)), "zeros", data())


def test_the_stages_of_burda_et_al() -> None:
    """3^i passes at 1e-3 * 10^(-i/7), i = 0..7."""
    assert IWAE_STAGE_ENDS.tolist() == [sum(3**j for j in range(i + 1)) for i in range(8)]
    config = dataclasses.replace(CONFIG, lr_schedule="iwae")
    model = build_model(config, (30,))
    x = data()[:4]  # two steps per epoch
    optimizer = make_optimizer(config, list(model.parameters()), len(x))
    lr = TrainingStep(config, model, optimizer, x, 2 * 3280).lr.double()
    expected = torch.cat([torch.full((2 * 3**i,), 1e-3 * 10 ** (-i / 7), dtype=torch.float64) for i in range(8)])
    torch.testing.assert_close(lr, expected, rtol=1e-6, atol=0)
    assert make_optimizer(dataclasses.replace(config, adam_eps=1e-4), [*model.parameters()], 4).defaults["eps"] == 1e-4
