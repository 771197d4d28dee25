"""Evaluation against a model whose log p(x) is known, and against itself in other batches and chunks.

The linear Gaussian model: z ~ N(0, I), x|z ~ N(W z + b, s^2 I), so that x ~ N(b, W W^T + s^2 I), with the encoder
q(z|x) = N(A (x - b), v): A the exact posterior's, v half as wide again, so that the bound is not tight.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import statistics
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributions import MultivariateNormal
from torch.utils._python_dispatch import TorchDispatchMode

from fastvae.errors import FastvaeError
from fastvae.evaluate import Evaluation, active_units, advice, evaluate, log_likelihood
from fastvae.models import VAE
from fastvae.nn import BernoulliLikelihood, GaussianLikelihood

D, L, NOISE_VARIANCE = 6, 2, 0.3


def seed(value: int = 7) -> Tensor:
    return torch.tensor([value])


class LinearGaussian(VAE):
    """The model above, with what is known of it in closed form."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(3)
        W = torch.randn(D, L, generator=generator)
        b = torch.randn(D, generator=generator)
        precision = torch.eye(L) + W.T @ W / NOISE_VARIANCE
        A = torch.linalg.solve(precision, W.T / NOISE_VARIANCE)
        variance = 1.5 / precision.diagonal()
        encoder, decoder = nn.Linear(D, 2 * L), nn.Linear(L, D)
        likelihood = GaussianLikelihood(shared_logvar=True, logvar_floor=-20.0)
        assert likelihood.raw_logvar is not None
        with torch.no_grad():
            encoder.weight.copy_(torch.cat([A, torch.zeros(L, D)]))
            encoder.bias.copy_(torch.cat([-A @ b, variance.log()]))
            decoder.weight.copy_(W)
            decoder.bias.copy_(b)
            likelihood.raw_logvar.fill_(math.log(NOISE_VARIANCE))
        super().__init__(encoder, decoder, likelihood, data_shape=(D,), latent_dim=L)
        self.W, self.b, self.posterior_variance = W, b, variance
        self.marginal = MultivariateNormal(b, W @ W.T + NOISE_VARIANCE * torch.eye(D))

    def draw(self, num_examples: int) -> Tensor:
        generator = torch.Generator().manual_seed(5)
        z = torch.randn(num_examples, L, generator=generator)
        eps = torch.randn(num_examples, D, generator=generator)
        return z @ self.W.T + self.b + math.sqrt(NOISE_VARIANCE) * eps

    def exact_elbo(self, x: Tensor) -> Tensor:
        """E_q[log p(x|z)] - KL `[B]`: the quadratic form's expectation adds sum_l v_l |W_l|^2."""
        mu, v = self.encode(x)[0].detach(), self.posterior_variance
        squares = (x - mu @ self.W.T - self.b).square().sum(-1) + (self.W.square() * v).sum()
        log_p = -0.5 * (D * math.log(2 * math.pi * NOISE_VARIANCE) + squares / NOISE_VARIANCE)
        return log_p - 0.5 * (mu.square() + v - 1 - v.log()).sum(-1)


@pytest.fixture(scope="module")
def linear() -> LinearGaussian:
    return LinearGaussian()


@pytest.fixture(scope="module")
def mlp() -> VAE:
    torch.manual_seed(1)
    return VAE.mlp(data_shape=(5, 5), latent_dim=3, hidden=(16,))


@pytest.fixture(scope="module")
def images() -> Tensor:
    return torch.randint(256, (50, 25), dtype=torch.uint8, generator=torch.Generator().manual_seed(2))


# log-likelihood


def test_log_likelihood_of_a_solvable_model(linear: LinearGaussian) -> None:
    x = linear.draw(64)
    value, stderr, size = log_likelihood(linear, x, num_samples=2000, seed=seed())
    exact = linear.marginal.log_prob(x).double()
    assert (value.dtype, value.shape) == (torch.float64, (64,))
    assert ((value - exact).abs() < 4 * stderr).all()
    # and the mean over the images, whose errors are independent
    assert (value - exact).mean().abs() < 4 * stderr.square().sum().sqrt() / 64
    assert ((size > 1) & (size < 2000)).all()


