"""Hamiltonian Monte Carlo and the estimator built on it, against models whose posterior and log p(x) are known.

The linear Gaussian model: z ~ N(0, I), x|z ~ N(W z + b, s^2 I): x ~ N(b, W W^T + s^2 I), and the posterior is N(m, P)
with P = (I + W^T W / s^2)^-1, m = P W^T (x - b) / s^2.
"""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn
from torch.distributions import MultivariateNormal

from fastvae.errors import FastvaeError
from fastvae.evaluate import log_likelihood
from fastvae.hmc import Posterior, adapt, transition
from fastvae.marginal import _starts, marginal_log_likelihood
from fastvae.models import VAE
from fastvae.nn import GaussianLikelihood

D, VARIANCE = 8, 0.3
SEED = torch.tensor([7])


class LinearGaussian(VAE):
    def __init__(self, latent_dim: int) -> None:
        generator = torch.Generator().manual_seed(3)
        self_W = torch.randn(D, latent_dim, generator=generator)
        self_b = torch.randn(D, generator=generator)
        decoder = nn.Linear(latent_dim, D)
        likelihood = GaussianLikelihood(shared_logvar=True, logvar_floor=-20.0)
        assert likelihood.raw_logvar is not None
        with torch.no_grad():
            decoder.weight.copy_(self_W)
            decoder.bias.copy_(self_b)
            likelihood.raw_logvar.fill_(math.log(VARIANCE))
        encoder = nn.Linear(D, 2 * latent_dim)
        super().__init__(encoder, decoder, likelihood, data_shape=(D,), latent_dim=latent_dim)
        self.W, self.b = self_W, self_b
        self.P = torch.linalg.inv(torch.eye(latent_dim) + self_W.T @ self_W / VARIANCE)

    def draw(self, num_examples: int) -> Tensor:
        marginal = MultivariateNormal(self.b, self.W @ self.W.T + VARIANCE * torch.eye(D))
        torch.manual_seed(5)
        return marginal.sample((num_examples,))

    def exact(self, x: Tensor) -> Tensor:
        covariance = (self.W @ self.W.T + VARIANCE * torch.eye(D)).double()
        return MultivariateNormal(self.b.double(), covariance).log_prob(x.double())


@pytest.mark.parametrize("latent_dim", [1, 3, 5])
def test_linear_gaussian_within_the_standard_error(latent_dim: int) -> None:
    model = LinearGaussian(latent_dim)
    x = model.draw(150)
    found = marginal_log_likelihood(model, x, seed=SEED, num_chains=16, num_samples=160)
    z_score = (found.value - model.exact(x)) / found.stderr
    # Student's t of 15 degrees of freedom: its standard deviation is 1.07
    assert 0.8 < float(z_score.std()) < 1.4
    assert abs(float(z_score.mean())) < 4 * 1.07 / math.sqrt(150)
    assert float(found.stderr.mean()) < 0.1
    assert 0.85 < float(found.acceptance.mean()) < 0.95


def test_agrees_with_importance_sampling_on_a_bernoulli_decoder() -> None:
    torch.manual_seed(0)
    model = VAE.mlp(data_shape=(12,), latent_dim=2, hidden=(16,), activation="tanh")
    with torch.no_grad():
        for parameter in model.decoder.parameters():
            parameter.mul_(2.0)
    x = torch.bernoulli(torch.full((60, 12), 0.5), generator=torch.Generator().manual_seed(1))
    found = marginal_log_likelihood(model, x, seed=SEED, num_chains=16, num_samples=160)
    other = log_likelihood(model, x, num_samples=20_000, seed=SEED)
    error = (found.stderr.square() + other.stderr.square()).sqrt()
    z_score = (found.value - other.value) / error
    assert 0.7 < float(z_score.std()) < 1.5
    assert abs(float(z_score.mean())) < 4 * 1.07 / math.sqrt(60)


