"""The objectives: every gradient estimator against its textbook formula, and what they promise of bias and noise."""

from __future__ import annotations

import copy
import math
from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fastvae import functional as F
from fastvae import reference
from fastvae.config import TrainConfig
from fastvae.data import load_dataset
from fastvae.errors import FastvaeError
from fastvae.models import VAE
from fastvae.nn import BernoulliLikelihood, GaussianLikelihood

SEED = torch.tensor([5])
K, B, L = 4, 5, 3

MODELS = {
    "bernoulli": lambda: VAE.mlp(data_shape=(3, 4), latent_dim=L, hidden=(7,), likelihood=BernoulliLikelihood()),
    "gaussian": lambda: VAE.mlp(data_shape=(3, 4), latent_dim=L, hidden=(7,), likelihood=GaussianLikelihood()),
    "conv": lambda: VAE.conv(data_shape=(3, 4), latent_dim=L, hidden=(2,)),
}
ESTIMATORS: dict[str, dict[str, Any]] = {
    "elbo, L samples": {"num_samples": K},
    "elbo, Monte Carlo KL": {"num_samples": K, "kl_estimator": "monte-carlo", "beta": 0.5},
    "iwae": {"objective": "iwae", "num_samples": K},
    "iwae stl": {"objective": "iwae", "num_samples": K, "gradient": "stl"},
    "iwae dreg": {"objective": "iwae", "num_samples": K, "gradient": "dreg"},
}


def textbook(model: VAE, x: Tensor, options: dict[str, Any]) -> tuple[Tensor, list[Tensor]]:
    """Loss and gradients as the papers write them, from torch.distributions, for a float64 model."""
    params, beta = list(model.parameters()), options.get("beta", 1.0)
    mu, logvar = model.encode(x)
    eps = reference.normal_noise(SEED, (K, *mu.shape), dtype=torch.float64)
    z = mu + torch.exp(logvar / 2) * eps

    def normal(mu: Tensor, std: Tensor) -> torch.distributions.Independent:
        return torch.distributions.Independent(torch.distributions.Normal(mu, std), 1)

    def log_p_x(z: Tensor) -> Tensor:
        if isinstance(model.likelihood, GaussianLikelihood):
            mean, log_variance = model.likelihood.mean_and_logvar(model.decode(z))
            return normal(mean, torch.exp(log_variance / 2)).log_prob(x)
        pixels = torch.distributions.Bernoulli(logits=model.decode(z), validate_args=False)
        return pixels.log_prob(x).sum(-1)

    q, prior = normal(mu, torch.exp(logvar / 2)), normal(torch.zeros_like(mu), torch.ones_like(mu))
    log_w = log_p_x(z) + prior.log_prob(z) - q.log_prob(z)
    if options.get("objective") != "iwae":
        if options.get("kl_estimator") == "monte-carlo":
            kl = q.log_prob(z) - prior.log_prob(z)
        else:
            kl = torch.distributions.kl_divergence(q, prior)
        loss = (beta * kl - log_p_x(z)).mean()
        return loss, list(torch.autograd.grad(loss, params))
    loss = -(torch.logsumexp(log_w, dim=0) - math.log(K)).mean()
    grads = torch.autograd.grad(loss, params, retain_graph=True)
    if "gradient" in options:
        # the encoder's part again, from samples alone
        stopped = normal(mu.detach(), torch.exp(logvar.detach() / 2))
        v = torch.softmax(log_w, dim=0).detach()
        power = {"stl": 1, "dreg": 2}[options["gradient"]]
        surrogate = -(v**power * (log_p_x(z) + prior.log_prob(z) - stopped.log_prob(z))).sum(0).mean()
        encoder = list(model.encoder.parameters())
        grads = (*torch.autograd.grad(surrogate, encoder), *grads[len(encoder) :])
    return loss, list(grads)


def gradients(model: VAE, x: Tensor, **options: Any) -> tuple[Tensor, list[Tensor]]:
    loss = model(x, seed=SEED, **options).loss
    return loss.detach(), list(torch.autograd.grad(loss, list(model.parameters())))


