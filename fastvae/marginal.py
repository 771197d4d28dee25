"""The paper's estimator of log p(x) for latent spaces of few dimensions, which needs no encoder (Appendix D).

    1 / p(x)  =  E_{p(z|x)} [q(z) / (p(z) p(x|z))]  ~  1/S sum_s q(z_s) / (p(z_s) p(x|z_s)),    z_s ~ p(z|x)

for any density q. Draws of the posterior come from Hamiltonian Monte Carlo; q is a Gaussian of full covariance, fitted
to draws of its own, after which the z_s are drawn anew. The estimate is good where q resembles the posterior: hence few
dimensions, and care where the posterior has modes far apart. A chain that starts in a bad one stays there, so chains
start where the best of many draws of the prior are. As 1/p is estimated without bias, log p comes out too high on
average, by about half its squared standard error.

Source: Kingma & Welling 2013, Appendix D; there 50 draws with 4 leapfrog steps.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributions import MultivariateNormal

from fastvae import functional as F
from fastvae import reference
from fastvae.errors import FastvaeError
from fastvae.hmc import MAX_CHAINS, Posterior, adapt, transition
from fastvae.models import VAE

__all__ = ["Marginal", "marginal_log_likelihood"]

MAX_LATENT_DIM = 5
FIRST_STEP_SIZE = 0.1
STARTS, STARTS_AT_ONCE = 1000, 50
"""Draws of the prior that the chains' starts are chosen from, and how many are decoded together."""


class Marginal(NamedTuple):
    """What `marginal_log_likelihood` returns, `[B]` each."""

    value: Tensor
    """log p(x) in nats, float64."""
    stderr: Tensor
    """Its standard error from the spread between the chains (batch means), float64; NaN for one chain."""
    acceptance: Tensor
    """Mean probability of acceptance after the burn-in."""


def marginal_log_likelihood(
    model: VAE,
    x: Tensor,
    *,
    seed: Tensor,
    num_chains: int = 10,
    num_samples: int = 100,
    burn_in: int = 50,
    leapfrog_steps: int = 4,
    example_offset: int = 0,
) -> Marginal:
    """log p(x) of each example by Hamiltonian Monte Carlo and a fitted density; the encoder is not used.

    Args:
        model: of at most 5 latent dimensions; left in the mode that it was in.
        x: `[B, D]`, as the model is to see it: scaled, binarised or dequantized.
        seed: int64 `[1]` on the device of `x`.
        num_chains: chains per example, started from draws of the prior, chosen by their likelihood.
        num_samples: draws per example for the estimate, and as many for q; rounded up to whole transitions.
        burn_in: transitions before the first draw, in which the step of each example is adapted to 90 % acceptance.
        leapfrog_steps: per transition.
        example_offset: global index of the first example.

    Raises: FastvaeError for more than 5 latent dimensions, or numbers below 1 (fewer draws than q has parameters).

    Source: Kingma & Welling 2013, Appendix D.
    """
    C, L = num_chains, model.latent_dim
    if L > MAX_LATENT_DIM:
        raise FastvaeError(
            f"the model has {L} latent dimensions, the estimator holds for at most {MAX_LATENT_DIM}: use log_likelihood"
        )
    if min(C, burn_in, leapfrog_steps) < 1 or C > MAX_CHAINS or num_samples <= 2 * L:
        raise FastvaeError(
            f"got {C} chains, {num_samples} samples, {burn_in} transitions of burn-in and {leapfrog_steps} leapfrog "
            f"steps, expected 1 or more of each, at most {MAX_CHAINS} chains and more than {2 * L} samples"
        )
    x = x.flatten(1)
    modes = model.training
    model.eval()
    try:
        chains = _Chains(model, x, C, leapfrog_steps, seed, example_offset)
        for _ in range(burn_in):
            chains.advance(adapting=True)
        draws = math.ceil(num_samples / C)
        q = _fitted(torch.cat([chains.advance()[0] for _ in range(draws)]).double())
        # log of q(z) / p(x, z) for the draws of each chain: [draws, C, B]
        log_w, acceptance = [], []
        for _ in range(draws):
            z, probability = chains.advance()
            log_w.append(q.log_prob(z.double()) + chains.posterior(z)[0].double())
            acceptance.append(probability.mean(0))
    finally:
        model.train(modes)
    by_chain = torch.logsumexp(torch.stack(log_w), dim=0) - math.log(draws)
    log_inverse = torch.logsumexp(by_chain, dim=0) - math.log(C)
    relative = torch.exp(by_chain - log_inverse)
    return Marginal(-log_inverse, relative.std(0) / math.sqrt(C), torch.stack(acceptance).mean(0))


class _Chains:
    """Chains of a batch."""

    def __init__(self, model: VAE, x: Tensor, C: int, leapfrog_steps: int, seed: Tensor, example_offset: int) -> None:
        self.posterior = Posterior(model, x)
        self.leapfrog_steps, self.seed, self.example_offset = leapfrog_steps, seed, example_offset
        self.step_size = torch.full((len(x), 1), FIRST_STEP_SIZE, device=x.device)
        self.number = 0
        self.z = _starts(model, x, C, seed, example_offset)

    def advance(self, *, adapting: bool = False) -> tuple[Tensor, Tensor]:
        """The chains after one transition, `[C, B, L]`, and the probability of acceptance `[C, B]`."""
        self.z, probability = transition(
            self.posterior,
            self.z,
            self.step_size,
            leapfrog_steps=self.leapfrog_steps,
            seed=self.seed,
            number=self.number,
            example_offset=self.example_offset,
        )
        self.number += 1
        if adapting:
            self.step_size = adapt(self.step_size, probability.mean(0).unsqueeze(-1))
        return self.z, probability


@torch.no_grad()
def _starts(model: VAE, x: Tensor, C: int, seed: Tensor, example_offset: int) -> Tensor:
    """C draws of the posterior as far as `STARTS` of the prior can tell, `[C, B, L]`: resampled by their likelihood."""
    zeros = torch.zeros(len(x), model.latent_dim, device=x.device)
    noise: dict[str, Any] = {"seed": seed, "example_offset": example_offset, "stream": reference.STREAM_PRIOR}
    z = F.reparameterize(zeros, zeros, num_samples=STARTS, **noise)
    nll = torch.cat([model.nll(part, x) for part in z.split(STARTS_AT_ONCE)])
    u = reference.uniform_noise(shape=(1, len(x), 1), sample_offset=STARTS, **noise).flatten()
    places = (torch.arange(C, device=x.device) + u.double().unsqueeze(1)) / C
    chosen = torch.searchsorted((-nll).double().softmax(0).cumsum(0).t().contiguous(), places).clamp_max(STARTS - 1)
    return z.gather(0, chosen.t().unsqueeze(-1).expand(-1, -1, z.shape[-1]))


def _fitted(z: Tensor) -> MultivariateNormal:
    """A Gaussian for each example, of the mean and covariance of its draws `[S, B, L]`."""
    mean = z.mean(0)
    centred = z - mean
    covariance = torch.einsum("sbi,sbj->bij", centred, centred) / (len(z) - 1)
    # chains that all stand still have no spread
    floor = 1e-6 * torch.eye(z.shape[-1], dtype=z.dtype, device=z.device)
    return MultivariateNormal(mean, covariance + floor, validate_args=False)
