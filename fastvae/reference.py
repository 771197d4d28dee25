"""What every op must compute, in plain PyTorch: the specification on one page.

Nothing here is fast. Each function is differentiable any number of times, works under `torch.func`, on every device,
and in float32 or float64; the kernels in `kernels/` are tested against it, and `fastvae.functional` falls back to it.

Conventions, for all ops: the event is the last dimension, leading dimensions broadcast, losses are in nats, summed over
the event, one value per example, float32 (float64 for float64 inputs). Inputs in bfloat16 or float16 are widened first.

Source: Kingma & Welling, Auto-Encoding Variational Bayes, 2013 (https://arxiv.org/abs/1312.6114), called "the paper".
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

__all__ = [
    "begin_step",
    "bernoulli_nll",
    "binarize",
    "end_step",
    "gather_batch",
    "gaussian_nll",
    "kl_normal",
    "kl_per_dim",
    "kl_standard_normal",
    "normal_noise",
    "permutation",
    "philox_4x32",
    "reparameterize",
    "reparameterize_kl",
    "reparameterize_log_ratio",
    "shuffle_keys",
    "uniform_noise",
    "with_floor",
]

LOG_2PI = math.log(2.0 * math.pi)

# one stream per purpose, so that no two purposes ever share a random number
STREAM_NOISE, STREAM_BINARIZE, STREAM_DEQUANTIZE, STREAM_SHUFFLE, STREAM_PRIOR, STREAM_DATA = range(6)
STREAM_MOMENTUM, STREAM_ACCEPT = range(6, 8)

_MASK32 = 0xFFFFFFFF


def philox_4x32(counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
    """Philox4x32-10 (Salmon et al., Parallel random numbers: as easy as 1, 2, 3, 2011).

    `counter` and `key` are int64 tensors that hold 32-bit words and broadcast; returns the four words likewise.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        # a 64-bit product of two 32-bit words, wrapped to int64: the mask after the shift makes its high word unsigned
        p0, p1 = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        hi0, hi1 = (p0 >> 32) & _MASK32, (p1 >> 32) & _MASK32
        c0, c1, c2, c3 = hi1 ^ c1 ^ k0, p1 & _MASK32, hi0 ^ c3 ^ k1, p0 & _MASK32
        k0, k1 = (k0 + 0x9E3779B9) & _MASK32, (k1 + 0xBB67AE85) & _MASK32
    return c0, c1, c2, c3


