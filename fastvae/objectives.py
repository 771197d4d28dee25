"""What a training step minimises, given a posterior and a decoder.

    elbo   mean_b [1/L sum_l nll(z_l) + beta KL[q(z|x) || p(z)]]            the KL in closed form: SGVB estimator B
           mean_b [1/L sum_l nll(z_l) + beta 1/L sum_l log q(z_l|x)/p(z_l)]   or from the samples: SGVB estimator A
    iwae   mean_b [-log 1/K sum_k w_k],    w_k = p(x|z_k) p(z_k) / q(z_k|x)

    wake-sleep   no bound: see `fastvae.wake_sleep`

and three estimators of the gradient of the latter, with normalised weights v_k = w_k / sum_j w_j, for the encoder

    plain  sum_k v_k d log w_k, through the samples and the parameters of q
    stl    the same through the samples alone: the score of q, zero on average for the ELBO but not for K > 1, dropped
    dreg   sum_k v_k^2 d log w_k through the samples alone: unbiased for every K, and no noise where q is exact

while the decoder always gets sum_k v_k d log p(x|z_k). The posterior is encoded once per example; its K samples are the
leading dimension `[K, B]` of everything after it, against which `x [B, D]` is broadcast and never copied.

Source: Kingma & Welling 2013, equations 6 and 7; Burda et al. 2015 (https://arxiv.org/abs/1509.00519), Section 3;
Roeder et al. 2017 (https://arxiv.org/abs/1703.09194); Tucker et al. 2019 (https://arxiv.org/abs/1810.04152).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd import Function

from fastvae import functional as F
from fastvae import reference
from fastvae.errors import FastvaeError

__all__ = ["Estimator", "Gradient", "Objective", "check_objective", "elbo_samples", "iwae_loss", "penalty"]

Objective = Literal["elbo", "iwae", "wake-sleep"]
Gradient = Literal["plain", "stl", "dreg"]
Estimator = Literal["analytic", "monte-carlo"]


def check_objective(
    *,
    objective: str,
    num_samples: int,
    gradient: str,
    kl_estimator: str,
    beta: float | Tensor,
    free_bits: float,
    spell: Callable[[str], str] = str,
) -> None:
    """Refuse what has no meaning; `spell` turns the name of a setting into what the user knows it by.

    Raises: FastvaeError.
    """
    for name, value, known in (
        ("objective", objective, ("elbo", "iwae", "wake-sleep")),
        ("gradient", gradient, ("plain", "stl", "dreg")),
        ("kl_estimator", kl_estimator, ("analytic", "monte-carlo")),
    ):
        if value not in known:
            raise FastvaeError(f"{spell(name)} is {value!r}, expected one of {', '.join(known)}")
    if num_samples < 1:
        raise FastvaeError(f"{spell('num_samples')} is {num_samples}, expected 1 or more")
    if objective == "wake-sleep" and num_samples != 1:
        raise FastvaeError(f"{spell('num_samples')} is {num_samples}, expected 1 for {spell('objective')} wake-sleep")
    if objective != "iwae" and gradient != "plain":
        raise FastvaeError(
            f"{spell('gradient')} {gradient} belongs to {spell('objective')} iwae "
            f"(which with {spell('num_samples')} 1 is the ELBO)"
        )
    if objective != "elbo":
        for name, given in (
            ("beta", isinstance(beta, Tensor) or beta != 1.0),
            ("free_bits", free_bits != 0.0),
            ("kl_estimator", kl_estimator != "analytic"),
        ):
            if given:
                raise FastvaeError(f"{spell(name)} belongs to {spell('objective')} elbo: {objective} has no KL term")
    if kl_estimator == "monte-carlo" and free_bits != 0.0:
        raise FastvaeError(f"{spell('free_bits')} needs the KL of each dimension: {spell('kl_estimator')} analytic")


def elbo_samples(
    mu: Tensor, logvar: Tensor, *, num_samples: int, kl_estimator: Estimator, **noise: Any
) -> tuple[Tensor, Tensor]:
    """z `[B, L]`, or `[num_samples, B, L]` for more than one, and the KL `[B]`, in closed form or from these samples.

    `noise`: seed and example_offset.
    """
    if kl_estimator == "monte-carlo":
        z, log_ratio = F.reparameterize_log_ratio(mu, logvar, num_samples=num_samples, **noise)
        return z, -log_ratio.mean(0)
    if num_samples == 1:
        return F.reparameterize_kl(mu, logvar, **noise)
    return F.reparameterize(mu, logvar, num_samples=num_samples, **noise), F.kl_standard_normal(mu, logvar)


def penalty(
    kl: Tensor,
    mu: Tensor,
    logvar: Tensor,
    *,
    free_bits: float,
    mean_over_ranks: Callable[[Tensor], Tensor] | None,
) -> Tensor:
    """The batch mean of the KL `[B]`, with `free_bits` the sum over dimensions of max(free_bits, its batch mean)."""
    if free_bits == 0.0:
        return kl.mean()
    kl_per_dim = reference.kl_per_dim(mu, logvar).mean(0)
    whole = kl_per_dim.detach()
    if mean_over_ranks is not None:
        whole = mean_over_ranks(whole.clone())
    return torch.where(whole < free_bits, free_bits, kl_per_dim).sum()


def iwae_loss(
    mu: Tensor,
    logvar: Tensor,
    nll: Callable[[Tensor], Tensor],
    *,
    num_samples: int,
    gradient: Gradient,
    **noise: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    """-iwae_bound averaged over the batch; nll and log q(z|x)/p(z) `[B]`, means over the samples, without a gradient.

    Args:
        mu: `[B, L]`.
        logvar: `[B, L]`.
        nll: -log p(x|z) `[K, B]` for z `[K, B, L]`, differentiable for any upstream gradient.
        num_samples: K.
        gradient: which estimator, see the module's text.
        noise: seed and example_offset.
    """
    z, log_ratio = F.reparameterize_log_ratio(
        mu, logvar, num_samples=num_samples, sticking_the_landing=gradient != "plain", **noise
    )
    if gradient == "dreg":
        z, log_ratio = _DoublyReparameterized.apply(z, log_ratio)
    nll_samples = nll(z)
    loss = -F.iwae_bound(nll_samples, log_ratio).mean()
    return loss, nll_samples.detach().mean(0), -log_ratio.detach().mean(0)


class _DoublyReparameterized(Function):
    """(z, log_ratio) as they are; in the backward both gradients are multiplied by the normalised weights v_k.

    The weights need not be handed over: the gradient of log_ratio in any function of the bound is v_k times a factor of
    the example's own, and they sum to 1.
    """

    @staticmethod
    def forward(ctx: Any, z: Tensor, log_ratio: Tensor) -> tuple[Tensor, Tensor]:
        return z.view_as(z), log_ratio.view_as(log_ratio)

    @staticmethod
    def backward(ctx: Any, dz: Tensor, dlog_ratio: Tensor) -> tuple[Tensor, Tensor]:
        total = dlog_ratio.sum(0)
        # an example that the loss does not look at has no weights, and no gradient
        v = torch.where(total == 0.0, 0.0, dlog_ratio / total)
        return dz * v.unsqueeze(-1).to(dz.dtype), dlog_ratio * v
