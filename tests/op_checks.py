"""Shared by the tests of the ops: backends, layouts, and the one statement of accuracy.

An op is right when its error against float64 is at most twice the error of eager PyTorch in the same dtype, plus one
unit in the last place of the output's dtype. Errors and units are those of the largest value of the tensor.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

BACKENDS = ["triton", "numba"]
_PACKAGES = {"triton": "fastvae_kernels", "numba": "fastvae_cpu_kernels"}

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"

if INTERPRETED:
    # triton's interpreter rounds the product of a fused multiply-add, which loses the very digits it is used to keep
    from triton.runtime import interpreter

    def _fused_multiply_add(self: Any, x: Any, y: Any, z: Any) -> Any:
        exact = x.data.astype(np.float64) * y.data + z.data
        return interpreter.TensorHandle(exact.astype(z.data.dtype), z.dtype.scalar)

    interpreter.InterpreterBuilder.create_fma = _fused_multiply_add


def load_backend(name: str) -> ModuleType:
    """The kernel package of a backend; skips the test where the package or its compiler is not installed."""
    return pytest.importorskip(_PACKAGES[name], exc_type=ImportError)


def device_of(backend: str) -> str:
    return "cpu" if backend == "numba" else DEVICE


def skip_unsupported(kernels: ModuleType, op: str, *tensors: Tensor) -> None:
    """Skip where the backend says that it does not take such tensors."""
    reason = kernels.supports(op, *tensors)
    if reason is not None:
        pytest.skip(reason)


def _poison(t: Tensor) -> float:
    return float("nan") if t.is_floating_point() else 1


def _sliced(t: Tensor) -> Tensor:
    """Columns 1 .. L of a wider tensor: rows far apart, and the first one misaligned."""
    wide = t.new_full((*t.shape[:-1], t.shape[-1] + 3), _poison(t))
    wide[..., 1:-2] = t
    return wide[..., 1:-2]


def _odd_offset(t: Tensor) -> Tensor:
    """The same contiguous values, one element into their storage: no vector access is aligned."""
    storage = t.new_full((t.numel() + 1,), _poison(t))
    storage[1:] = t.flatten()
    return storage[1:].view(t.shape)


def _transposed(t: Tensor) -> Tensor:
    return t.mT.contiguous().mT if t.ndim > 1 else t


def _expanded(t: Tensor) -> Tensor:
    """The first row for all rows, with stride 0: other values, so lay the inputs out before computing what is right."""
    return t[..., :1, :].expand(t.shape) if t.ndim > 1 else t


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda t: t,
    "sliced": _sliced,
    "transposed": _transposed,
    "expanded": _expanded,
    "odd_offset": _odd_offset,
}


def randn(
    *shape: int, seed: int, dtype: torch.dtype = torch.float32, device: str = DEVICE, scale: float = 1.0
) -> Tensor:
    """Normal test values that are the same on every device."""
    values = torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * scale
    return values.to(device, dtype)


def values_and_gradients(
    op: Callable[..., Tensor | tuple[Tensor, ...]],
    inputs: Sequence[Tensor],
    upstream: Sequence[Tensor | None],
    dtype: torch.dtype | None = None,
) -> tuple[list[Tensor], list[Tensor]]:
    """Outputs of `op(*inputs)` and gradients of its floating-point inputs, after widening these to `dtype` if given.

    `upstream` has one gradient per output; None where the output is not used.
    """
    leaves = [t.detach().to(dtype or t.dtype).requires_grad_() if t.is_floating_point() else t for t in inputs]
    outputs = op(*leaves)
    outputs = [outputs] if isinstance(outputs, Tensor) else list(outputs)
    used = [(y, g.to(y.dtype)) for y, g in zip(outputs, upstream, strict=True) if g is not None]
    wanted = [t for t in leaves if t.requires_grad]
    gradients = torch.autograd.grad([y for y, _ in used], wanted, [g for _, g in used], materialize_grads=True)
    return [y.detach() for y in outputs], list(gradients)


exact_values_and_gradients = functools.partial(values_and_gradients, dtype=torch.float64)


def unit_in_last_place(dtype: torch.dtype, magnitude: float) -> float:
    """The distance of two neighbours of `dtype` at `magnitude`."""
    info = torch.finfo(dtype)
    return info.eps * 2.0 ** torch.tensor(max(magnitude, info.tiny), dtype=torch.float64).log2().floor().item()


def assert_accurate(actual: Tensor, exact: Tensor, eager: Tensor, what: str = "", *, factor: float = 2.0) -> None:
    """The error of `actual` is at most `factor` times the error of `eager`, plus one unit in the last place."""
    assert actual.shape == exact.shape == eager.shape, f"{what}: shape {tuple(actual.shape)}, not {tuple(exact.shape)}"
    assert actual.dtype == eager.dtype, f"{what}: {actual.dtype}, not {eager.dtype}"
    if not actual.numel():
        return
    assert actual.isfinite().all(), f"{what}: {actual.isfinite().logical_not().sum()} values are not finite"
    error = (actual.double() - exact).abs().max().item()
    eager_error = (eager.double() - exact).abs().max().item()
    ulp = unit_in_last_place(actual.dtype, exact.abs().max().item())
    # triton's interpreter truncates float32 to bfloat16, where every compiled kernel rounds: half a unit more
    ulps = 2 if INTERPRETED and actual.dtype == torch.bfloat16 else 1
    allowed = factor * eager_error + ulps * ulp
    assert error <= allowed, f"{what}: error {error:.3g}, eager {eager_error:.3g}, unit {ulp:.3g} ({actual.dtype})"
