"""Hamiltonian Monte Carlo for the posterior of the latent variables, a chain or more for each example, all in parallel.

    U(z) = -log p(x|z) - log p(z),    H(z, r) = U(z) + |r|^2 / 2,    r ~ N(0, I)

A transition draws the momentum r, follows Hamilton's equations for some leapfrog steps, and accepts the end with
probability min(1, exp(H_before - H_after)). Steps are adapted until a given share of the ends is accepted, and each
transition takes between half and one and a half of them: at a fixed length a chain can swing from one side of the
posterior to the other and back, and never come closer to its middle.

Every draw is a function of (seed, example, transition, chain, element).

Source: Duane et al. 1987; Neal 2011, "MCMC using Hamiltonian dynamics"; Kingma & Welling 2013, Appendix E.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.func import functional_call

from fastvae import functional as F
from fastvae import reference
from fastvae.models import VAE

__all__ = ["Posterior", "adapt", "transition"]

MAX_CHAINS = 2**8
"""Chains and transitions share the 24 bits of a sample's index: 2^16 transitions."""


class Posterior:
    """-log p(x, z) of one batch and its gradient in z, up to nothing: log p(z) has its constant.

    `x` is `[B, D]`, as the decoder's likelihood takes it; `z` is `[C, B, L]`, C chains.
    """

    def __init__(self, model: VAE, x: Tensor) -> None:
        self.model, self.x = model, x
        # nobody asks for the gradients of these
        self.constants = {name: parameter.detach() for name, parameter in model.decoder.named_parameters()}

    def __call__(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """U `[C, B]` float32, in nats, and dU/dz."""
        with torch.enable_grad():
            z = z.detach().requires_grad_()
            params = functional_call(self.model.decoder, self.constants, (z,))
            U = self.model.likelihood.nll(params, self.x) + self.prior(z)
            (grad,) = torch.autograd.grad(U.sum(), z)
        return U.detach(), grad

    @staticmethod
    def prior(z: Tensor) -> Tensor:
        """-log p(z), `[...]` for z `[..., L]`."""
        return 0.5 * (z.square() + reference.LOG_2PI).sum(-1)


def transition(
    posterior: Posterior,
    z: Tensor,
    step_size: Tensor,
    *,
    leapfrog_steps: int,
    seed: Tensor,
    number: int,
    example_offset: int = 0,
) -> tuple[Tensor, Tensor]:
    """One transition of every chain.

    Args:
        posterior: of the batch.
        z: `[C, B, L]`, where the chains are.
        step_size: of the leapfrog, broadcastable to z: the mean of what a transition takes.
        leapfrog_steps: how many.
        seed: int64 `[1]`.
        number: of the transition; each has noise of its own.
        example_offset: global index of the first example.

    Returns:
        z after the transition and the probability with which each end was accepted, `[C, B]`.
    """
    C = len(z)
    where: dict[str, Any] = {"seed": seed, "example_offset": example_offset, "sample_offset": number * MAX_CHAINS}
    zeros = torch.zeros_like(z[0])
    r0 = F.reparameterize(zeros, zeros, num_samples=C, stream=reference.STREAM_MOMENTUM, **where)
    # float32 [C, B, 1] each, in [0, 1)
    u_length, u_accept = reference.uniform_noise(
        shape=(C, z.shape[1], 2), stream=reference.STREAM_ACCEPT, **where
    ).split(1, dim=-1)
    step_size = step_size * (0.5 + u_length)
    U0, grad = posterior(z)
    end, r, U = z, r0, U0
    for _ in range(leapfrog_steps):
        r = r - 0.5 * step_size * grad
        end = end + step_size * r
        U, grad = posterior(end)
        r = r - 0.5 * step_size * grad
    log_ratio = U0 - U + 0.5 * (r0.square() - r.square()).sum(-1)
    # a step so long that the energy overflows is rejected
    probability = log_ratio.nan_to_num(nan=-torch.inf, posinf=-torch.inf).clamp_max(0.0).exp()
    return torch.where(u_accept < probability.unsqueeze(-1), end, z), probability


def adapt(step_size: Tensor, acceptance: Tensor, *, target: float = 0.9, rate: float = 0.1) -> Tensor:
    """A longer step where more than `target` was accepted, a shorter one elsewhere; both of one shape."""
    return step_size * torch.exp(rate * (acceptance - target) / (1.0 - target))
