"""Matrix products of layers y = activation(x W^T + b), and what lies between them.

    d pre-activation = dy where y > 0 (relu),   dy (1 - y^2) (tanh);   db = its sums over the rows

The products are those of `_products.py`. On processors without its registers, and for what it does not take, they are
PyTorch's: oneDNN's where there are many weights, which adds the bias and cuts at zero as it writes, and those of its
BLAS where there are few, or the sum is over the rows.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ._jit import kernel, loop
from ._layout import PIECE, plan
from ._math import ONE, ZERO
from ._pieces import add_piece, store_piece
from ._pointers import f32_at, f32_scratch, f64_at
from ._products import NONE, RELU, TANH, layer_bwd, layer_fwd, split
from ._reduce import PartialSums
from ._threads import run

__all__ = ["activation_bwd_", "hidden_bwd", "linear_bwd", "linear_fwd"]

_NS_PER_ELEMENT = 0.3
_ACTIVATIONS = {"none": NONE, "relu": RELU, "tanh": TANH}
# below this many weights oneDNN's overhead of 20 microseconds shows
_LARGE = 65536


@loop
def _relu_piece(dy: Any, y: Any, out: Any, count: int) -> None:
    for i in range(count):
        out[i] = dy[i] if y[i] > ZERO else ZERO


@loop
def _tanh_piece(dy: Any, y: Any, out: Any, count: int) -> None:
    for i in range(count):
        out[i] = dy[i] * (ONE - y[i] * y[i])


@loop
def _sum_loop(piece: Any, more: Any, out: Any, count: int) -> None:
    for i in range(count):
        out[i] = piece[i] + more[i]


@kernel
def _activation_bwd_kernel(
    first_tile: int,
    last_tile: int,
    dy: int,  # float32 [parts, B, D], contiguous; the first becomes the gradient before the activation
    y: int,  # float32 [B, D], contiguous
    sums: int,  # float64 [tiles down, D]
    activation: int,
    parts: int,
    K: int,  # 1
    B: int,
    D: int,
    across: int,
    height: int,
    width: int,
) -> None:
    piece = f32_scratch(512)
    for tile in range(first_tile, last_tile):
        block, part = tile // across, tile % across
        end = min(D, (part + 1) * width)
        for b in range(block * height, min(B, (block + 1) * height)):
            for d in range(part * width, end, PIECE):
                count, at = min(PIECE, end - d), 4 * (b * D + d)
                for i in range(1, parts):
                    _sum_loop(f32_at(dy + at), f32_at(dy + at + 4 * i * B * D), piece, count)
                    store_piece(piece, f32_at(dy + at), count)
                if activation == NONE:
                    add_piece(f32_at(dy + at), f64_at(sums + 8 * (block * D + d)), count)
                else:
                    if activation == RELU:
                        _relu_piece(f32_at(dy + at), f32_at(y + at), piece, count)
                    else:
                        _tanh_piece(f32_at(dy + at), f32_at(y + at), piece, count)
                    store_piece(piece, f32_at(dy + at), count)
                    add_piece(piece, f64_at(sums + 8 * (block * D + d)), count)


def activation_bwd_(
    dy: Tensor, y: Tensor, activation: str, column_sum: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """(`dy` as the gradient before the activation, its sums over the rows `[D]`); both `[B, D]` and contiguous.

    `dy` may come in parts to be added, `[parts, B, D]`; the first of them is returned.

    With `column_sum` `[D]`, a part of `ColumnSums`, the sums go there and none are returned.
    """
    grid, parts = plan(y.shape), len(dy) if dy.ndim == 3 else 1
    sums = PartialSums(grid)
    run(
        _activation_bwd_kernel,
        grid,
        _NS_PER_ELEMENT * grid.elements,
        dy.data_ptr(),
        y.data_ptr(),
        sums.address,
        _ACTIVATIONS[activation],
        parts,
        *grid.sizes,
    )
    total = sums.per_column(column_sum)
    return dy[0] if dy.ndim == 3 else dy, total if column_sum is None else None


def _onednn(x: Tensor, weight: Tensor) -> bool:
    return weight.numel() >= _LARGE and x.shape[0] > 1 and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def linear_fwd(x: Tensor, weight: Tensor, bias: Tensor, activation: str) -> Tensor:
    """activation(x W^T + b) `[B, O]`, for x `[B, I]`, weight `[O, I]`, bias `[O]`."""
    y: Tensor
    if how := split(x, weight):
        return layer_fwd(x, weight, bias, _ACTIVATIONS[activation], how)
    if _onednn(x, weight):
        fused = "none" if activation == "tanh" else activation
        y = torch.ops.mkldnn._linear_pointwise(x, weight, bias, fused, [], "")
    else:
        y = torch.addmm(bias, x, weight.t())
        y = y.relu_() if activation == "relu" else y
    return y.tanh_() if activation == "tanh" else y


def _linear_bwd(dy: Tensor, x: Tensor, weight: Tensor, needs_dx: bool, dweight: Tensor | None) -> Tensor | None:
    """As `linear_bwd`, but the gradient of x may come in parts to be added, `[parts, B, I]`."""
    if how := split(x, weight):
        return layer_bwd(dy, x, weight, needs_dx, dweight, how)
    if dweight is not None:
        torch.mm(dy.t(), x, out=dweight)
    if not needs_dx:
        return None
    if _onednn(x, weight):
        dx: Tensor = torch.ops.mkldnn._linear_pointwise(dy, weight.t(), None, "none", [], "")
        return dx
    return dy @ weight


def linear_bwd(dy: Tensor, x: Tensor, weight: Tensor, needs_dx: bool, dweight: Tensor | None) -> Tensor | None:
    """The gradient `[B, I]` of x, if it is needed; that of the weight goes to `dweight` `[O, I]`, if there is one."""
    dx = _linear_bwd(dy, x, weight, needs_dx, dweight)
    if dx is None or dx.ndim == 2:
        return dx
    total, *others = dx
    for part in others:
        total += part
    return total


def hidden_bwd(dy: Tensor, y: Tensor, weight: Tensor, activation: str, dweight: Tensor, column_sum: Tensor) -> Tensor:
    """`linear_bwd` for y = activation(...), and then `activation_bwd_`: the gradient before the activation `[B, I]`.

    Its sums over the rows go to `column_sum` `[I]`, a part of `ColumnSums`.
    """
    dx = _linear_bwd(dy, y, weight, True, dweight)
    assert dx is not None
    return activation_bwd_(dx, y, activation, column_sum)[0]
