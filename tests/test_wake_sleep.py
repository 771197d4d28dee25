"""Wake-sleep against the textbook: two losses, each differentiated in its own half of the model."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from torch import Tensor

from fastvae import functional as F
from fastvae import reference
from fastvae.config import TrainConfig
from fastvae.errors import FastvaeError
from fastvae.models import VAE
from fastvae.nn import BernoulliLikelihood, GaussianLikelihood, Likelihood
from fastvae.run import Run
from fastvae.train import train

B, D, L = 7, 12, 3


def model(likelihood: Likelihood) -> VAE:
    torch.manual_seed(0)
    return VAE.mlp(data_shape=(D,), latent_dim=L, hidden=(8,), activation="tanh", likelihood=likelihood)


def textbook(vae: VAE, x: Tensor, seed: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Wake loss, sleep loss, and the dream, in plain operations of torch."""
    mu, logvar = vae.encode(x)
    z = (mu + (0.5 * logvar).exp() * reference.normal_noise(seed, (B, L))).detach()
    wake = vae.likelihood.nll(vae.decode(z), x).mean()
    dream_z = reference.normal_noise(seed, (B, L), stream=reference.STREAM_PRIOR)
    params = vae.decode(dream_z).detach()
    if isinstance(vae.likelihood, BernoulliLikelihood):
        u = reference.uniform_noise(~seed, (B, D), stream=reference.STREAM_BINARIZE)
        dream_x = (u < torch.sigmoid(params)).float()
    else:
        assert isinstance(vae.likelihood, GaussianLikelihood)
        m, v = (t.detach() for t in vae.likelihood.mean_and_logvar(params))
        dream_x = m + (0.5 * v).exp() * reference.normal_noise(~seed, (B, D), stream=reference.STREAM_DATA)
    mu, logvar = vae.encode(dream_x)
    q = torch.distributions.Normal(mu, (0.5 * logvar).exp())
    return wake, -q.log_prob(dream_z).sum(1).mean(), dream_z, dream_x


@pytest.mark.parametrize("likelihood", [BernoulliLikelihood(), GaussianLikelihood()], ids=["bernoulli", "gaussian"])
def test_each_half_learns_from_its_own_loss(likelihood: Likelihood) -> None:
    vae, seed = model(likelihood), torch.tensor([5])
    x = torch.rand(B, D, generator=torch.Generator().manual_seed(1))
    wake, sleep, _, _ = textbook(vae, x, seed)
    encoder, decoder = list(vae.encoder.parameters()), list(vae.decoder.parameters())
    expected = [*torch.autograd.grad(sleep, encoder), *torch.autograd.grad(wake, decoder)]
    loss, nll, kl = vae(x, seed=seed, objective="wake-sleep")
    found = torch.autograd.grad(loss, encoder + decoder)
    torch.testing.assert_close(loss, wake + sleep)
    for got, want in zip(found, expected, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
    # what is logged is the bound of the same draw
    elbo = vae(x, seed=seed)
    torch.testing.assert_close(nll, elbo.nll)
    torch.testing.assert_close(kl, elbo.kl)
    assert not nll.requires_grad
    assert not kl.requires_grad


@pytest.mark.parametrize("likelihood", [BernoulliLikelihood(), GaussianLikelihood()], ids=["bernoulli", "gaussian"])
def test_seeded_draws_of_the_data_go_by_the_example(likelihood: Likelihood) -> None:
    params = torch.randn(B, likelihood.outputs_per_element * D, generator=torch.Generator().manual_seed(2))
    seed = torch.tensor([3])
    whole = likelihood.sample(params, seed=seed)
    tail = likelihood.sample(params[4:], seed=seed, example_offset=4)
    assert torch.equal(whole[4:], tail)
    assert not torch.equal(whole, likelihood.sample(params, seed=seed + 1))


def test_the_trainer_learns_by_it(tmp_path: Path) -> None:
    config = TrainConfig(
        data="digits", objective="wake-sleep", hidden=(32,), latent_dim=4, epochs=15, out=tmp_path / "run", lr=3e-3
    )
    bounds = [row["negative_elbo"] for row in Run(train(config)).read_metrics() if row["split"] == "test"]
    assert bounds[-1] < bounds[0] - 5.0


def test_what_has_no_kl_has_no_weight_for_it() -> None:
    for change in ({"beta": 2.0}, {"beta_warmup_steps": 5}, {"free_bits": 0.1}):
        with pytest.raises(FastvaeError, match="belongs to --objective elbo: wake-sleep has no KL term"):
            dataclasses.replace(TrainConfig(objective="wake-sleep"), **change)
    with pytest.raises(FastvaeError, match="--num-samples is 5, expected 1 for --objective wake-sleep"):
        TrainConfig(objective="wake-sleep", num_samples=5)


def test_the_dream_is_no_echo_of_the_data() -> None:
    """Noise of a dream is independent of the noise of the step's data: same seed, other streams."""
    seed = torch.tensor([11])
    vae = model(BernoulliLikelihood())
    half = torch.full((500, D), 0.5)
    data = F.gather_batch(half, torch.arange(500), transform="binarize", seed=seed)
    dream = vae.likelihood.sample(torch.zeros(500, D), seed=~seed)
    correlation = torch.corrcoef(torch.stack([data.flatten(), dream.flatten()]))[0, 1]
    assert abs(correlation) < 4.0 / (500 * D) ** 0.5