@pytest.mark.parametrize("backend", ["numba", "triton", "reference"])
@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_loss_and_gradients_are_the_textbooks(
    estimator: str, kind: str, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FASTVAE_BACKEND", backend)
    torch.manual_seed(0)
    model, x, options = MODELS[kind](), torch.rand(B, 12).round(), ESTIMATORS[estimator]
    # posteriors and weights far from uniform
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(2.0)
    expected_loss, expected = textbook(copy.deepcopy(model).double(), x.double(), options)
    loss, got = gradients(model, x, **options)
    torch.testing.assert_close(loss.double(), expected_loss, rtol=1e-5, atol=1e-5)
    scale = max(float(g.abs().max()) for g in expected)
    for g, e in zip(got, expected):
        torch.testing.assert_close(g.double(), e, rtol=1e-4, atol=1e-5 * scale)


def test_one_importance_sample_is_estimator_a() -> None:
    model, x = MODELS["bernoulli"](), torch.rand(B, 12)
    iwae, elbo = gradients(model, x, objective="iwae"), gradients(model, x, kl_estimator="monte-carlo")
    torch.testing.assert_close(iwae, elbo)


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_nll_and_kl_are_the_elbos(estimator: str) -> None:
    model, x = MODELS["bernoulli"](), torch.rand(B, 12)
    loss, nll, kl = model(x, seed=SEED, **ESTIMATORS[estimator])
    assert nll.shape == kl.shape == (B,)
    assert not nll.requires_grad
    assert not kl.requires_grad
    z = F.reparameterize(*model.encode(x), num_samples=K, seed=SEED)
    torch.testing.assert_close(nll, model.likelihood.nll(model.decode(z), x).mean(0).detach())
    if "iwae" in estimator:
        # Jensen: the same samples bound tighter
        assert loss < (nll + kl).mean()


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_a_batch_in_parts_draws_the_same_noise(estimator: str) -> None:
    model, x, options = MODELS["bernoulli"](), torch.rand(6, 12), ESTIMATORS[estimator]
    parts = [model(x[i : i + 2], seed=SEED, example_offset=i, **options).loss for i in (0, 2, 4)]
    torch.testing.assert_close(torch.stack(parts).mean(), model(x, seed=SEED, **options).loss)


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_under_bfloat16_autocast(estimator: str) -> None:
    model, x, options = MODELS["bernoulli"](), torch.rand(B, 12), ESTIMATORS[estimator]
    expected_loss, expected = gradients(model, x, **options)
    with torch.autocast("cpu", torch.bfloat16):
        loss, got = gradients(model, x, **options)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, expected_loss, rtol=0.02, atol=0.02)
    assert all(g.dtype == torch.float32 for g in got)
    scale = max(float(g.abs().max()) for g in expected)
    torch.testing.assert_close(got, expected, rtol=0.0, atol=0.05 * scale)


