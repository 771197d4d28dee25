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
from ._rows import column_walk, sum_partials, sums_layout

__all__ = ["activation_bwd_", "hidden_bwd", "linear_bwd", "linear_fwd"]

_ACTIVATIONS = {"none": 0, "relu": 1, "tanh": 2}
_NARROW = 64
_NARROW_ROWS, _NARROW_COLS, _NARROW_DEPTH = 16, 64, 16
_RELU, _TANH = tl.constexpr(1), tl.constexpr(2)


@triton.jit
def _activation_grad(dy, y, ACTIVATION: tl.constexpr):
    return tl.where(y > 0.0, dy, 0.0) if ACTIVATION == _RELU else dy * (1.0 - y * y)


@triton.jit(do_not_specialize=["num_rows", "num_elements", "sum_stride", "tiles", "splits"])
def _activation_bwd_kernel(
    dy_ptr,  # [B, D]; becomes the gradient before the activation
    y_ptr,  # [B, D]
    column_sum_ptr,  # [groups, D]
    num_rows,
    num_elements,
    sum_stride,
    tiles,
    splits,
    WIDTH: tl.constexpr,
    SUM_WIDTH: tl.constexpr,
    ACTIVATION: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    """See `_rows` for the walk. `num_elements` counts units of WIDTH, `sum_stride` of SUM_WIDTH."""
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
    sum_row = column_sum_ptr + group * sum_stride * SUM_WIDTH
    tl.store(sum_row + col, tl.sum(column_sum, axis=0, keep_dims=True), col < D)


def activation_bwd_(
    dy: Tensor, y: Tensor, activation: str, column_sum: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """(`dy` as the gradient before the activation, its sums over the rows `[D]` float32); `[B, D]` and contiguous.

    With `column_sum` `[groups, D]`, a part of `ColumnSums`, partial sums go there and no sums are returned.
    """
    B, D = dy.shape
    width = vector_width(D, as_rows(dy))
    walk = column_walk(B, D, dy.element_size(), None if column_sum is None else len(column_sum))
    partial = torch.empty(walk.groups, D, dtype=torch.float32, device=dy.device) if column_sum is None else column_sum
    sum_stride, sum_width = sums_layout(partial)
    with device_guard(dy):
        _activation_bwd_kernel[grid_1d(walk.groups, walk.splits)](
            dy,
            y,
            partial,
            B,
            D // width,
            sum_stride,
            walk.tiles,
            walk.splits,
            WIDTH=width,
            SUM_WIDTH=sum_width,
            ACTIVATION=_ACTIVATIONS[activation],
            ROWS=walk.rows,
            COLS=walk.cols,
            num_warps=walk.warps,
        )
    return dy, sum_partials(partial)[0] if column_sum is None else None


@triton.jit(do_not_specialize=["num_rows", "num_elements", "sum_stride", "tiles", "splits"])
def _narrow_bwd_kernel(
    dy_ptr,  # [B, O]
    weight_ptr,  # [O, I]
    y_ptr,  # [B, I]
    dx_ptr,  # [B, I]
    column_sum_ptr,  # [groups, I]
    num_rows,
    num_elements,
    num_outputs,
    sum_stride,
    tiles,
    splits,
    WIDTH: tl.constexpr,
    SUM_WIDTH: tl.constexpr,
    ACTIVATION: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDEN: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    DEPTH: tl.constexpr,
):
    """A program owns a band of columns. `num_elements` counts units of WIDTH, `sum_stride` units of SUM_WIDTH."""
    width = num_elements * WIDTH
    group = (tl.program_id(0) // splits).to(tl.int64)
    col = (tl.program_id(0) % splits) * COLS + tl.arange(0, COLS)
    in_cols = col < width
    depth = tl.arange(0, DEPTH)
    column_sum = tl.zeros((ROWS, COLS), tl.float32)
    for tile in range(group * tiles, tl.minimum((group + 1) * tiles, tl.cdiv(num_rows, ROWS))):
        row = tile * ROWS + tl.arange(0, ROWS)[:, None]
        gradient = tl.zeros((ROWS, COLS), tl.float32)
        for first in range(0, num_outputs, DEPTH):
            o = first + depth
            in_depth = o < num_outputs
            # 0 beyond the width on both sides of the product
            dy = tl.load(dy_ptr + row * num_outputs + o[None, :], (row < num_rows) & in_depth[None, :], other=0.0)
            weight = tl.load(
                weight_ptr + o[:, None] * width + col[None, :], in_depth[:, None] & in_cols[None, :], other=0.0
            )
            if WIDEN:
                dy = dy.to(tl.float32)
                weight = weight.to(tl.float32)
            gradient = tl.dot(dy, weight, gradient, input_precision=PRECISION)
        mask = (row < num_rows) & in_cols[None, :]
        offset = row * width + col[None, :]
        if ACTIVATION != 0:
            gradient = _activation_grad(gradient, tl.load(y_ptr + offset, mask, other=0.0).to(tl.float32), ACTIVATION)
        tl.store(dx_ptr + offset, gradient.to(dx_ptr.dtype.element_ty), mask)
        column_sum += gradient
    sum_row = column_sum_ptr + group * sum_stride * SUM_WIDTH
    tl.store(sum_row + col[None, :], tl.sum(column_sum, axis=0, keep_dims=True), in_cols[None, :])


def _narrow_bwd(dy: Tensor, y: Tensor, weight: Tensor, activation: str, column_sum: Tensor) -> Tensor:
    num_outputs, num_inputs = weight.shape
    dx = torch.empty_like(y)
    width = vector_width(num_inputs, as_rows(dx))
    sum_stride, sum_width = sums_layout(column_sum)
    cols = max(16, min(_NARROW_COLS, triton.next_power_of_2(num_inputs)))
    splits, groups = triton.cdiv(num_inputs, cols), len(column_sum)
    with device_guard(dy):
        _narrow_bwd_kernel[grid_1d(groups, splits)](
            dy,
            weight,
            y,
            dx,
            column_sum,
            len(dy),
            num_inputs // width,
            num_outputs,
            sum_stride,
            triton.cdiv(triton.cdiv(len(dy), _NARROW_ROWS), groups),
            splits,
            WIDTH=width,
            SUM_WIDTH=sum_width,
            ACTIVATION=_ACTIVATIONS[activation],
            PRECISION="ieee" if torch.get_float32_matmul_precision() == "highest" else "tf32",
            # the interpreter multiplies the bits of bfloat16 as integers
            WIDEN=triton.knobs.runtime.interpret,
            ROWS=_NARROW_ROWS,
            COLS=cols,
            DEPTH=_NARROW_DEPTH,
            num_warps=4,
            num_stages=2,
        )
    return dx


def linear_fwd(x: Tensor, weight: Tensor, bias: Tensor, activation: str) -> Tensor:
    """activation(x W^T + b) `[B, O]`, for x `[B, I]`, weight `[O, I]`, bias `[O]`."""
    if activation == "relu":
        return torch._addmm_activation(bias, x, weight.t())
    y = torch.addmm(bias, x, weight.t())
    return y.tanh_() if activation == "tanh" else y


def linear_bwd(dy: Tensor, x: Tensor, weight: Tensor, needs_dx: bool, dweight: Tensor) -> Tensor | None:
    """dx `[B, I]`, if it is needed; the weight's gradient goes to `dweight` `[O, I]`, which may be wider."""
    if dweight.dtype == dy.dtype:
        torch.mm(dy.t(), x, out=dweight)
    elif torch._C._dispatch_has_kernel_for_dispatch_key("aten::mm.dtype_out", dy.device.type.upper()):
        torch.mm(dy.t(), x, out_dtype=dweight.dtype, out=dweight)
    else:
        torch.mm(dy.t().to(dweight.dtype), x.to(dweight.dtype), out=dweight)
    return dy @ weight if needs_dx else None


def hidden_bwd(dy: Tensor, y: Tensor, weight: Tensor, activation: str, dweight: Tensor, column_sum: Tensor) -> Tensor:
    """`linear_bwd` for y = activation(...), and then `activation_bwd_`: the gradient before the activation `[B, I]`.

    Its partial sums over the rows go to `column_sum` `[groups, I]`, a part of `ColumnSums`. Where dy has few columns,
    as at the latents, product and derivative are one: bound by memory, in which y and the gradient then pass once.
    """
    if dy.shape[1] <= _NARROW:
        linear_bwd(dy, y, weight, False, dweight)
        return _narrow_bwd(dy, y, weight, activation, column_sum)
    dx = linear_bwd(dy, y, weight, True, dweight)
    assert dx is not None
    return activation_bwd_(dx, y, activation, column_sum)[0]
