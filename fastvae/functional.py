"""The public ops: checked, dispatched to the fastest kernels for their tensors, differentiable.

CUDA (ROCm, XPU) tensors go to the Triton kernels, CPU tensors to the Numba kernels, and whatever these do not take
(float64, MPS, `torch.func` transforms, forward-mode AD) to `fastvae.reference`. The environment variable
`FASTVAE_BACKEND=auto|triton|numba|reference` overrides the choice; `triton` sends CPU tensors to the Triton kernels,
for Triton's interpreter.

Conventions: the event is the last dimension; leading dimensions broadcast; losses are in nats, summed over the event,
one value per example, float32; the caller reduces. Predictions are float32, bfloat16, float16 or float64, gradients
come back in the same type. Data is floating point in [0, 1], bool, or uint8 (0..255 means x / 255).

Autocast: the ops take what they are given and compute in float32; losses are float32 in and out of autocast.

Randomness: noise is a pure function of (seed, example, sample, latent). The seed is drawn from `generator` (default:
torch's own, so `torch.manual_seed` is obeyed), or given as `seed`, int64 `[1]` on the tensors' device.
"""

from __future__ import annotations

import math
import os
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from fastvae import _autograd, _linear, _linear_nll, _one_pass, reference
from fastvae._checks import (
    check_num_samples,
    check_seed,
    data_like,
    draw_seed,
    parameters,
    predictions,
    row_weights,
    shapes,
)

__all__ = [
    "bernoulli_nll",
    "bernoulli_nll_loss",
    "gather_batch",
    "gaussian_nll",
    "gaussian_nll_loss",
    "iwae_bound",
    "kl_normal",
    "kl_standard_normal",
    "linear",
    "linear_bernoulli_nll",
    "linear_bernoulli_nll_loss",
    "linear_gaussian_nll",
    "linear_gaussian_nll_loss",
    "negative_elbo",
    "reparameterize",
    "reparameterize_kl",
    "reparameterize_log_ratio",
]

BACKENDS = ("auto", "triton", "numba", "reference")
_DEVICES = {"cuda": "triton", "xpu": "triton", "cpu": "numba"}


def _load(backend: str) -> tuple[Any, str]:
    """The kernel package of a backend, or None and why it cannot be imported."""
    # plain import statements, and no cache: torch.compile traces through here
    try:
        if backend == "triton":
            import fastvae_kernels as package
        else:
            import fastvae_cpu_kernels as package  # type: ignore[no-redef]
    except ImportError as error:
        return None, f"the {backend} kernels cannot be imported: {error}"
    return package, f"the {backend} kernels"


def kernel_package(device_type: str) -> tuple[Any, str]:
    """The kernel package for tensors of a device, or None for the reference; and the reason in words."""
    setting = os.environ.get("FASTVAE_BACKEND", "auto")
    if setting not in BACKENDS:
        raise ValueError(f"FASTVAE_BACKEND is {setting!r}, expected one of {', '.join(BACKENDS)}")
    backend = "triton" if setting == "triton" else _DEVICES.get(device_type)
    if setting == "reference" or (setting == "numba" and backend != "numba"):
        return None, f"FASTVAE_BACKEND={setting}"
    if backend is None:
        return None, f"no kernels for {device_type} tensors"
    return _load(backend)


def choose_backend(op: str, *tensors: Tensor) -> tuple[Any, str]:
    """The module whose kernels run `op` on these tensors, or None for the reference; and the reason in words."""
    device_type = tensors[0].device.type
    package, reason = kernel_package(device_type)
    if package is None:
        return None, reason
    if torch._C._are_functorch_transforms_active() or torch.autograd.forward_ad._current_level >= 0:
        return None, "function transforms and forward-mode AD need the differentiable reference"
    if refused := package.supports(op, *tensors):
        return None, refused
    as_operators = package.__name__ == "fastvae_cpu_kernels" and torch.compiler.is_compiling()
    for t in tensors:
        as_operators = as_operators or isinstance(t, FakeTensor)
    if as_operators:
        from fastvae import _library

        return _library, f"{package.__name__} as torch.library operators"
    return package, f"{device_type} tensors"


