"""Layers y = activation(x W^T + b): matrix products by PyTorch's BLAS, and one kernel for what lies between them.

    d pre-activation = dy where y > 0 (relu),   dy (1 - y^2) (tanh);   db = its sums over the rows

Bias and ReLU are in the product's epilogue. The gradient before the activation overwrites dy, and the same pass adds up
its columns for the bias, so that it is read once.
"""

# triton ships no types, and types jitted functions at launch
# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call, import-untyped"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._layout import as_rows, device_guard, grid_1d, vector_width
from ._rows import column_walk, sum_partials

__all__ = ["activation_bwd_", "linear_bwd", "linear_fwd"]

_ACTIVATIONS = {"none": 0, "relu": 1, "tanh": 2}
_RELU, _TANH = tl.constexpr(1), tl.constexpr(2)


@triton.jit
def _activation_grad(dy, y, ACTIVATION: tl.constexpr):
    return tl.where(y > 0.0, dy, 0.0) if ACTIVATION == _RELU else dy * (1.0 - y * y)


@triton.jit(do_not_specialize=["num_rows", "num_elements", "tiles", "splits"])
def _activation_bwd_kernel(
    dy_ptr,  # [B, D]; becomes the gradient before the activation
    y_ptr,  # [B, D]
    column_sum_ptr,  # [groups, D]
    num_rows,
    num_elements,
    tiles,
    splits,
    WIDTH: tl.constexpr,
    ACTIVATION: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    """See `_rows` for the walk. `num_elements` counts units of WIDTH."""
    D = num_elements * WIDTH
    group = (tl.program_id(0) // splits).to(tl.int64)
    col = (tl.program_id(0) % splits) * COLS + tl.arange(0, COLS)[None, :]
    column_sum = tl.zeros((ROWS, COLS), tl.float32)
    for tile in range(group * tiles, tl.minimum((group + 1) * tiles, tl.cdiv(num_rows, ROWS))):
        row = tile * ROWS + tl.arange(0, ROWS)[:, None]
        mask = (row < num_rows) & (col < D)
        offset = row * D + col
        gradient = tl.load(dy_ptr + offset, mask, other=0.0).to(tl.float32)
        if ACTIVATION != 0:
            y = tl.load(y_ptr + offset, mask, other=0.0).to(tl.float32)
            gradient = _activation_grad(gradient, y, ACTIVATION)
            tl.store(dy_ptr + offset, gradient.to(dy_ptr.dtype.element_ty), mask)
        column_sum += gradient
    tl.store(column_sum_ptr + group * D + col, tl.sum(column_sum, axis=0, keep_dims=True), col < D)


def activation_bwd_(dy: Tensor, y: Tensor, activation: str) -> tuple[Tensor, Tensor]:
    """(`dy` as the gradient before the activation, its sums over the rows `[D]` float32); `[B, D]` and contiguous."""
    B, D = dy.shape
    width = vector_width(D, as_rows(dy))
    walk = column_walk(B, D, dy.element_size())
    column_sum = torch.empty(walk.groups, D, dtype=torch.float32, device=dy.device)
    with device_guard(dy):
        _activation_bwd_kernel[grid_1d(walk.groups, walk.splits)](
            dy,
            y,
            column_sum,
            B,
            D // width,
            walk.tiles,
            walk.splits,
            WIDTH=width,
            ACTIVATION=_ACTIVATIONS[activation],
            ROWS=walk.rows,
            COLS=walk.cols,
            num_warps=walk.warps,
        )
    return dy, sum_partials(column_sum)[0]


def linear_fwd(x: Tensor, weight: Tensor, bias: Tensor, activation: str) -> Tensor:
    """activation(x W^T + b) `[B, O]`, for x `[B, I]`, weight `[O, I]`, bias `[O]`."""
    if activation == "relu":
        return torch._addmm_activation(bias, x, weight.t())
    y = torch.addmm(bias, x, weight.t())
    return y.tanh_() if activation == "tanh" else y


def linear_bwd(dy: Tensor, x: Tensor, weight: Tensor, needs_dx: bool, dweight: Tensor) -> Tensor | None:
    """The gradient `[B, I]` of x, if it is needed; that of the weight goes to `dweight` `[O, I]`."""
    torch.mm(dy.t(), x, out=dweight)
    return dy @ weight if needs_dx else None