def test_standard_error_is_that_of_repetitions(linear: LinearGaussian) -> None:
    # one example in 3000 places has 3000 independent estimates
    x = linear.draw(1).expand(3000, D)
    value, stderr, size = log_likelihood(linear, x, num_samples=100, seed=seed())
    torch.testing.assert_close(value.std(), stderr.square().mean().sqrt(), rtol=0.06, atol=0)
    # and it goes as one over the square root of K
    wider = log_likelihood(linear, x, num_samples=400, seed=seed())
    torch.testing.assert_close(wider.stderr.mean() * 2, stderr.mean(), rtol=0.06, atol=0)
    torch.testing.assert_close(wider.effective_sample_size.mean() / 4, size.mean(), rtol=0.06, atol=0)


def test_one_sample_is_the_elbo_on_average(linear: LinearGaussian) -> None:
    x = linear.draw(1).expand(20_000, D)
    value, stderr, size = log_likelihood(linear, x, num_samples=1, seed=seed())
    assert (value.mean() - linear.exact_elbo(x[:1])).abs() < 4 * value.std() / math.sqrt(20_000)
    assert stderr.isnan().all()
    assert (size == 1).all()


def test_training_objectives_of_a_solvable_model(linear: LinearGaussian) -> None:
    # one example in 20,000 places: means over independent estimates of one number
    N = 20_000
    x = linear.draw(1).expand(N, D)
    elbo, exact = linear.exact_elbo(x[:1]).item(), linear.marginal.log_prob(x[:1]).item()

    def mean_and_error(**options: Any) -> tuple[float, float]:
        parts = [-linear(x[:1000], seed=seed(i), **options).loss.item() for i in range(20)]
        return statistics.mean(parts), statistics.stdev(parts) / math.sqrt(20)

    with torch.no_grad():
        estimates = [mean_and_error(), mean_and_error(num_samples=3), mean_and_error(kl_estimator="monte-carlo")]
        for value, error in (*estimates, mean_and_error(objective="iwae")):
            assert abs(value - elbo) < 4 * error
        bounds = [mean_and_error(objective="iwae", num_samples=K) for K in (1, 4, 16)]
        relative_variance = 100 * log_likelihood(linear, x[:1000], num_samples=100, seed=seed()).stderr.square().mean()
    for (lower, low_error), (higher, high_error) in itertools.pairwise(bounds):
        assert higher - lower > 4 * math.hypot(low_error, high_error)
    # log p(x) less half the variance of the weights over K, to first order (Domke & Sheldon 2018)
    value, error = bounds[-1]
    bias = relative_variance.item() / (2 * 16)
    assert abs(value + bias - exact) < 4 * error + bias / 4