def _training_kernels(op: str, x: Tensor, *inputs: Tensor) -> Any:
    """The kernels for a one-pass loss, which makes the gradients of all inputs but the data, if any is wanted."""
    if x.requires_grad or not (torch.is_grad_enabled() and any(t.requires_grad for t in inputs)):
        return None
    return _kernels(op, *inputs, x)


def _kernels(op: str, *tensors: Tensor) -> Any:
    return choose_backend(op, *tensors)[0]


def reparameterize(
    mu: Tensor,
    logvar: Tensor,
    *,
    num_samples: int | None = None,
    generator: torch.Generator | None = None,
    seed: Tensor | None = None,
    example_offset: int = 0,
    sample_offset: int = 0,
    stream: int = reference.STREAM_NOISE,
) -> Tensor:
    """z = mu + exp(logvar / 2) * eps, eps ~ N(0, I).

    Args:
        mu: posterior means `[..., B, L]`.
        logvar: posterior log-variances, broadcastable against `mu`.
        num_samples: K for `[K, ..., B, L]`; None for one sample without a sample dimension.
        generator: where the seed is drawn from; default: torch's own.
        seed: the seed itself, int64 `[1]`.
        example_offset: global index of the first example, so that ranks draw what one device would have drawn.
        sample_offset: index of the first sample, so that chunks of K draw what one call would have drawn.
        stream: which of the seed's independent streams.

    Returns:
        z, in the dtype of the inputs.

    Raises:
        ValueError: wrong dtype, device, shape or seed.

    Source: Kingma & Welling 2013, Section 2.4.
    """
    mu, logvar = parameters(mu=mu, logvar=logvar)
    seed = draw_seed(seed, generator, mu.device)
    num_samples = None if num_samples is None else check_num_samples(num_samples)
    kernels = _kernels("reparameterize", mu, logvar)
    if kernels is not None:
        return _autograd.apply(
            _autograd.Reparameterize, kernels, mu, logvar, seed, (num_samples, example_offset, sample_offset, stream)
        )
    return reference.reparameterize(
        mu,
        logvar,
        seed,
        num_samples=num_samples,
        example_offset=example_offset,
        sample_offset=sample_offset,
        stream=stream,
    )


def kl_standard_normal(mu: Tensor, logvar: Tensor) -> Tensor:
    """KL(N(mu, exp(logvar)) || N(0, I)) = 1/2 sum_l [mu_l^2 + exp(logvar_l) - 1 - logvar_l], in nats.

    `mu`, `logvar` `[..., L]` -> `[...]` float32. Exact near the prior, where the usual form cancels.

    Raises ValueError for a wrong dtype, device or shape. Source: Kingma & Welling 2013, Appendix B.
    """
    mu, logvar = parameters(mu=mu, logvar=logvar)
    kernels = _kernels("kl_standard_normal", mu, logvar)
    if kernels is not None:
        return _autograd.apply(_autograd.KLStandardNormal, kernels, mu, logvar)
    return reference.kl_standard_normal(mu, logvar)


def kl_normal(mu_q: Tensor, logvar_q: Tensor, mu_p: Tensor, logvar_p: Tensor) -> Tensor:
    """KL(N(mu_q, exp(logvar_q)) || N(mu_p, exp(logvar_p))) between diagonal Gaussians, in nats.

    1/2 sum_l [(mu_q - mu_p)^2 exp(-logvar_p) + expm1(r) - r], r = logvar_q - logvar_p. All `[..., L]`, broadcast
    against each other -> `[...]` float32. Raises ValueError for a wrong dtype, device or shape.
    """
    args = parameters(mu_q=mu_q, logvar_q=logvar_q, mu_p=mu_p, logvar_p=logvar_p)
    kernels = _kernels("kl_normal", *args)
    if kernels is not None:
        return _autograd.apply(_autograd.KLNormal, kernels, *args)
    return reference.kl_normal(*args)


def reparameterize_kl(
    mu: Tensor,
    logvar: Tensor,
    *,
    generator: torch.Generator | None = None,
    seed: Tensor | None = None,
    example_offset: int = 0,
    stream: int = reference.STREAM_NOISE,
) -> tuple[Tensor, Tensor]:
    """`(reparameterize(mu, logvar), kl_standard_normal(mu, logvar))` from one read: SGVB estimator B's latent half.

    `mu`, `logvar` `[..., B, L]` -> z `[..., B, L]` in their dtype, kl `[..., B]` float32, nats. Arguments and errors as
    `reparameterize`. Source: Kingma & Welling 2013, Section 2.3, equation 7.
    """
    return _reparameterize_kl(mu, logvar, seed, generator, example_offset, stream, per_dim=False)


