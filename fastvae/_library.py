"""The kernels as registered `torch.library` operators: for fake tensors, `torch.export`, and torch.compile on the CPU.

Each function here has the name and signature of a kernel function, so that an autograd Function cannot tell this module
from a kernel package; its operator `torch.ops.fastvae.*` runs the package of its tensors' device, and knows the shapes
it returns without running. Eager mode calls the kernels directly, which costs a quarter of the overhead.

An operator returns new tensors, where a kernel may write into `out`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastvae.functional import kernel_package


def _loss(prediction: Tensor) -> Tensor:
    return prediction.new_empty(prediction.shape[:-1], dtype=torch.float32)


def _like(tensor: Tensor) -> Tensor:
    return tensor.new_empty(tensor.shape)


def _samples(mu: Tensor, num_samples: int | None) -> Tensor:
    return _like(mu) if num_samples is None else mu.new_empty((num_samples, *mu.shape))


def _or_empty(wanted: bool, like: Tensor, *shape: int) -> Tensor:
    # an operator cannot return None: an empty tensor stands for it
    return like.new_empty(shape if wanted else (0,), dtype=torch.float32)


def _flat(result: Any, like: Tensor) -> Any:
    """A kernel's result as an operator may return it: one flat tuple of tensors, none of them None."""
    if isinstance(result, Tensor):
        return result
    flat: list[Tensor] = []
    for item in result:
        flat += (
            item if isinstance(item, tuple) else [like.new_empty((0,), dtype=torch.float32) if item is None else item]
        )
    return tuple(flat)


def _operator(schema: str, fake: Callable[..., Any]) -> Any:
    """Define `torch.ops.fastvae.NAME` and return it."""
    name, arguments = schema.split("(", 1)

    def real(*args: Any) -> Any:
        tensor = next(arg for arg in args if isinstance(arg, Tensor))
        package, reason = kernel_package(tensor.device.type)
        if package is None:
            raise RuntimeError(f"fastvae::{name} cannot run on {tensor.device}: {reason}")
        return _flat(getattr(package, name)(*args), tensor)

    torch.library.define(f"fastvae::{name}", f"({arguments}", tags=(torch.Tag.pt2_compliant_tag,))
    torch.library.impl(f"fastvae::{name}", ("cpu", "cuda", "xpu"), real)
    torch.library.register_fake(f"fastvae::{name}", fake)
    return getattr(torch.ops.fastvae, name)


reparameterize_fwd = _operator(
    "reparameterize_fwd(Tensor mu, Tensor logvar, Tensor seed, SymInt? num_samples, SymInt example_offset, "
    "SymInt sample_offset, int stream) -> Tensor",
    lambda mu, logvar, seed, num_samples, *_: _samples(mu, num_samples),
)
_reparameterize_bwd = _operator(
    "reparameterize_bwd(Tensor dz, Tensor logvar, Tensor seed, SymInt? num_samples, SymInt example_offset, "
    "SymInt sample_offset, int stream) -> (Tensor, Tensor)",
    lambda dz, logvar, seed, num_samples, *_: (
        _like(logvar) if num_samples is not None else logvar.new_empty((0,), dtype=torch.float32),
        _like(logvar),
    ),
)
kl_standard_normal_fwd = _operator(
    "kl_standard_normal_fwd(Tensor mu, Tensor logvar) -> Tensor", lambda mu, logvar: _loss(mu)
)
kl_standard_normal_bwd = _operator(
    "kl_standard_normal_bwd(Tensor dkl, Tensor mu, Tensor logvar) -> (Tensor, Tensor)",
    lambda dkl, mu, logvar: (_like(mu), _like(logvar)),
)
kl_normal_fwd = _operator(
    "kl_normal_fwd(Tensor mu_q, Tensor logvar_q, Tensor mu_p, Tensor logvar_p) -> Tensor", lambda mu_q, *_: _loss(mu_q)
)
kl_normal_bwd = _operator(
    "kl_normal_bwd(Tensor dkl, Tensor mu_q, Tensor logvar_q, Tensor mu_p, Tensor logvar_p) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
    lambda dkl, *inputs: tuple(map(_like, inputs)),
)
reparameterize_log_ratio_fwd = _operator(
    "reparameterize_log_ratio_fwd(Tensor mu, Tensor logvar, Tensor seed, SymInt num_samples, SymInt example_offset, "
    "SymInt sample_offset) -> (Tensor, Tensor)",
    lambda mu, logvar, seed, num_samples, *_: (_samples(mu, num_samples), _loss(_samples(mu, num_samples))),
)
reparameterize_log_ratio_bwd = _operator(
    "reparameterize_log_ratio_bwd(Tensor? dz, Tensor? dlog_ratio, Tensor mu, Tensor logvar, Tensor seed, "
    "SymInt num_samples, bool sticking_the_landing, SymInt example_offset, SymInt sample_offset) -> (Tensor, Tensor)",
    lambda dz, dlog_ratio, mu, logvar, *_: (_like(mu), _like(logvar)),
)
bernoulli_nll_fwd = _operator(
    "bernoulli_nll_fwd(Tensor logits, Tensor x, Tensor? binarize_seed, SymInt example_offset) -> Tensor",
    lambda logits, *_: _loss(logits),
)
bernoulli_nll_bwd = _operator(
    "bernoulli_nll_bwd(Tensor dnll, Tensor logits, Tensor x, Tensor? binarize_seed, SymInt example_offset) -> Tensor",
    lambda dnll, logits, *_: _like(logits),
)
linear_bernoulli_nll_fwd = _operator(
    "linear_bernoulli_nll_fwd(Tensor h, Tensor weight, Tensor bias, Tensor x) -> Tensor", lambda h, *_: _loss(h)
)
gaussian_nll_fwd = _operator(
    "gaussian_nll_fwd(Tensor mu, Tensor logvar, Tensor x, float? floor=None) -> Tensor", lambda mu, *_: _loss(mu)
)
gaussian_nll_bwd = _operator(
    "gaussian_nll_bwd(Tensor dnll, Tensor mu, Tensor logvar, Tensor x, float? floor=None) -> (Tensor, Tensor)",
    lambda dnll, mu, logvar, *_: (_like(mu), _like(logvar)),
)
gather_batch = _operator(
    "gather_batch(Tensor data, Tensor index, str transform, Tensor? seed, SymInt example_offset, ScalarType dtype) "
    "-> Tensor",
    lambda data, index, transform, seed, example_offset, dtype: data.new_empty(
        (*index.shape, data.shape[1]), dtype=dtype
    ),
)