def test_exact_posterior_needs_one_sample() -> None:
    # a decoder that ignores z, and the prior as posterior: every weight is p(x)
    model = LinearGaussian()
    with torch.no_grad():
        model.encoder.weight.zero_(), model.encoder.bias.zero_(), model.decoder.weight.zero_()
    x = model.draw(5)
    value, stderr, size = log_likelihood(model, x, num_samples=50, seed=seed())
    exact = MultivariateNormal(model.b, NOISE_VARIANCE * torch.eye(D)).log_prob(x).double()
    torch.testing.assert_close(value, exact, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(size, torch.full_like(size, 50.0), rtol=1e-6, atol=0)
    assert (stderr < 1e-5).all()


@pytest.mark.parametrize("chunk", [1, 7, 64, 1000])
def test_chunk_does_not_matter(mlp: VAE, images: Tensor, chunk: int) -> None:
    x = images / 255.0
    whole = log_likelihood(mlp, x, num_samples=64, seed=seed())
    parts = log_likelihood(mlp, x, num_samples=64, seed=seed(), chunk=chunk)
    torch.testing.assert_close(parts, whole, rtol=1e-5, atol=1e-6)


def test_examples_do_not_matter_to_each_other(mlp: VAE, images: Tensor) -> None:
    x = images / 255.0
    whole = log_likelihood(mlp, x, num_samples=20, seed=seed())
    part = log_likelihood(mlp, x[30:41], num_samples=20, seed=seed(), example_offset=30)
    torch.testing.assert_close(part, type(part)(*(t[30:41] for t in whole)), rtol=1e-5, atol=1e-6)
    elsewhere = log_likelihood(mlp, x[30:41], num_samples=20, seed=seed())
    assert (elsewhere.value != part.value).all()


class NoDecoder(nn.Module):
    """A likelihood that gives sample k of an example the weight that the test says."""

    def __init__(self, log_w: Tensor) -> None:
        super().__init__()
        self.log_w, self.done = log_w, 0

    def forward(self, z: Tensor) -> Tensor:
        log_w = self.log_w[self.done : self.done + len(z)]
        self.done += len(z)
        # any Bernoulli pixel x = 0 with logit l costs softplus(l), and the prior is the posterior
        logit = torch.where(log_w < -50, -log_w, torch.log(torch.expm1(-log_w)))
        return logit[:, None, None].expand(*z.shape[:-1], 1)


@pytest.mark.parametrize("chunk", [1, 3, 10])
@pytest.mark.parametrize("descending", [True, False])
@pytest.mark.parametrize("shift", [0.0, 1000.0])
def test_weights_of_very_different_size(chunk: int, descending: bool, shift: float) -> None:
    log_w = -torch.tensor([0.5, 2.0, 3.0, 20.0, 40.0, 41.0, 60.0, 70.0, 80.0, 81.0])
    log_w = log_w if descending else log_w.flip(0)
    encoder = nn.Linear(1, 2)
    nn.init.zeros_(encoder.weight)
    nn.init.zeros_(encoder.bias)
    model = VAE(encoder, NoDecoder(log_w), BernoulliLikelihood(), data_shape=(1,), latent_dim=1)
    # -1000 nats is a weight that no floating point type holds
    model.decoder.log_w = log_w - shift
    value, stderr, size = log_likelihood(model, torch.zeros(2, 1), num_samples=10, seed=seed(), chunk=chunk)
    w = log_w.double().exp()
    expected = torch.stack(
        [w.mean().log() - shift, w.std() / math.sqrt(10) / w.mean(), w.sum().square() / w.square().sum()]
    )
    torch.testing.assert_close(torch.stack([value, stderr, size]), expected[:, None].expand(3, 2), rtol=1e-5, atol=0)


class Watch(TorchDispatchMode):
    """The largest result of any op, and how often the host asked the device for a number."""

    def __init__(self) -> None:
        super().__init__()
        self.largest, self.reads = 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        out = func(*args, **(kwargs or {}))
        self.reads += func is torch.ops.aten._local_scalar_dense.default
        results = out if isinstance(out, tuple | list) else (out,)
        # views are free; what counts is memory
        sizes = [t.untyped_storage().nbytes() for t in results if isinstance(t, Tensor)]
        self.largest = max([self.largest, *sizes])
        return out


def test_memory_is_flat_in_the_number_of_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTVAE_BACKEND", "reference")
    monkeypatch.setattr("fastvae.evaluate.CHUNK_BYTES", 4 * 50 * 8 * 200)
    model = VAE.mlp(data_shape=(200,), latent_dim=2, hidden=(10,))
    x = torch.rand(50, 200)
    largest = []
    for K in (8, 24):
        with Watch() as watch:
            log_likelihood(model, x, num_samples=K, seed=seed())
        largest.append(watch.largest)
        assert watch.reads == 0
    assert largest[0] == largest[1] == 4 * 50 * 8 * 200


# evaluate


def test_evaluation_of_a_solvable_model(linear: LinearGaussian) -> None:
    x = linear.draw(2000)
    result = evaluate(linear, x, transform="scale", seed=0, num_samples=50)
    elbo, exact = linear.exact_elbo(x).mean().item(), linear.marginal.log_prob(x).mean().item()
    # the NLL of one draw has variance; the KL has none
    assert result.negative_elbo == pytest.approx(-elbo, abs=0.1)
    assert result.nll + result.kl == pytest.approx(result.negative_elbo, rel=1e-12)
    mu, v = linear.encode(x)[0].detach(), linear.posterior_variance
    kl_per_dim = (0.5 * (mu.square() + v - 1 - v.log())).mean(0)
    torch.testing.assert_close(torch.tensor(result.kl_per_dim), kl_per_dim, rtol=1e-5, atol=1e-6)
    assert sum(result.kl_per_dim) == pytest.approx(result.kl, rel=1e-5)
    assert result.bits_per_dim == pytest.approx(result.negative_elbo / (D * math.log(2)))
    assert result.log_likelihood is not None
    assert result.log_likelihood_stderr is not None
    bias = result.log_likelihood_stderr**2 * 2000 / 2
    assert abs(result.log_likelihood - exact) < 4 * result.log_likelihood_stderr + bias
    # the Monte Carlo error is far below the spread over the examples
    assert result.log_likelihood_stderr < 0.2 * linear.marginal.log_prob(x).std().item() / math.sqrt(2000)
    assert -result.negative_elbo < result.log_likelihood
    assert result.effective_sample_size is not None
    assert 1 < result.effective_sample_size < 50


@pytest.mark.parametrize("transform", ["scale", "binarize", "dequantize"])
def test_batch_size_does_not_matter(mlp: VAE, images: Tensor, transform: str) -> None:
    def numbers(batch_size: int, seed: int = 0) -> list[float]:
        result = evaluate(mlp, images, transform=transform, seed=seed, batch_size=batch_size, num_samples=10)
        return [
            value for field in dataclasses.astuple(result) for value in (field if isinstance(field, list) else [field])
        ]

    whole = numbers(1000)
    assert numbers(1000) == whole
    for batch_size in (3, 17, 50):
        assert numbers(batch_size) == pytest.approx(whole, rel=1e-5, abs=1e-7)
    assert numbers(1000, seed=1) != pytest.approx(whole, rel=1e-5, abs=1e-7)


def test_elbo_is_below_the_log_likelihood(mlp: VAE, images: Tensor) -> None:
    result = evaluate(mlp, images, transform="binarize", seed=0, num_samples=100)
    assert result.log_likelihood is not None
    assert -result.negative_elbo < result.log_likelihood < 0


def test_dequantized_bits_are_a_code_length() -> None:
    # a decoder that says N(1/2, e^10) knows nothing: its density on [0, 1] is constant
    model = VAE.mlp(data_shape=(4,), latent_dim=1, hidden=(), likelihood=GaussianLikelihood())
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
        model.decoder.head.bias.copy_(torch.tensor([0.5] * 4 + [10.0] * 4))
    data = torch.randint(256, (20, 4), dtype=torch.uint8)
    result = evaluate(model, data, transform="dequantize", seed=0)
    density_bits = (0.5 * math.log(2 * math.pi) + 5.0) / math.log(2)
    # 256 equal bins of [0, 1] each have probability density / 256
    assert result.bits_per_dim == pytest.approx(density_bits + 8, rel=1e-4)
    assert evaluate(model, data, transform="scale", seed=0).bits_per_dim == pytest.approx(density_bits, rel=1e-4)


def test_model_is_left_as_it_was(images: Tensor) -> None:
    model = VAE.mlp(data_shape=(25,), latent_dim=2, hidden=(8,))
    model.decoder.body.append(nn.Dropout(0.5))
    model.train()
    model.encoder.eval()
    first = evaluate(model, images, transform="scale", seed=0, num_samples=5)
    assert model.training
    assert model.decoder.body[-1].training
    assert not model.encoder.training
    # dropout was off
    assert evaluate(model, images, transform="scale", seed=0, num_samples=5) == first
    assert all(p.grad is None and p.requires_grad for p in model.parameters())


def test_host_reads_do_not_grow_with_the_batches(mlp: VAE, images: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTVAE_BACKEND", "reference")
    reads = []
    for batch_size in (50, 10):
        with Watch() as watch:
            evaluate(mlp, images, transform="binarize", seed=0, batch_size=batch_size, num_samples=3)
        reads.append(watch.reads)
    assert reads[0] == reads[1]


def test_evaluation_is_json(mlp: VAE, images: Tensor) -> None:
    for K in (None, 1, 2):
        result = evaluate(mlp, images[:1], transform="scale", seed=0, num_samples=K)
        text = json.dumps(dataclasses.asdict(result), allow_nan=False)
        assert Evaluation(**json.loads(text)) == result
        assert (result.log_likelihood is None) == (K is None)
        assert (result.log_likelihood_stderr is None) == (K in (None, 1))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, "batch_size 0"),
        ({"num_samples": 0}, "num_samples is 0"),
        ({"transform": "whiten"}, "unknown transform 'whiten'"),
    ],
)
def test_bad_options(mlp: VAE, images: Tensor, options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        evaluate(mlp, images, **{"transform": "scale", "seed": 0, **options})  # type: ignore[arg-type]


def test_bad_data(mlp: VAE, images: Tensor) -> None:
    with pytest.raises(FastvaeError, match="0 examples"):
        evaluate(mlp, images[:0], transform="scale", seed=0)
    with pytest.raises(FastvaeError, match="does not fit"):
        evaluate(mlp, images[:, :7], transform="scale", seed=0)
    with pytest.raises(FastvaeError, match="chunk 0"):
        log_likelihood(mlp, images / 255.0, num_samples=2, seed=seed(), chunk=0)


# active units and advice


def test_active_units_of_a_planted_model() -> None:
    # means on four points with variances 0.04, 0.0121, 0.0081, 0; the last two are idle, one of them far from the prior
    signs = torch.tensor([[1.0, 1, 1, 0], [1, -1, 1, 0], [-1, 1, -1, 0], [-1, -1, -1, 0]])
    mu = signs * torch.tensor([0.2, 0.11, 0.09, 0.0]) + torch.tensor([0.0, 5.0, 0.0, 5.0])
    assert active_units(mu).tolist() == [True, True, False, False]
    encoder = nn.Linear(4, 8)
    with torch.no_grad():
        encoder.weight.zero_()
        encoder.weight[:4].copy_(torch.eye(4))
        encoder.bias.zero_()
    model = VAE(encoder, nn.Linear(4, 4), BernoulliLikelihood(), data_shape=(4,), latent_dim=4)
    result = evaluate(model, mu, transform="scale", seed=0, batch_size=3)
    assert result.active_units == 2
    assert result.mu_variance_per_dim == pytest.approx([0.04, 0.0121, 0.0081, 0.0], abs=1e-6)


def test_advice(mlp: VAE, images: Tensor) -> None:
    healthy = evaluate(mlp, images, transform="scale", seed=0)
    healthy = dataclasses.replace(healthy, kl=20.0, active_units=3)
    assert advice(healthy) is None
    collapsed = advice(dataclasses.replace(healthy, kl=0.01, active_units=0))
    assert collapsed is not None
    assert "collapsed" in collapsed
    assert "--beta-warmup-steps" in collapsed
    sparse = advice(dataclasses.replace(healthy, kl_per_dim=[1.0] * 200, active_units=25))
    assert sparse is not None
    assert "only 25 of 200" in sparse
    assert advice(dataclasses.replace(healthy, num_examples=1, active_units=0)) is None