def reparameterize_kl_per_dim(
    mu: Tensor, logvar: Tensor, *, seed: Tensor, example_offset: int = 0, stream: int = reference.STREAM_NOISE
) -> tuple[Tensor, Tensor, Tensor]:
    """`reparameterize_kl` and, from the same pass, the KL of each latent dimension summed over the batch.

    The third result, `[L]` float32 in nats, is for diagnostics: no gradient flows through it.
    """
    return _reparameterize_kl(mu, logvar, seed, None, example_offset, stream, per_dim=True)


def _reparameterize_kl(
    mu: Tensor,
    logvar: Tensor,
    seed: Tensor | None,
    generator: torch.Generator | None,
    example_offset: int,
    stream: int,
    per_dim: bool,
) -> Any:
    mu, logvar = parameters(mu=mu, logvar=logvar)
    seed = draw_seed(seed, generator, mu.device)
    kernels = _kernels("reparameterize_kl", mu, logvar)
    if kernels is not None:
        return _autograd.apply(_autograd.ReparameterizeKL, kernels, mu, logvar, seed, example_offset, stream, per_dim)
    z, kl = reference.reparameterize_kl(mu, logvar, seed, example_offset=example_offset, stream=stream)
    if not per_dim:
        return z, kl
    return z, kl, reference.kl_per_dim(mu.detach(), logvar.detach()).flatten(0, -2).sum(0)


def reparameterize_log_ratio(
    mu: Tensor,
    logvar: Tensor,
    *,
    num_samples: int,
    sticking_the_landing: bool = False,
    generator: torch.Generator | None = None,
    seed: Tensor | None = None,
    example_offset: int = 0,
    sample_offset: int = 0,
) -> tuple[Tensor, Tensor]:
    """K samples and log p(z) - log q(z|x) of each = 1/2 sum_l [eps_l^2 + logvar_l - z_l^2]: SGVB estimator A, IWAE.

    `mu`, `logvar` `[..., B, L]`, read once -> z `[K, ..., B, L]` in their dtype, log_ratio `[K, ..., B]` float32, nats.
    With `sticking_the_landing` log q is differentiated through z alone (Roeder et al. 2017). Other arguments and errors
    as `reparameterize`. Source: Kingma & Welling 2013, equation 6; Burda et al. 2015, equation 8.
    """
    mu, logvar = parameters(mu=mu, logvar=logvar)
    seed = draw_seed(seed, generator, mu.device)
    num_samples = check_num_samples(num_samples)
    kernels = _kernels("reparameterize_log_ratio", mu, logvar)
    if kernels is not None:
        return _autograd.apply(
            _autograd.ReparameterizeLogRatio,
            kernels,
            mu,
            logvar,
            seed,
            num_samples,
            sticking_the_landing,
            example_offset,
            sample_offset,
        )
    return reference.reparameterize_log_ratio(
        mu,
        logvar,
        seed,
        num_samples=num_samples,
        sticking_the_landing=sticking_the_landing,
        example_offset=example_offset,
        sample_offset=sample_offset,
    )


def bernoulli_nll(logits: Tensor, x: Tensor, *, binarize_seed: Tensor | None = None, example_offset: int = 0) -> Tensor:
    """-log p(x|z) = sum_d [softplus(l_d) - x_d l_d] of Bernoulli pixels with logits l, in nats.

    Args:
        logits: `[..., D]`, for example `[K, B, D]`.
        x: data that broadcasts to `logits`, for example `[B, D]`; not copied. For x strictly between 0 and 1 this is a
            cross-entropy on grey levels, not a likelihood.
        binarize_seed: int64 `[1]`: use Bernoulli(x) draws in place of x, drawn in the kernel.
        example_offset: global index of the first example, for the draws.

    Returns:
        `[...]` float32 (float64 for float64 logits).

    Raises:
        ValueError: wrong dtype, device, shape or seed.

    Source: Kingma & Welling 2013, Appendix C.1.
    """
    (logits,) = predictions(logits=logits)
    x = data_like(x, logits)
    seed = None if binarize_seed is None else check_seed(binarize_seed, logits.device)
    # the kernels give no gradient for the data
    kernels = None if x.requires_grad else _kernels("bernoulli_nll", logits, x)
    if kernels is not None:
        return _autograd.apply(_autograd.BernoulliNLL, kernels, logits, x, seed, example_offset)
    return reference.bernoulli_nll(logits, x, binarize_seed=seed, example_offset=example_offset)