_reparameterize_kl_fwd = _operator(
    "reparameterize_kl_fwd(Tensor mu, Tensor logvar, Tensor seed, SymInt example_offset, int stream, bool per_dim) "
    "-> (Tensor, Tensor, Tensor)",
    lambda mu, logvar, seed, example_offset, stream, per_dim: (
        _like(mu),
        _loss(mu),
        _or_empty(per_dim, mu, mu.shape[-1]),
    ),
)
_reparameterize_kl_bwd = _operator(
    "reparameterize_kl_bwd(Tensor? dz, Tensor? dkl, Tensor mu, Tensor logvar, Tensor seed, SymInt example_offset, "
    "int stream) -> (Tensor, Tensor)",
    lambda dz, dkl, mu, logvar, *_: (_like(mu), _like(logvar)),
)
_bernoulli_nll_with_grad = _operator(
    "bernoulli_nll_with_grad(Tensor logits, Tensor x, Tensor? row_weight, Tensor? binarize_seed, "
    "SymInt example_offset, bool column_sums) -> (Tensor, Tensor, Tensor)",
    lambda logits, x, row_weight, seed, example_offset, column_sums: (
        _loss(logits),
        _like(logits),
        _or_empty(column_sums, logits, logits.shape[-1]),
    ),
)
_gaussian_nll_with_grad = _operator(
    "gaussian_nll_with_grad(Tensor mu, Tensor logvar, Tensor x, Tensor? row_weight, bool column_sums, "
    "float? floor=None) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    lambda mu, logvar, x, row_weight, column_sums, floor=None: (
        _loss(mu),
        _like(mu),
        _like(logvar),
        *[_or_empty(column_sums, mu, mu.shape[-1]) for _ in range(2)],
    ),
)


def reparameterize_bwd(*args: Any) -> tuple[Tensor | None, Tensor]:
    dmu, dlogvar = _reparameterize_bwd(*args)
    return None if args[3] is None else dmu, dlogvar


def reparameterize_kl_fwd(*args: Any) -> tuple[Tensor, Tensor, Tensor | None]:
    z, kl, kl_per_dim = _reparameterize_kl_fwd(*args)
    return z, kl, kl_per_dim if args[-1] else None


def reparameterize_kl_bwd(*args: Any, out: Any = None) -> tuple[Tensor, Tensor]:
    return _reparameterize_kl_bwd(*args)


def bernoulli_nll_with_grad(*args: Any, out: Any = None) -> tuple[Tensor, Tensor, Tensor | None]:
    nll, dlogits, sums = _bernoulli_nll_with_grad(*args)
    return nll, dlogits, sums if args[-1] else None


def gaussian_nll_with_grad(*args: Any, out: Any = None, floor: float | None = None) -> tuple[Any, ...]:
    nll, dmu, dlogvar, *sums = _gaussian_nll_with_grad(*args, floor)
    return nll, dmu, dlogvar, tuple(sums) if args[-1] else None


def scale_(tensor: Tensor, scale: Tensor) -> Tensor:
    return tensor * scale.to(tensor.dtype)