def _words(seed: Tensor, stream: int, example: Tensor, sample: Tensor, num_elements: int) -> tuple[Tensor, ...]:
    """The words for elements 0, 4, 8, ... of each (example, sample): `[*leading, ceil(num_elements / 4)]` each."""
    quad = torch.arange((num_elements + 3) // 4, device=seed.device)
    example, sample = example.unsqueeze(-1), sample.unsqueeze(-1)
    counter = (quad, example & _MASK32, (example >> 32) & _MASK32, sample | (stream << 24))
    key = (seed & _MASK32, (seed >> 32) & _MASK32)
    return philox_4x32(counter, key)


def _example_and_sample(
    leading: tuple[int, ...], example_offset: int, sample_offset: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Counters of noise with leading shape `[B]` (sample 0), or `[K, B]`: K samples of each of B examples."""
    *samples, num_examples = leading or (1,)
    example = torch.arange(num_examples, device=device) + example_offset
    sample = torch.arange(math.prod(samples), device=device) + sample_offset
    example, sample = example.expand(*samples, num_examples), sample.view(*samples, 1)
    return example.reshape(leading), sample.expand(*samples, num_examples).reshape(leading)


def normal_noise(
    seed: Tensor,
    shape: tuple[int, ...],
    *,
    stream: int = STREAM_NOISE,
    example_offset: int = 0,
    sample_offset: int = 0,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Standard normal noise of `shape` `[B, L]` or `[K, B, L]`, by Box-Muller: two normals from each pair of words.

    `seed` is int64 `[1]`; element (k, b, l) depends on (seed, stream, b + example_offset, k + sample_offset, l) alone.
    """
    *leading, num_elements = shape
    counters = _example_and_sample(tuple(leading), example_offset, sample_offset, seed.device)
    w = [word.to(dtype) for word in _words(seed, stream, *counters, num_elements)]
    normals = []
    for radius_word, angle_word in ((w[0], w[1]), (w[2], w[3])):
        # (word + 1/2) / 2^32 lies in (0, 1], so the logarithm is finite
        radius = torch.sqrt(-2.0 * torch.log(radius_word * 2.0**-32 + 2.0**-33))
        angle = angle_word * (2.0 * math.pi * 2.0**-32)
        normals += [radius * torch.cos(angle), radius * torch.sin(angle)]
    return torch.stack(normals, dim=-1).flatten(-2)[..., :num_elements]


def uniform_noise(
    seed: Tensor, shape: tuple[int, ...], *, stream: int, example_offset: int = 0, sample_offset: int = 0
) -> Tensor:
    """Uniform noise in [0, 1), float32 on the grid of 2^-24, indexed as `normal_noise`; one word per element."""
    *leading, num_elements = shape
    counters = _example_and_sample(tuple(leading), example_offset, sample_offset, seed.device)
    words = _words(seed, stream, *counters, num_elements)
    uniforms = [(word >> 8).to(torch.float32) * 2.0**-24 for word in words]
    return torch.stack(uniforms, dim=-1).flatten(-2)[..., :num_elements]


def shuffle_keys(seed: Tensor, example: Tensor) -> Tensor:
    """62-bit Philox keys of examples, int64 `[N]` both: in the order of their keys, examples are shuffled."""
    high, low, _, _ = _words(seed, STREAM_SHUFFLE, example, torch.zeros_like(example), 1)
    return ((high >> 1) << 31 | low >> 1).squeeze(-1)


def permutation(seed: Tensor, num_examples: int) -> Tensor:
    """A random order of `num_examples` examples, int64 `[num_examples]`: equal keys, if any, in their own order."""
    return torch.argsort(shuffle_keys(seed, torch.arange(num_examples, device=seed.device)), stable=True)


def _unit_interval(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Data in [0, 1]: uint8 means x / 255, bool means 0 or 1, floating point is taken as it is."""
    return x.to(dtype) / 255.0 if x.dtype == torch.uint8 else x.to(dtype)


def binarize(x: Tensor, seed: Tensor, *, example_offset: int = 0) -> Tensor:
    """Bernoulli(x) draws in {0, 1}, float32, for `x` `[..., B, D]` in [0, 1] (uint8: x / 255).

    The draw is shared by the leading dimensions, if any: it depends on (seed, b + example_offset, d) alone.
    """
    u = uniform_noise(seed, tuple(x.shape[-2:]), stream=STREAM_BINARIZE, example_offset=example_offset)
    return (u < _unit_interval(x, torch.float32)).to(torch.float32)


def gather_batch(
    data: Tensor,
    index: Tensor,
    *,
    transform: str = "scale",
    seed: Tensor | None = None,
    example_offset: int = 0,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Rows `index` `[B]` of `data` `[N, D]` (uint8 or float32) as a batch `[B, D]` in [0, 1] of type `dtype`.

    `transform` is "scale" (uint8 / 255), "binarize" (Bernoulli draws of the scaled data), or "dequantize" (uint8 only:
    (x + u) / 256 with u uniform in [0, 1), which makes a density on 8-bit data a bound on its probability mass).
    """
    x = data[index]
    if transform == "binarize":
        assert seed is not None
        x = binarize(x, seed, example_offset=example_offset)
    elif transform == "dequantize":
        assert seed is not None
        u = uniform_noise(seed, tuple(x.shape), stream=STREAM_DEQUANTIZE, example_offset=example_offset)
        x = (x.to(torch.float32) + u) * 2.0**-8
    return _unit_interval(x, torch.float32).to(dtype)


def _widen(*tensors: Tensor) -> tuple[Tensor, ...]:
    dtype = torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32
    return tuple(t.to(dtype) for t in tensors)


def reparameterize(
    mu: Tensor,
    logvar: Tensor,
    seed: Tensor,
    *,
    num_samples: int | None = None,
    example_offset: int = 0,
    sample_offset: int = 0,
    stream: int = STREAM_NOISE,
) -> Tensor:
    """z = mu + exp(logvar / 2) * eps, eps ~ N(0, I): the paper's Section 2.4. `[B, L]`, or `[K, B, L]`."""
    dtype = mu.dtype
    mu, logvar = _widen(mu, logvar)
    mu, logvar = torch.broadcast_tensors(mu, logvar)
    shape = tuple(mu.shape) if num_samples is None else (num_samples, *mu.shape)
    offsets = {"example_offset": example_offset, "sample_offset": sample_offset}
    eps = normal_noise(seed, shape, stream=stream, dtype=mu.dtype, **offsets)
    return (mu + torch.exp(0.5 * logvar) * eps).to(dtype)


def kl_per_dim(mu: Tensor, logvar: Tensor) -> Tensor:
    """The terms of `kl_standard_normal`, `[..., L]`: what each latent dimension costs.

    `expm1` keeps the digits near the prior, where exp(logvar) - 1 - logvar cancels.
    """
    mu, logvar = _widen(mu, logvar)
    return 0.5 * (mu.square() + (torch.expm1(logvar) - logvar))


def kl_standard_normal(mu: Tensor, logvar: Tensor) -> Tensor:
    """KL(N(mu, exp(logvar)) || N(0, I)) = 1/2 sum_l [mu_l^2 + exp(logvar_l) - 1 - logvar_l]: the paper's Appendix B."""
    return kl_per_dim(mu, logvar).sum(-1)


def kl_normal(mu_q: Tensor, logvar_q: Tensor, mu_p: Tensor, logvar_p: Tensor) -> Tensor:
    """KL(N(mu_q, exp(logvar_q)) || N(mu_p, exp(logvar_p))), diagonal, `[..., L]` -> `[...]`.

    1/2 sum_l [(mu_q - mu_p)^2 exp(-logvar_p) + expm1(r) - r], r = logvar_q - logvar_p.
    """
    mu_q, logvar_q, mu_p, logvar_p = _widen(mu_q, logvar_q, mu_p, logvar_p)
    log_ratio = logvar_q - logvar_p
    squared = (mu_q - mu_p).square() * torch.exp(-logvar_p)
    return 0.5 * (squared + (torch.expm1(log_ratio) - log_ratio)).sum(-1)


def reparameterize_kl(
    mu: Tensor, logvar: Tensor, seed: Tensor, *, example_offset: int = 0, stream: int = STREAM_NOISE
) -> tuple[Tensor, Tensor]:
    """`reparameterize` and `kl_standard_normal` of the same posterior: the latent half of SGVB estimator B."""
    z = reparameterize(mu, logvar, seed, example_offset=example_offset, stream=stream)
    return z, kl_standard_normal(mu, logvar)


def reparameterize_log_ratio(
    mu: Tensor,
    logvar: Tensor,
    seed: Tensor,
    *,
    num_samples: int,
    sticking_the_landing: bool = False,
    example_offset: int = 0,
    sample_offset: int = 0,
) -> tuple[Tensor, Tensor]:
    """K samples `[K, B, L]` and log p(z) - log q(z|x) `[K, B]` = 1/2 sum_l [eps_l^2 + logvar_l - z_l^2].

    This is SGVB estimator A. `sticking_the_landing` drops the score term: log q is differentiated through z alone
    (Roeder et al., 2017).
    """
    dtype = mu.dtype
    mu, logvar = _widen(mu, logvar)
    offsets = {"example_offset": example_offset, "sample_offset": sample_offset}
    z = reparameterize(mu, logvar, seed, num_samples=num_samples, **offsets)
    mu_q, logvar_q = (mu.detach(), logvar.detach()) if sticking_the_landing else (mu, logvar)
    eps = (z - mu_q) * torch.exp(-0.5 * logvar_q)
    return z.to(dtype), 0.5 * (eps.square() + logvar_q - z.square()).sum(-1)


def bernoulli_nll(logits: Tensor, x: Tensor, *, binarize_seed: Tensor | None = None, example_offset: int = 0) -> Tensor:
    """-log p(x|z) = sum_d [softplus(l_d) - x_d l_d] for Bernoulli pixels with logits l: the paper's Appendix C.1.

    `logits [..., D]` against `x [..., D]` in [0, 1]; on grey levels it is a cross-entropy, not a likelihood. With
    `binarize_seed` int64 `[1]` the data is `binarize(x, binarize_seed)`.
    """
    (logits,) = _widen(logits)
    if binarize_seed is not None:
        x = binarize(x, binarize_seed, example_offset=example_offset)
    x = _unit_interval(x, logits.dtype)
    # softplus(l) without overflow, without the threshold of torch's own, and with the derivative 1/2 at 0
    softplus = -torch.nn.functional.logsigmoid(-logits)
    return (softplus - x * logits).sum(-1)


def with_floor(raw: Tensor, floor: float) -> Tensor:
    """floor + softplus(raw - floor): above the floor, and smooth."""
    return floor + torch.nn.functional.softplus(raw - floor)


def gaussian_nll(mu: Tensor, logvar: Tensor, x: Tensor, *, logvar_floor: float | None = None) -> Tensor:
    """-log N(x; mu, exp(logvar)) = 1/2 sum_d [log 2 pi + logvar_d + (x_d - mu_d)^2 exp(-logvar_d)]: Appendix C.2.

    `mu [..., D]`, `x [..., D]` (uint8: x / 255), `logvar` per element `[..., D]`, per feature `[D]`, or scalar `[]`;
    with a floor it is `with_floor` of what is given.
    """
    mu, logvar = _widen(mu, logvar)
    logvar = logvar if logvar_floor is None else with_floor(logvar, logvar_floor)
    x = _unit_interval(x, mu.dtype)
    return 0.5 * (LOG_2PI + logvar + (x - mu).square() * torch.exp(-logvar)).sum(-1)


def begin_step(
    step: Tensor,
    key: int,
    lr: Tensor,
    beta: Tensor,
    order: Tensor | None,
    batch_size: int,
    first: int,
    out: tuple[Tensor, Tensor, Tensor, Tensor],
    cast: tuple[Tensor, Tensor] | None = None,
) -> None:
    """What a training step reads from its counter `step` int64 `[1]`.

    `out` is the seed, `key` + step, int64 `[1]`; the learning rate float32 `[]` and (beta, 1 / B, beta / B) float32
    `[3]`, of the schedules `lr` and `beta` `[steps]`; and which examples are the batch, int64 `[B]`: B of `batch_size`,
    from the `first` on, in the epoch's `order` int64 `[N]`. Without an order the last stays as it is. `cast` is two
    tensors of one size, the first of which is copied into the second.
    """
    seed_out, lr_out, weights_out, index_out = out
    torch.add(step, key, out=seed_out)
    lr_out.copy_(lr.index_select(0, step).squeeze(0))
    beta_now, B = beta.index_select(0, step), len(index_out)
    weights_out.copy_(torch.cat((beta_now, torch.full_like(beta_now, 1.0 / B), beta_now * (1.0 / B))))
    if order is not None:
        start = step % (len(order) // batch_size) * batch_size + first
        index_out.copy_(order.index_select(0, start + torch.arange(B, device=step.device)))
    if cast is not None:
        cast[1].copy_(cast[0])


def end_step(step: Tensor, loss: Tensor | None, nll: Tensor, kl: Tensor, beta: Tensor, metrics: Tensor) -> None:
    """Writes (loss, mean nll, mean kl) to row `step` mod R of `metrics` float32 `[R, 3]`, and adds 1 to `step`.

    `nll` and `kl` are float32 `[B]`; without a `loss`, of one element, it is nll + `beta` `[1]` * kl.
    """
    nll_mean, kl_mean = nll.mean(), kl.mean()
    loss = nll_mean + beta.squeeze(0) * kl_mean if loss is None else loss.sum()
    row = torch.stack([loss, nll_mean, kl_mean])
    metrics.index_copy_(0, step % len(metrics), row.unsqueeze(0))
    step += 1