def gaussian_nll(mu: Tensor, logvar: Tensor, x: Tensor, *, logvar_floor: float | None = None) -> Tensor:
    """-log N(x; mu, exp(logvar)) = 1/2 sum_d [log 2 pi + logvar_d + (x_d - mu_d)^2 exp(-logvar_d)], in nats.

    Args:
        mu: `[..., D]`, for example `[K, B, D]`.
        logvar: per element (as `mu`), per feature `[D]`, or one for all `[]`.
        x: data that broadcasts to `mu`; not copied.
        logvar_floor: if given, `logvar` is raw, and the log-variance `logvar_floor + softplus(logvar - logvar_floor)`.

    Returns:
        `[...]` float32 (float64 for float64 predictions); the constant is included.

    Raises:
        ValueError: wrong dtype, device or shape.

    Source: Kingma & Welling 2013, Appendix C.2.
    """
    mu, logvar, x = _gaussian_args(mu, logvar, x)
    kernels = None if x.requires_grad else _kernels("gaussian_nll", mu, logvar, x)
    if kernels is not None:
        return _autograd.apply(_autograd.GaussianNLL, kernels, mu, logvar, x, logvar_floor)
    return reference.gaussian_nll(mu, logvar, x, logvar_floor=logvar_floor)


def _gaussian_args(mu: Tensor, logvar: Tensor, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    mu, logvar = predictions(mu=mu, logvar=logvar)
    # a shared log-variance keeps its shape: the kernels sum its gradient in the pass that makes it
    if not (logvar.ndim == 0 or (logvar.ndim == 1 and logvar.shape == mu.shape[-1:])):
        mu, logvar = parameters(mu=mu, logvar=logvar)
    return mu, logvar, data_like(x, mu)


def bernoulli_nll_loss(
    logits: Tensor,
    x: Tensor,
    *,
    weight: Tensor | None = None,
    binarize_seed: Tensor | None = None,
    example_offset: int = 0,
) -> tuple[Tensor, Tensor]:
    """`((weight * nll).sum(), nll)` with `nll = bernoulli_nll(logits, x)`, its gradient made in the same pass.

    `weight` broadcasts to `nll`, needs no gradient, and defaults to 1 / (number of rows), the mean. Only the first
    result is differentiable, and only once. Arguments and errors as `bernoulli_nll`.
    """
    (logits,) = predictions(logits=logits)
    x = data_like(x, logits)
    seed = None if binarize_seed is None else check_seed(binarize_seed, logits.device)
    row_weight = row_weights(weight, logits.shape[:-1], logits)
    kernels = _training_kernels("bernoulli_nll", x, logits)
    if kernels is not None:
        return _autograd.apply(_one_pass.BernoulliLoss, kernels, logits, x, row_weight, seed, example_offset)
    nll = bernoulli_nll(logits, x, binarize_seed=seed, example_offset=example_offset)
    return _one_pass.weighted_sum(nll, row_weight), nll.detach()


def gaussian_nll_loss(
    mu: Tensor, logvar: Tensor, x: Tensor, *, weight: Tensor | None = None, logvar_floor: float | None = None
) -> tuple[Tensor, Tensor]:
    """`((weight * nll).sum(), nll)` with `nll = gaussian_nll(mu, logvar, x)`, its gradients made in the same pass.

    `weight` as in `bernoulli_nll_loss`, the other arguments and errors as `gaussian_nll`.
    """
    mu, logvar, x = _gaussian_args(mu, logvar, x)
    row_weight = row_weights(weight, mu.shape[:-1], mu)
    kernels = _training_kernels("gaussian_nll", x, mu, logvar)
    if kernels is not None:
        return _autograd.apply(_one_pass.GaussianLoss, kernels, mu, logvar, x, row_weight, logvar_floor)
    nll = gaussian_nll(mu, logvar, x, logvar_floor=logvar_floor)
    return _one_pass.weighted_sum(nll, row_weight), nll.detach()


def linear_bernoulli_nll_loss(
    h: Tensor,
    weight: Tensor,
    bias: Tensor,
    x: Tensor,
    *,
    row_weight: Tensor | None = None,
    binarize_seed: Tensor | None = None,
    example_offset: int = 0,
) -> tuple[Tensor, Tensor]:
    """`bernoulli_nll_loss(F.linear(h, weight, bias), x)`: the output layer and its likelihood in one.

    The gradient overwrites the logits, so that one `[..., D]` buffer is all there is, and the bias gradient comes from
    the same pass. `h [..., H]`, `weight [D, H]`, `bias [D]`, `x` broadcastable to `[..., D]`, `row_weight` as `weight`
    of `bernoulli_nll_loss`. Returns (loss, nll `[...]`), errors as `bernoulli_nll`.
    """
    _check_layer(h, weight, bias)
    # under autocast the layer runs in a type of its own
    autocast = torch.is_autocast_enabled(h.device.type)
    kernels = None if autocast else _training_kernels("bernoulli_nll", x, h, weight, bias)
    if kernels is None:
        logits = torch.nn.functional.linear(h, weight, bias)
        return bernoulli_nll_loss(
            logits, x, weight=row_weight, binarize_seed=binarize_seed, example_offset=example_offset
        )
    seed = None if binarize_seed is None else check_seed(binarize_seed, h.device)
    x = data_like(x, h.new_empty(()).expand(*h.shape[:-1], weight.shape[0]))
    row_weight = row_weights(row_weight, h.shape[:-1], h)
    return _autograd.apply(_one_pass.LinearBernoulliLoss, kernels, h, weight, bias, x, row_weight, seed, example_offset)


def linear_gaussian_nll_loss(
    h: Tensor,
    weight: Tensor,
    bias: Tensor,
    x: Tensor,
    *,
    row_weight: Tensor | None = None,
    logvar_floor: float | None = None,
) -> tuple[Tensor, Tensor]:
    """`gaussian_nll_loss(mu, logvar, x)` of the two halves of `F.linear(h, weight, bias)`: layer and likelihood in one.

    The gradient overwrites the one `[..., 2 D]` buffer there is. `weight [2 D, H]`, `bias [2 D]` and `logvar_floor` as
    in `linear_gaussian_nll`, the rest as in `linear_bernoulli_nll_loss`.
    """
    _check_two_halves(h, weight, bias)
    autocast = torch.is_autocast_enabled(h.device.type)
    kernels = None if autocast else _training_kernels("gaussian_nll", x, h, weight, bias)
    if kernels is None:
        mu, logvar = torch.nn.functional.linear(h, weight, bias).chunk(2, dim=-1)
        return gaussian_nll_loss(mu, logvar, x, weight=row_weight, logvar_floor=logvar_floor)
    likelihood = _linear_nll.Gaussian(kernels, logvar_floor)
    x = data_like(x, h.new_empty(()).expand(*h.shape[:-1], weight.shape[0] // 2))
    row_weight = row_weights(row_weight, h.shape[:-1], h)
    return _autograd.apply(_one_pass.LinearGaussianLoss, likelihood, h, weight, bias, x, row_weight)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str = "none") -> Tensor:
    """activation(x W^T + b), by our own matrix products where there are faster ones: float32 on a CPU.

    `x [..., I]`, `weight [O, I]`, `bias [O]`, activation "none", "relu" or "tanh"; returns `[..., O]`, differentiable.
    PyTorch's products wherever ours would not be quicker (few multiplications, fewer than 8 rows), cannot be used
    (other types and devices, no AVX-512, no bias, autocast, torch.compile, `torch.func`), or where a lower precision
    than "highest" is allowed.

    Raises: ValueError for another activation; for shapes that do not fit, what PyTorch's function raises.
    """
    if activation not in ("none", "relu", "tanh"):
        raise ValueError(f"activation is {activation!r}, expected none, relu or tanh")
    kernels = None
    plain = not torch.compiler.is_compiling() and not torch.is_autocast_enabled(x.device.type)
    if plain and bias is not None and bias.shape == weight.shape[:1]:
        kernels = _kernels("linear", x, weight, bias)
    if bias is None or not hasattr(kernels, "linear_fwd"):
        return _linear.exact_linear(x, weight, bias, activation)
    if torch.is_grad_enabled() and any(t.requires_grad for t in (x, weight, bias)):
        return _autograd.apply(_linear.Linear, kernels, x, weight, bias, activation)
    return _linear.linear(kernels, x, weight, bias, activation)


def _check_layer(h: Tensor, weight: Tensor, bias: Tensor) -> None:
    fits = h.ndim >= 2 and weight.ndim == 2 and h.shape[-1] == weight.shape[1] and bias.shape == weight.shape[:1]
    if not fits or not h.device == weight.device == bias.device:
        raise ValueError(
            "expected h [..., H], weight [D, H], bias [D] on one device, got " + shapes(h=h, weight=weight, bias=bias)
        )


def _check_two_halves(h: Tensor, weight: Tensor, bias: Tensor) -> None:
    _check_layer(h, weight, bias)
    if len(bias) % 2:
        raise ValueError(f"expected weight [2 D, H] and bias [2 D], means and log-variances, got {shapes(bias=bias)}")


def linear_bernoulli_nll(h: Tensor, weight: Tensor, bias: Tensor, x: Tensor) -> Tensor:
    """`bernoulli_nll(F.linear(h, weight, bias), x)`, with the logits never stored: for samples by the thousand.

    Args:
        h: `[..., H]`, for example `[K, B, H]`.
        weight: `[D, H]`.
        bias: `[D]`.
        x: data that broadcasts to `[..., D]`; not copied.

    Returns:
        `[...]` float32. Differentiable for any upstream gradient. Of the logits 16 MiB exist at a time; to spare the
        backward a matrix product, a gradient of up to 64 MiB is kept for it. Matrix products run in h's dtype (under
        autocast in autocast's), float32 in the precision of `torch.set_float32_matmul_precision`.

    Raises:
        ValueError: wrong dtype, device or shape.
    """
    _check_layer(h, weight, bias)
    kernels = _layer_kernels("bernoulli_nll", h, weight, bias, x)
    if kernels is None:
        return bernoulli_nll(torch.nn.functional.linear(h, weight, bias), x)
    return _linear_nll_of(_linear_nll.Bernoulli(kernels), h, weight, bias, x, weight.shape[0])


def linear_gaussian_nll(
    h: Tensor, weight: Tensor, bias: Tensor, x: Tensor, *, logvar_floor: float | None = None
) -> Tensor:
    """`gaussian_nll(mu, logvar, x)` of the two halves of `F.linear(h, weight, bias)`, which is never stored.

    `weight [2 D, H]`, `bias [2 D]`, `logvar_floor` as in `gaussian_nll`; otherwise as `linear_bernoulli_nll`.
    """
    _check_two_halves(h, weight, bias)
    kernels = _layer_kernels("gaussian_nll", h, weight, bias, x)
    if kernels is None:
        mu, logvar = torch.nn.functional.linear(h, weight, bias).chunk(2, dim=-1)
        return gaussian_nll(mu, logvar, x, logvar_floor=logvar_floor)
    likelihood = _linear_nll.Gaussian(kernels, logvar_floor)
    return _linear_nll_of(likelihood, h, weight, bias, x, weight.shape[0] // 2)


def _layer_kernels(op: str, h: Tensor, weight: Tensor, bias: Tensor, x: Tensor) -> Any:
    """The kernels for an output layer, or None for the reference: no kernel gives a gradient for the data."""
    return None if x.requires_grad else _kernels(op, *_layer_in_one_dtype(h, weight, bias), x)


def _layer_in_one_dtype(h: Tensor, weight: Tensor, bias: Tensor) -> list[Tensor]:
    if torch.is_autocast_enabled(h.device.type):
        dtype = torch.get_autocast_dtype(h.device.type)
        return [h.to(dtype), weight.to(dtype), bias.to(dtype)]
    return predictions(h=h, weight=weight, bias=bias)


def _linear_nll_of(
    likelihood: _linear_nll.Likelihood, h: Tensor, weight: Tensor, bias: Tensor, x: Tensor, num_elements: int
) -> Tensor:
    leading = h.shape[:-1]
    x = data_like(x, h.new_empty(()).expand(*leading, num_elements))
    h, weight, bias = _layer_in_one_dtype(h, weight, bias)
    # a row per (sample, example): the data of [B, D] is every sample's, by a stride of 0
    h, x = (t.unsqueeze(0) if t.ndim == 2 else t.flatten(0, -3) for t in (h, x))
    if torch.is_grad_enabled() and any(t.requires_grad for t in (h, weight, bias)):
        nll = _autograd.apply(_linear_nll.LinearNLL, likelihood, h, weight, bias, x)
    else:
        nll = _linear_nll.forward(likelihood, h, weight, bias, x)
    return nll.reshape(leading)


def negative_elbo(nll: Tensor, kl: Tensor, *, beta: float | Tensor = 1.0) -> Tensor:
    """KL[q(z|x) || p(z)] - E_q[log p(x|z)], in nats, one value per example: what training minimises.

    Args:
        nll: -log p(x|z) `[B]`, or `[K, B]` for K samples, averaged.
        kl: `[B]`.
        beta: weight of the KL (Higgins et al. 2017); with any value but 1 the result is no bound.

    Source: Kingma & Welling 2013, equation 7. Raises ValueError for shapes that do not fit.
    """
    if nll.shape[nll.ndim - kl.ndim :] != kl.shape or nll.ndim not in (kl.ndim, kl.ndim + 1):
        raise ValueError(f"expected nll [B] or [K, B] and kl [B], got {shapes(nll=nll, kl=kl)}")
    return (nll.mean(0) if nll.ndim > kl.ndim else nll) + beta * kl


def iwae_bound(nll: Tensor, log_ratio: Tensor) -> Tensor:
    """log 1/K sum_k p(x|z_k) p(z_k) / q(z_k|x) `[B]` in nats: a lower bound of log p(x), tight as K grows.

    `nll` and `log_ratio` (of `reparameterize_log_ratio`) are `[K, B]`. Source: Burda et al. 2015, equation 8.
    Raises ValueError for shapes that do not fit.
    """
    if nll.shape != log_ratio.shape or nll.ndim < 1 or nll.shape[0] == 0:
        raise ValueError(f"expected nll and log_ratio [K, B] with K >= 1, got {shapes(nll=nll, log_ratio=log_ratio)}")
    return torch.logsumexp(log_ratio - nll, dim=0) - math.log(nll.shape[0])


def gather_batch(
    data: Tensor,
    index: Tensor,
    *,
    transform: str = "scale",
    seed: Tensor | None = None,
    example_offset: int = 0,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Rows `index` `[B]` of `data` `[N, D]` (uint8 or float32) as a training batch `[B, D]` in [0, 1] of type `dtype`.

    `transform`: "scale" (uint8 / 255), "binarize" (Bernoulli draws), or "dequantize" (uint8: (x + u) / 256, u uniform
    in [0, 1)); the latter two draw from `seed`. Raises ValueError for an unknown transform or wrong dtypes and shapes.
    """
    if transform not in ("scale", "binarize", "dequantize"):
        raise ValueError(f"unknown transform {transform!r}, expected scale, binarize or dequantize")
    if data.ndim != 2 or index.ndim != 1 or index.dtype != torch.int64 or data.device != index.device:
        raise ValueError(
            f"expected data [N, D] and an int64 index [B] on one device, got {shapes(data=data, index=index)}"
        )
    if data.dtype not in (torch.uint8, torch.float32) or (transform == "dequantize" and data.dtype != torch.uint8):
        raise ValueError(f"expected uint8 data (or float32, unless dequantized), got {shapes(data=data)}")
    if transform != "scale" and seed is None:
        raise ValueError(f"transform {transform!r} draws random numbers: expected a seed")
    seed = None if seed is None else check_seed(seed, data.device)
    kernels = _kernels("gather_batch", data)
    if kernels is not None:
        return kernels.gather_batch(data, index, transform, seed, example_offset, dtype)
    return reference.gather_batch(
        data, index, transform=transform, seed=seed, example_offset=example_offset, dtype=dtype
    )
