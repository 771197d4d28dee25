"""What a trained model is worth: the ELBO, the importance-sampled log-likelihood with its error, the units in use.

    log p(x) ~ log 1/K sum_k w_k,    w_k = p(x|z_k) p(z_k) / q(z_k|x),    z_k ~ q(z|x)

Source: Kingma & Welling 2013, equation 7; Burda, Grosse & Salakhutdinov 2015 (https://arxiv.org/abs/1509.00519),
equation 8 and Section 5.2. Everything is in nats per example unless it says bits.

Every random number is a function of (seed, index of the example, sample, element): results depend on the batch size and
the chunk only through the rounding of matrix products of another shape (about 1e-6 of the value in float32).
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from fastvae import functional as F
from fastvae.distributed import ALONE, Ranks
from fastvae.errors import FastvaeError
from fastvae.models import VAE
from fastvae.stream import HostRows

__all__ = ["Evaluation", "LogLikelihood", "active_units", "advice", "evaluate", "log_likelihood"]

ACTIVE_VARIANCE = 0.01
"""Var_x(E_q[z_l]) above which a latent dimension is active (Burda et al. 2015)."""

CHUNK_BYTES = 32 * 2**20
"""Size of the decoder's output that one pass of `log_likelihood` may make."""


@dataclass(frozen=True)
class Evaluation:
    """The numbers of one data set, means over its examples, as plain Python values (`dataclasses.asdict` is JSON)."""

    num_examples: int
    negative_elbo: float
    """nll + kl, an upper bound of -log p(x)."""
    nll: float
    """-log p(x|z) for one z ~ q(z|x) per example: the distortion."""
    kl: float
    """KL[q(z|x) || p(z)], in closed form: the rate."""
    bits_per_dim: float
    """negative_elbo / (D ln 2), and 8 = log2(256) more for dequantized data: see `evaluate`."""
    active_units: int
    """Number of latent dimensions in use: see `active_units`."""
    kl_per_dim: list[float]
    """The terms of `kl`, one for each latent dimension."""
    mu_variance_per_dim: list[float]
    """Var_x(E_q[z_l]), what makes a dimension active."""
    log_likelihood: float | None
    """Importance-sampled log p(x); None without `num_samples`."""
    log_likelihood_stderr: float | None
    """Monte Carlo error of `log_likelihood` on these very examples, sqrt(sum_i se_i^2) / N; None below two samples.

    It is not the spread over the examples: how far another test set's mean may lie is another, larger number."""
    effective_sample_size: float | None
    """Mean over the examples, from 1 (one sample has all the weight) to K (q is exact). While it is a few tens, the
    estimate is a lower bound that still rises with K by more than its standard error says."""
    num_samples: int | None
    """K, importance samples per example."""


class LogLikelihood(NamedTuple):
    """What `log_likelihood` returns, float64 `[B]` each."""

    value: Tensor
    """log 1/K sum_k w_k in nats: on average too low, by about stderr^2 / 2 if no few samples dominate."""
    stderr: Tensor
    """Standard error of `value` by the delta method, sd(w) / (sqrt(K) mean(w)); NaN for K = 1, and never above 1."""
    effective_sample_size: Tensor
    """(sum_k w_k)^2 / sum_k w_k^2, in [1, K]. While it is a few tens, the weights that were not drawn matter: the value
    still rises with K by more than `stderr` says."""


