"""The approximate posterior as a `torch.distributions` object whose methods run the fused ops."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.distributions import Distribution, Independent, Normal, constraints
from torch.distributions.kl import register_kl

from fastvae import functional as F

__all__ = ["DiagonalNormal"]


class DiagonalNormal(Distribution):
    """N(mu, diag(exp(logvar))): `mu` and `logvar` `[..., L]`, event shape `[L]`.

    >>> q = DiagonalNormal(mu, logvar)
    >>> z = q.rsample()                 # [..., L], reparameterized
    >>> kl = q.kl_standard_normal()     # [...], nats
    """

    arg_constraints = {"mu": constraints.real_vector, "logvar": constraints.real_vector}  # noqa: RUF012 (torch's name)
    support = constraints.real_vector
    has_rsample = True

    def __init__(self, mu: Tensor, logvar: Tensor, validate_args: bool | None = None) -> None:
        self.mu, self.logvar = torch.broadcast_tensors(mu, logvar)
        super().__init__(self.mu.shape[:-1], self.mu.shape[-1:], validate_args=validate_args)

    @property
    def mean(self) -> Tensor:
        return self.mu

    @property
    def variance(self) -> Tensor:
        return self.logvar.exp()

    @property
    def stddev(self) -> Tensor:
        return torch.exp(0.5 * self.logvar)

    def expand(self, batch_shape: Any, _instance: Any = None) -> DiagonalNormal:
        shape = torch.Size(batch_shape) + self.event_shape
        return DiagonalNormal(self.mu.expand(shape), self.logvar.expand(shape), validate_args=False)

    def rsample(self, sample_shape: Any = ()) -> Tensor:
        """Draws `[*sample_shape, ..., L]`, differentiable; the seed comes from torch's generator."""
        sample_shape = torch.Size(sample_shape)
        if not sample_shape:
            return F.reparameterize(self.mu, self.logvar)
        z = F.reparameterize(self.mu, self.logvar, num_samples=max(1, sample_shape.numel()))
        return z[: sample_shape.numel()].view(*sample_shape, *self.mu.shape)

    def log_prob(self, value: Tensor) -> Tensor:
        """log density in nats, `[...]`."""
        return -F.gaussian_nll(self.mu.expand(value.shape), self.logvar.expand(value.shape), value)

    def entropy(self) -> Tensor:
        return self.to_independent().entropy()

    def kl_standard_normal(self) -> Tensor:
        """KL(self || N(0, I)) in nats, `[...]`."""
        return F.kl_standard_normal(self.mu, self.logvar)

    def to_independent(self) -> Any:
        """The same distribution in torch's own classes."""
        return Independent(Normal(self.mu, self.stddev, validate_args=False), 1, validate_args=False)


@register_kl(DiagonalNormal, DiagonalNormal)
def _kl_diagonal_diagonal(q: DiagonalNormal, p: DiagonalNormal) -> Tensor:
    return F.kl_normal(q.mu, q.logvar, p.mu, p.logvar)
