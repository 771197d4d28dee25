"""The object form of the posterior: a torch.distributions citizen."""

from __future__ import annotations

import torch
from torch.distributions import kl_divergence

from fastvae.distributions import DiagonalNormal


def test_it_agrees_with_torchs_own_classes() -> None:
    mu, logvar = torch.randn(4, 3), torch.randn(4, 3)
    q, p = DiagonalNormal(mu, logvar), DiagonalNormal(logvar, mu)
    own_q, own_p = q.to_independent(), p.to_independent()
    x = torch.randn(5, 4, 3)
    assert (q.batch_shape, q.event_shape) == (own_q.batch_shape, own_q.event_shape)
    torch.testing.assert_close(q.log_prob(x), own_q.log_prob(x))
    torch.testing.assert_close(q.entropy(), own_q.entropy())
    torch.testing.assert_close(kl_divergence(q, p), kl_divergence(own_q, own_p))
    torch.testing.assert_close(q.mean, own_q.mean)
    torch.testing.assert_close(q.variance, own_q.variance)
    prior = DiagonalNormal(torch.zeros(3), torch.zeros(3)).expand((4,))
    torch.testing.assert_close(q.kl_standard_normal(), kl_divergence(q, prior))


def test_samples_have_the_right_shape_moments_and_gradient() -> None:
    mu, logvar = torch.randn(3, requires_grad=True), torch.randn(3, requires_grad=True)
    q = DiagonalNormal(mu.expand(2, 3), logvar)
    assert q.rsample().shape == (2, 3)
    assert q.rsample((0,)).shape == (0, 2, 3)
    z = q.rsample((50, 200))
    assert z.shape == (50, 200, 2, 3)
    # five standard deviations of the mean of 10,000 draws
    assert ((z.mean((0, 1)) - mu).abs() < 5 * q.stddev / 100).all()
    z.sum().backward()
    assert mu.grad is not None
    torch.testing.assert_close(mu.grad, torch.full((3,), 20_000.0))