class Allocations(TorchDispatchMode):
    """Counts the new storages by their number of elements."""

    def __init__(self) -> None:
        super().__init__()
        self.alive: list[Tensor] = []
        self.count: Counter[int] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        given = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        known = {t.untyped_storage().data_ptr() for t in (*self.alive, *given)}
        for t in tree_leaves(result):
            if isinstance(t, Tensor) and t.untyped_storage().data_ptr() not in known:
                self.alive.append(t)
                self.count[t.untyped_storage().nbytes() // t.element_size()] += 1
        return result


@pytest.mark.parametrize("gradient", ["plain", "stl", "dreg"])
def test_no_copy_for_each_sample(gradient: str) -> None:
    # sizes without a common product
    k, b, latent, hidden, pixels = 31, 11, 5, 13, 17
    model = VAE.mlp(data_shape=(pixels,), latent_dim=latent, hidden=(hidden,))
    encoded: list[torch.Size] = []
    model.encoder.register_forward_hook(lambda _, args, out: encoded.append(out.shape))
    x = torch.rand(b, pixels)
    with Allocations() as forward:
        loss = model(x, seed=SEED, objective="iwae", num_samples=k, gradient=gradient).loss
    with Allocations() as backward:
        loss.backward()
    assert encoded == [(b, 2 * latent)]
    # z; the logits, which become their own gradient; nothing like K copies of x, mu or logvar
    assert forward.count[k * b * latent] == 1
    assert forward.count[k * b * 2 * latent] == 0
    assert forward.count[k * b * pixels] == 1
    # dz, twice where it is weighted
    assert backward.count[k * b * latent] <= (2 if gradient == "dreg" else 1)
    assert backward.count[k * b * pixels] == 0


def encoder_gradients(model: VAE, x: Tensor, repeats: int, **options: Any) -> Tensor:
    """Independent estimates of d loss / d (mu, logvar) for one example x `[D]`, float64 `[repeats, 2 L]`."""
    out: list[Tensor] = []
    hook = model.encoder.register_forward_hook(lambda _, args, output: out.append(output))
    loss = model(x.expand(repeats, -1), seed=SEED, objective="iwae", **options).loss
    hook.remove()
    return repeats * torch.autograd.grad(loss, out[0])[0].double()


@pytest.mark.parametrize(("gradient", "num_samples"), [("stl", 1), ("dreg", 1), ("dreg", 5)])
def test_unbiased(gradient: str, num_samples: int) -> None:
    torch.manual_seed(1)
    model = VAE(nn.Linear(6, 4), nn.Linear(2, 6), GaussianLikelihood(shared_logvar=True), data_shape=(6,), latent_dim=2)
    x = torch.rand(6)
    repeats = 200_000
    plain = encoder_gradients(model, x, repeats, num_samples=num_samples)
    other = encoder_gradients(model, x, repeats, num_samples=num_samples, gradient=gradient)
    # the same noise, so the error is that of the difference
    difference = plain - other
    assert (difference.mean(0).abs() < 4.5 * difference.std(0) / repeats**0.5).all()
    assert (plain.mean(0).abs() > 20 * plain.std(0) / repeats**0.5).any()


def test_less_noise_on_a_trained_model() -> None:
    torch.manual_seed(0)
    data = load_dataset("digits").train.float() / 255.0
    model = VAE.mlp(data_shape=(64,), latent_dim=4, hidden=(32,))
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for step in range(250):
        x = torch.bernoulli(data[torch.randint(len(data), (100,))])
        loss = model(x, seed=torch.tensor([step]), objective="iwae", num_samples=5).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    noise = {
        (gradient, k): sum(
            encoder_gradients(model, x.round(), 500, num_samples=k, gradient=gradient).var(0).sum() for x in data[:10]
        )
        for gradient in ("plain", "stl", "dreg")
        for k in (1, 8)
    }
    for gradient, k in (("stl", 1), ("stl", 8), ("dreg", 8)):
        assert noise[gradient, k] < 0.7 * noise["plain", k], noise
    # the point of it (Rainforth et al. 2018): with more samples the noise of the sum of weights must not win
    assert noise["dreg", 8] < noise["stl", 8]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_samples": 0}, "num-samples is 0"),
        ({"gradient": "dreg"}, "--gradient dreg belongs to --objective iwae"),
        ({"objective": "iwae", "beta": 0.5}, "--beta belongs to --objective elbo"),
        ({"objective": "iwae", "free_bits": 0.1}, "--free-bits belongs to --objective elbo"),
        ({"objective": "iwae", "beta_warmup_steps": 5}, "--beta-warmup-steps belongs to --objective elbo"),
        ({"objective": "iwae", "kl_estimator": "monte-carlo"}, "--kl-estimator belongs to --objective elbo"),
        ({"kl_estimator": "monte-carlo", "free_bits": 0.1}, "--free-bits needs the KL of each dimension"),
    ],
)
def test_settings_without_meaning_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(FastvaeError, match=message):
        TrainConfig(**options)
    options.pop("beta_warmup_steps", None)
    if options != {"objective": "iwae"}:
        with pytest.raises(FastvaeError):
            MODELS["bernoulli"]()(torch.rand(B, 12), **options)


def test_an_unknown_objective_is_refused() -> None:
    with pytest.raises(FastvaeError, match="objective is 'vae', expected one of elbo, iwae"):
        MODELS["bernoulli"]()(torch.rand(B, 12), objective="vae")