def test_chains_do_not_stay_in_modes_of_no_weight() -> None:
    """A sharp posterior among many bad modes, against the integral over a grid of the plane."""
    torch.manual_seed(0)
    model = VAE.mlp(data_shape=(100,), latent_dim=2, hidden=(20,), activation="tanh")
    with torch.no_grad():
        for parameter in model.decoder.parameters():
            parameter.mul_(8.0)
        x = torch.bernoulli(model.decode(torch.randn(40, 2)).sigmoid())
        side = torch.linspace(-4.0, 4.0, 321)
        grid = torch.cartesian_prod(side, side)
        nll = torch.stack([model.nll(grid, one.expand(len(grid), -1)) for one in x], dim=1)
    exact = torch.logsumexp(-(nll + Posterior.prior(grid).unsqueeze(1)).double(), dim=0) + 2 * math.log(
        side[1] - side[0]
    )
    found = marginal_log_likelihood(model, x, seed=SEED, num_chains=5, num_samples=50)
    assert float((found.value - exact).abs().max()) < 1.0


def test_chains_start_all_over_the_posterior() -> None:
    """The five starts of an example are as far apart as draws of the posterior, which is narrower than the prior."""
    model = LinearGaussian(2)
    x = model.draw(1).expand(400, D).contiguous()
    mean = (x[0] - model.b) @ model.W / VARIANCE @ model.P
    z = _starts(model, x, 5, SEED, 0)
    assert z.shape == (5, 400, 2)
    torch.testing.assert_close(z.mean((0, 1)), mean, atol=0.02, rtol=0)
    centred = (z - z.mean(0)).flatten(0, 1)
    torch.testing.assert_close(centred.T @ centred / (4 * 400), model.P, atol=0.02, rtol=0.3)


def test_chains_draw_the_posterior() -> None:
    """Mean and covariance; the length of the steps is such that a fixed one would swing for ever (half a period)."""
    model = LinearGaussian(2)
    x = model.draw(1).expand(400, D).contiguous()
    mean = (x[0] - model.b) @ model.W / VARIANCE @ model.P
    posterior = Posterior(model, x)
    step_size = torch.full((400, 1), math.pi * float(model.P.trace() / 2) ** 0.5 / 4)
    z = mean + torch.zeros(1, 400, 2)
    draws = []
    for number in range(60):
        z, _ = transition(posterior, z, step_size, leapfrog_steps=4, seed=SEED, number=number)
        if number >= 20:
            draws.append(z)
    centred = torch.cat(draws).flatten(0, 1) - mean
    torch.testing.assert_close(centred.mean(0), torch.zeros(2), atol=0.02, rtol=0)
    torch.testing.assert_close(centred.T @ centred / len(centred), model.P, atol=0.01, rtol=0.05)


def test_the_step_is_longer_where_more_is_accepted() -> None:
    before = torch.ones(3, 1)
    after = adapt(before, torch.tensor([[0.5], [0.9], [1.0]]))
    assert after[0] < 1.0
    assert after[1] == 1.0
    assert after[2] > 1.0


def test_every_draw_goes_by_the_example() -> None:
    model = LinearGaussian(2)
    x = model.draw(6)
    whole = marginal_log_likelihood(model, x, seed=SEED)
    tail = marginal_log_likelihood(model, x[2:], seed=SEED, example_offset=2)
    torch.testing.assert_close(whole.value[2:], tail.value, rtol=1e-4, atol=1e-3)
    again = marginal_log_likelihood(model, x, seed=SEED)
    assert torch.equal(whole.value, again.value)
    assert not torch.equal(whole.value, marginal_log_likelihood(model, x, seed=SEED + 1).value)
    assert model.training
    assert all(parameter.grad is None for parameter in model.parameters())


def test_what_it_cannot_do_it_says() -> None:
    with pytest.raises(FastvaeError, match="6 latent dimensions, the estimator holds for at most 5"):
        marginal_log_likelihood(LinearGaussian(6), torch.zeros(2, D), seed=SEED)
    with pytest.raises(FastvaeError, match="got 0 chains"):
        marginal_log_likelihood(LinearGaussian(2), torch.zeros(2, D), seed=SEED, num_chains=0)
    with pytest.raises(FastvaeError, match="more than 4 samples"):
        marginal_log_likelihood(LinearGaussian(2), torch.zeros(2, D), seed=SEED, num_samples=4)
