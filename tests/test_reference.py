"""The specification itself: against torch.distributions, and its derivatives against finite differences."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.distributions import Bernoulli, Normal, kl_divergence

from fastvae import reference

SEED = torch.tensor([7])


def randn(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def normal(mu: Tensor, logvar: Tensor) -> Normal:
    return Normal(mu, torch.exp(0.5 * logvar))


def test_kl_standard_normal_is_that_of_torch() -> None:
    mu, logvar = randn(5, 3), randn(5, 3)
    expected = kl_divergence(normal(mu, logvar), Normal(0.0, 1.0)).sum(-1)
    torch.testing.assert_close(reference.kl_standard_normal(mu, logvar), expected)
    assert reference.kl_standard_normal(torch.zeros(2, 3), torch.zeros(2, 3)).tolist() == [0.0, 0.0]


def test_kl_near_the_prior_keeps_its_digits() -> None:
    # the usual form gives 0 here: exp(v) - 1 - v cancels below the resolution of float32
    logvar = torch.full((1, 1), 1e-4)
    torch.testing.assert_close(
        reference.kl_standard_normal(torch.zeros(1, 1), logvar).item(), 0.25e-8, rtol=1e-3, atol=0
    )


def test_kl_normal_is_that_of_torch() -> None:
    q, p = (randn(5, 3), randn(5, 3)), (randn(5, 3), randn(5, 3))
    torch.testing.assert_close(reference.kl_normal(*q, *p), kl_divergence(normal(*q), normal(*p)).sum(-1))


def test_likelihoods_are_those_of_torch() -> None:
    logits, x = randn(4, 6), torch.randint(0, 2, (4, 6))
    expected = -Bernoulli(logits=logits).log_prob(x.double()).sum(-1)
    torch.testing.assert_close(reference.bernoulli_nll(logits, x.bool()), expected)
    mu, logvar, x = randn(4, 6), randn(4, 6), randn(4, 6)
    torch.testing.assert_close(reference.gaussian_nll(mu, logvar, x), -normal(mu, logvar).log_prob(x).sum(-1))


def test_uint8_data_means_a_255th() -> None:
    logits, x = randn(4, 6), torch.randint(0, 256, (4, 6), dtype=torch.uint8)
    torch.testing.assert_close(
        reference.bernoulli_nll(logits, x), reference.bernoulli_nll(logits, x.double() / 255), rtol=1e-12, atol=0
    )


def test_log_ratio_is_the_difference_of_log_densities() -> None:
    mu, logvar = randn(5, 3), randn(5, 3)
    z, log_ratio = reference.reparameterize_log_ratio(mu, logvar, SEED, num_samples=4)
    expected = Normal(0.0, 1.0).log_prob(z).sum(-1) - normal(mu, logvar).log_prob(z).sum(-1)
    torch.testing.assert_close(log_ratio, expected)


def test_sticking_the_landing_drops_the_score_alone() -> None:
    mu, logvar = randn(5, 3).requires_grad_(), randn(5, 3).requires_grad_()
    z, log_ratio = reference.reparameterize_log_ratio(mu, logvar, SEED, num_samples=4, sticking_the_landing=True)
    got = torch.autograd.grad(log_ratio.sum(), (mu, logvar))
    z = reference.reparameterize(mu, logvar, SEED, num_samples=4)
    log_q = normal(mu.detach(), logvar.detach()).log_prob(z)
    expected = torch.autograd.grad((Normal(0.0, 1.0).log_prob(z) - log_q).sum(), (mu, logvar))
    torch.testing.assert_close(got, expected)


OPS = {
    "reparameterize": lambda m, v: reference.reparameterize(m, v, SEED, num_samples=2),
    "kl_standard_normal": reference.kl_standard_normal,
    "kl_normal": lambda m, v: reference.kl_normal(m, v, m.flip(0) * 0.5, v.flip(1)),
    "reparameterize_kl": lambda m, v: reference.reparameterize_kl(m, v, SEED),
    "reparameterize_log_ratio": lambda m, v: reference.reparameterize_log_ratio(m, v, SEED, num_samples=2),
    "bernoulli_nll": lambda m, v: reference.bernoulli_nll(m, torch.sigmoid(v)),
    "gaussian_nll": lambda m, v: reference.gaussian_nll(m, v, torch.linspace(0, 1, 3, dtype=torch.float64)),
}


@pytest.mark.parametrize("op", OPS)
def test_gradcheck(op: str) -> None:
    inputs = (randn(2, 3).requires_grad_(), randn(2, 3).requires_grad_())
    assert torch.autograd.gradcheck(OPS[op], inputs)
    assert torch.autograd.gradgradcheck(OPS[op], inputs)


def test_the_bernoulli_gradient_at_zero_is_sigmoid_minus_x() -> None:
    logits = torch.zeros(1, 1, requires_grad=True)
    (grad,) = torch.autograd.grad(reference.bernoulli_nll(logits, torch.zeros(1, 1)).sum(), logits)
    assert grad.item() == 0.5


def test_a_permutation_holds_every_example_once_and_depends_on_the_seed() -> None:
    first, second = (reference.permutation(torch.tensor([seed]), 1000) for seed in (1, 2))
    assert sorted(first.tolist()) == list(range(1000))
    assert not torch.equal(first, second)


def test_gather_batch_transforms() -> None:
    data = torch.randint(0, 256, (50, 7), dtype=torch.uint8)
    index = torch.tensor([3, 3, 49])
    torch.testing.assert_close(reference.gather_batch(data, index), data[index].float() / 255)
    many = torch.full((20_000,), 3)
    binary = reference.gather_batch(data, many, transform="binarize", seed=SEED)
    assert set(binary.unique().tolist()) <= {0.0, 1.0}
    # five standard deviations of a mean of 20,000 Bernoulli draws
    assert (binary.mean(0) - data[3] / 255).abs().max() < 5 * 0.5 / math.sqrt(20_000)
    dequantized = reference.gather_batch(data, many, transform="dequantize", seed=SEED)
    assert ((dequantized * 256).floor() == data[3]).all()
    assert (dequantized.mean(0) * 256 - data[3] - 0.5).abs().max() < 5 * 0.29 / math.sqrt(20_000)