@contextlib.contextmanager
def _evaluation_mode(model: nn.Module) -> Iterator[None]:
    """No gradients and `model.eval()`, each module's own mode restored afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, training in modes:
            module.training = training


def evaluate(
    model: VAE,
    data: Tensor | HostRows,
    *,
    transform: str,
    seed: int,
    batch_size: int = 1000,
    num_samples: int | None = None,
    ranks: Ranks = ALONE,
) -> Evaluation:
    """The numbers of `model` on all of `data`; the host waits for the device once, at the end.

    Args:
        model: on any device, in any mode; left as it was.
        data: `[N, D]` uint8 (x / 255) or float32 in [0, 1], contiguous; moved in batches if on another device.
        transform: "scale", "binarize" or "dequantize", as in training (see `functional.gather_batch`).
        seed: decides the binarisation or dequantization and the noise, together with an example's place in `data`.
        batch_size: examples at a time; of no influence on the result (see the module's text).
        num_samples: K, also estimate log p(x) from K importance samples per example.
        ranks: those that call this together, with the same model and data: each takes its part of the examples.

    `bits_per_dim` is of the bound as the model states it. For binary data that is a code length. For a Gaussian
    likelihood it is of a density on [0, 1], which may be negative; dequantized data is (x + u) / 256 with u uniform in
    [0, 1), whose density p bounds the probability of the 8-bit values by -log2 P(x) <= E_u[-log2 p] + 8 D, so 8 bits
    are added and the result is a code length again. On grey levels under a Bernoulli likelihood it is neither.

    Raises: FastvaeError if there are no examples, or they do not fit the model; ValueError for an unknown transform.
    """
    if len(data) == 0 or batch_size < 1:
        raise FastvaeError(f"got {len(data)} examples and batch_size {batch_size}, expected 1 or more of each")
    device = next(model.parameters()).device
    key = torch.tensor([seed], device=device)
    row = torch.arange(min(batch_size, len(data)), device=device)
    # sums over the examples in float64: nll, kl, log p(x), its squared error, sample size; and three per dimension
    sums = torch.zeros(5, dtype=torch.float64, device=device)
    sums_per_dim = torch.zeros(3, model.latent_dim, dtype=torch.float64, device=device)
    with _evaluation_mode(model):
        first, last = ranks.part(len(data))
        for start in range(first, last, batch_size):
            batch = data[start : min(start + batch_size, last)].to(device)
            x = F.gather_batch(batch, row[: len(batch)], transform=transform, seed=key, example_offset=start)
            mu, logvar = model.encode(x)
            z, kl, kl_per_dim = F.reparameterize_kl_per_dim(mu, logvar, seed=key, example_offset=start)
            nll = model.nll(z, x)
            per_example = [nll.double(), kl.double()]
            if num_samples is not None:
                value, stderr, size = log_likelihood(model, x, num_samples=num_samples, seed=key, example_offset=start)
                per_example += [value, stderr.square(), size]
            sums[: len(per_example)] += torch.stack(per_example).sum(1)
            mu = mu.double()
            sums_per_dim += torch.stack([kl_per_dim.double(), mu.sum(0), mu.square().sum(0)])
    host = ranks.sum(torch.cat([sums, sums_per_dim.flatten()]).cpu())
    N = len(data)
    mean_nll, mean_kl, mean_value, _, mean_size = (host[:5] / N).tolist()
    kl_mean, mu_mean, mu_square_mean = (host[5:] / N).view(3, -1)
    mu_variance = mu_square_mean - mu_mean.square()
    negative_elbo = mean_nll + mean_kl
    return Evaluation(
        num_examples=N,
        negative_elbo=negative_elbo,
        nll=mean_nll,
        kl=mean_kl,
        bits_per_dim=negative_elbo / (data[0].numel() * math.log(2.0)) + (8.0 if transform == "dequantize" else 0.0),
        active_units=int((mu_variance > ACTIVE_VARIANCE).sum()),
        kl_per_dim=kl_mean.tolist(),
        mu_variance_per_dim=mu_variance.tolist(),
        log_likelihood=mean_value if num_samples else None,
        log_likelihood_stderr=math.sqrt(float(host[3])) / N if num_samples and num_samples > 1 else None,
        effective_sample_size=mean_size if num_samples else None,
        num_samples=num_samples,
    )


def log_likelihood(
    model: VAE, x: Tensor, *, num_samples: int, seed: Tensor, example_offset: int = 0, chunk: int | None = None
) -> LogLikelihood:
    """log p(x) of each example by importance sampling from q(z|x), in memory that does not grow with K.

    Args:
        model: left in the mode that it was in.
        x: `[B, D]`, as the model is to see it: scaled, binarised or dequantized. Encoded once, never copied.
        num_samples: K.
        seed: int64 `[1]` on the device of `x`.
        example_offset: global index of the first example.
        chunk: samples decoded at a time, of no influence on the result (see the module's text); by default as many as
            keep the decoder's output within 32 MiB.

    Raises: FastvaeError for `num_samples` or `chunk` below 1, or data that does not fit the model.

    Source: Burda et al. 2015, equation 8; the standard error is the delta method's, Var(log w) ~ Var(w) / w^2.
    """
    x = x.flatten(1)
    if chunk is None:
        bytes_per_sample = 4 * model.likelihood.outputs_per_element * x.numel()
        chunk = max(1, CHUNK_BYTES // max(1, bytes_per_sample))
    if num_samples < 1 or chunk < 1:
        raise FastvaeError(f"num_samples is {num_samples} and chunk {chunk}, expected 1 or more")
    with _evaluation_mode(model):
        mu, logvar = model.encode(x)
        # log w is `top + log(...)`, with sums of exp(log w - top) and its square; a finite start keeps inf - inf away
        top = x.new_full((len(x),), torch.finfo(torch.float64).min, dtype=torch.float64)
        total, total_square = torch.zeros_like(top), torch.zeros_like(top)
        for k in range(0, num_samples, chunk):
            z, log_ratio = F.reparameterize_log_ratio(
                mu,
                logvar,
                num_samples=min(chunk, num_samples - k),
                seed=seed,
                example_offset=example_offset,
                sample_offset=k,
            )
            log_w = log_ratio.double() - model.nll(z, x).double()
            above = torch.maximum(top, log_w.amax(0))
            shrink, w = torch.exp(top - above), torch.exp(log_w - above)
            total = total * shrink + w.sum(0)
            total_square = total_square * shrink.square() + w.square().sum(0)
            top = above
    effective_sample_size = total.square() / total_square
    # sd(w)^2 / mean(w)^2 with the unbiased variance is (K / ess - 1) K / (K - 1)
    relative_variance = (num_samples / effective_sample_size - 1.0).clamp_min(0.0)
    stderr = (relative_variance / (num_samples - 1)).sqrt() if num_samples > 1 else torch.full_like(top, math.nan)
    return LogLikelihood(top + torch.log(total / num_samples), stderr, effective_sample_size)


def active_units(mu: Tensor) -> Tensor:
    """Which latent dimensions carry information, bool `[L]`: Var_x(E_q[z_l]) > 0.01, for posterior means `[N, L]`.

    Source: Burda et al. 2015, Section 5.2.
    """
    return mu.double().var(0, correction=0) > ACTIVE_VARIANCE


def advice(evaluation: Evaluation) -> str | None:
    """One sentence on what to try if the posterior has collapsed onto the prior, in whole or for the most part."""
    active, latent_dim = evaluation.active_units, len(evaluation.kl_per_dim)
    # activity is a variance over the examples: one example has none
    if evaluation.num_examples == 1:
        return None
    if active == 0 or evaluation.kl < 0.1:
        return (
            f"the posterior has collapsed onto the prior (KL {evaluation.kl:.2g} nats, {active} of {latent_dim} latent "
            "dimensions active) and the decoder ignores z: let the KL weight rise from 0 (--beta-warmup-steps), leave "
            "some nats free (--free-bits 0.1), lower --beta, or check the learning rate"
        )
    if active < latent_dim / 4:
        return (
            f"only {active} of {latent_dim} latent dimensions are active: a smaller --latent-dim does as well, or let "
            "the KL weight rise from 0 (--beta-warmup-steps), or leave some nats free (--free-bits 0.1), to use more"
        )
    return None
