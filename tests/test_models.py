"""Models: shapes, gradients, files, modules of one's own."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from fastvae import reference
from fastvae.errors import FastvaeError
from fastvae.models import VAE
from fastvae.nn import BernoulliLikelihood, GaussianLikelihood, Likelihood

LIKELIHOODS = {
    "bernoulli": lambda: BernoulliLikelihood(),
    "gaussian": lambda: GaussianLikelihood(),
    "shared": lambda: GaussianLikelihood(shared_logvar=True),
}


@pytest.mark.parametrize("architecture", ["mlp", "conv"])
@pytest.mark.parametrize("likelihood", LIKELIHOODS)
@pytest.mark.parametrize("shape", [(8, 8), (3, 9, 7)])
def test_every_model_trains_and_comes_back_from_its_files(
    architecture: str, likelihood: str, shape: tuple[int, ...], tmp_path: Path
) -> None:
    build = getattr(VAE, architecture)
    vae = build(data_shape=shape, latent_dim=5, hidden=(6, 4), likelihood=LIKELIHOODS[likelihood]())
    x = torch.randint(0, 256, (6, *shape), dtype=torch.uint8)
    loss, nll, kl = vae(x, seed=torch.tensor([1]))
    torch.testing.assert_close(loss, (nll + kl).mean())
    loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in vae.parameters())
    vae.save_pretrained(tmp_path)
    again = VAE.from_pretrained(tmp_path)
    assert torch.equal(vae.reconstruct(x), again.reconstruct(x))
    assert again.sample(3).shape == (3, *shape)
    assert not list(tmp_path.glob("*.bin"))


def test_the_fused_output_layer_is_the_plain_model() -> None:
    vae = VAE.mlp(data_shape=(9,), latent_dim=3, hidden=(7,))
    x, seed = torch.rand(5, 9), torch.tensor([3])
    vae(x, seed=seed).loss.backward()
    fused = [p.grad.clone() for p in vae.parameters() if p.grad is not None]
    vae.zero_grad()
    # a decoder of another class takes the unfused way
    plain = VAE(vae.encoder, nn.Sequential(vae.decoder), vae.likelihood, data_shape=(9,), latent_dim=3)
    plain(x, seed=seed).loss.backward()
    torch.testing.assert_close(fused, [p.grad for p in vae.parameters()])


def test_modules_of_ones_own(tmp_path: Path) -> None:
    def modules() -> tuple[nn.Module, nn.Module]:
        return nn.Linear(9, 4), nn.Linear(2, 9)

    vae = VAE(*modules(), BernoulliLikelihood(), data_shape=(9,), latent_dim=2)
    vae(torch.rand(5, 9)).loss.backward()
    vae.save_pretrained(tmp_path)
    encoder, decoder = modules()
    again = VAE.from_pretrained(tmp_path, encoder=encoder, decoder=decoder)
    assert torch.equal(again.encoder.weight, vae.encoder.weight)
    with pytest.raises(FastvaeError, match="encoder= and decoder="):
        VAE.from_pretrained(tmp_path)


def test_beta_and_free_bits() -> None:
    vae, x, seed = VAE.mlp(data_shape=(9,), latent_dim=3, hidden=(7,)), torch.rand(5, 9), torch.tensor([3])
    loss, nll, kl = vae(x, seed=seed, beta=0.25)
    torch.testing.assert_close(loss, (nll + 0.25 * kl).mean())
    # every dimension of an untrained model costs less than 2 nats: the penalty is the floor, without a gradient
    loss, nll, _ = vae(x, seed=seed, free_bits=2.0)
    torch.testing.assert_close(loss, nll.mean() + 6.0)


def test_the_log_variance_has_a_smooth_floor() -> None:
    likelihood = GaussianLikelihood(logvar_floor=-5.0)
    raw = torch.tensor([[0.0, -100.0], [0.0, -4.0]]).requires_grad_()
    _, logvar = likelihood.mean_and_logvar(raw)
    assert (logvar >= -5.0).all()
    (grad,) = torch.autograd.grad(logvar.sum(), raw)
    assert grad[1, 1] > 0.5


@pytest.mark.parametrize("shared", [False, True])
def test_a_gaussian_likelihood_is_the_same_in_all_its_forms(shared: bool) -> None:
    likelihood = GaussianLikelihood(shared_logvar=shared, logvar_floor=-0.5)
    layer, h, x = nn.Linear(7, 9 * likelihood.outputs_per_element), torch.randn(5, 7), torch.rand(5, 9)
    params = layer(h)
    expected = reference.gaussian_nll(*likelihood.mean_and_logvar(params), x)
    for nll in (likelihood.nll(params, x), likelihood.linear_nll(h, layer, x)):
        torch.testing.assert_close(nll, expected)
    for loss, nll in (likelihood.loss(params, x), likelihood.linear_loss(h, layer, x)):
        torch.testing.assert_close(nll, expected)
        torch.testing.assert_close(loss, expected.mean())


@pytest.mark.parametrize("likelihood", LIKELIHOODS)
def test_samples_of_the_data(likelihood: str) -> None:
    p: Likelihood = LIKELIHOODS[likelihood]()
    params = torch.zeros(20_000, 3 * p.outputs_per_element)
    generator = torch.Generator().manual_seed(0)
    x = p.sample(params, generator)
    assert x.shape == (20_000, 3)
    mean, variance = (0.5, 0.25) if likelihood == "bernoulli" else (0.0, 1.0)
    assert (x.mean(0) - mean).abs().max() < 5 * (variance / 20_000) ** 0.5
    assert (x.var(0) - variance).abs().max() < 0.06


def write(folder: Path, **changes: object) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))


def test_bad_files_are_refused_in_one_line(tmp_path: Path) -> None:
    vae = VAE.mlp(data_shape=(9,), latent_dim=3, hidden=(7,))

    def refused(match: str) -> None:
        with pytest.raises(FastvaeError, match=match) as caught:
            VAE.from_pretrained(tmp_path)
        assert "\n" not in str(caught.value)

    refused(r"holds no config.json")
    vae.save_pretrained(tmp_path)
    write(tmp_path, format=99)
    refused("format 99.*reads up to 1")
    write(tmp_path, format=1, latent_dim=4)
    refused("another architecture: decoder.body.0.weight")
    write(tmp_path, latent_dim=3, model_type="bert")
    refused("model_type 'bert'")
    write(tmp_path, model_type="fastvae")
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-10])
    refused("damaged")
    (tmp_path / "config.json").write_text('{"format": 1')
    refused("damaged")
    with pytest.raises(FastvaeError, match="expected a folder, or a Hub repository"):
        VAE.from_pretrained(tmp_path / "nowhere")


def test_data_that_does_not_fit() -> None:
    vae = VAE.mlp(data_shape=(3, 3), latent_dim=2, hidden=(7,))
    with pytest.raises(FastvaeError, match=r"\[5, 8\] does not fit a model for \[B, \*\[3, 3\]\]"):
        vae(torch.rand(5, 8))
    with pytest.raises(FastvaeError, match="latent_dim is 0"):
        VAE.mlp(data_shape=(3, 3), latent_dim=0)
    with pytest.raises(FastvaeError, match="needs images"):
        VAE.conv(data_shape=(9,), latent_dim=2)


def test_uint8_float_and_image_shaped_data_are_the_same() -> None:
    vae = VAE.mlp(data_shape=(3, 3), latent_dim=2, hidden=(7,))
    x = torch.randint(0, 256, (5, 3, 3), dtype=torch.uint8)
    forms: list[Tensor] = [x, x.flatten(1), x.float() / 255]
    losses = [vae(form, seed=torch.tensor([1])).loss.item() for form in forms]
    assert losses[0] == pytest.approx(losses[1])
    assert losses[0] == pytest.approx(losses[2])
