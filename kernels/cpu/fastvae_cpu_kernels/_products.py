"""The three products of a layer in `_gemm.py`, and which thread makes what.

    y = x W^T + b, cut at 0;   dW = dy^T x;   dx = dy W

Of T threads, the t-th has rows t O / T to (t + 1) O / T of a weight, of its gradient and of its moments (see
`adam.py`), which nobody else reads or writes: they stay in that core's cache. PyTorch's own products are read by all
threads, and to write a cache line that another core has read takes 8 ns even if both share their last cache.

The gradient of the input is a sum over the features, so that each thread makes a part of it. Source: the
column-parallel layer of Shoeybi et al. 2019, "Megatron-LM".
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ._gemm import COLUMNS, LANES, ROWS, available, product, transpose_block
from ._jit import kernel, loop
from ._layout import Plan
from ._math import ZERO
from ._pieces import store_piece
from ._pointers import f32_at, f32_scratch
from ._threads import run, team, worth_sharing

__all__ = ["layer_bwd", "layer_fwd", "parts_of"]

_NS_PER_MULTIPLY = 0.018
# fewer rows leave registers idle; beyond so many multiplications the matrices leave the caches; and a longer sum in one
# accumulator would lose digits that others keep
_LEAST_ROWS, _MOST_MULTIPLIES, _LONGEST_SUM = ROWS, 2**28, 4096


def parts_of(x: Tensor, weight: Tensor) -> int:
    """Among how many threads the products of x `[B, I]` and `weight` `[O, I]` are split; 0: they are not for here."""
    multiplies = len(x) * weight.numel()
    ours = (
        available()
        and len(x) >= _LEAST_ROWS
        and multiplies <= _MOST_MULTIPLIES
        and max(len(x), *weight.shape) <= _LONGEST_SUM
        and x.is_contiguous()
        and weight.is_contiguous()
        # float32 is all that there is here
        and torch.get_float32_matmul_precision() == "highest"
    )
    if not ours:
        return 0
    # a thread has whole vectors of features
    return min(team(), -(-len(weight) // LANES)) if worth_sharing(_NS_PER_MULTIPLY * multiplies) else 1


def _plan(parts: int) -> Plan:
    return Plan(torch.Size(()), 1, 1, 1, parts, 1, 1, parts)


@loop
def _finish_piece(y: Any, bias: Any, relu: bool, out: Any, count: int) -> None:
    for o in range(count):
        value = y[o] + bias[o]
        out[o] = ZERO if relu and value < ZERO else value


@kernel
def _fwd_kernel(
    first_part: int,
    last_part: int,
    x: int,  # float32 [B, I]
    weight: int,  # float32 [O, I]
    bias: int,  # float32 [O]
    y: int,  # float32 [B, O]
    panels: int,  # float32 [parts, I, 48]
    relu: int,
    B: int,
    inputs: int,
    outputs: int,
    parts: int,
) -> None:
    piece = f32_scratch(48)
    x_row, y_row, panel_row = 4 * inputs, 4 * outputs, 4 * COLUMNS
    for part in range(first_part, last_part):
        begin, end = part * outputs // parts, (part + 1) * outputs // parts
        panel = panels + part * inputs * panel_row
        for o in range(begin, end, COLUMNS):
            features = min(COLUMNS, end - o)
            for first in range(0, features, LANES):
                for i in range(0, inputs, LANES):
                    source, to = weight + (o + first) * x_row + 4 * i, panel + i * panel_row + 4 * first
                    rows, columns = min(LANES, features - first), min(LANES, inputs - i)
                    transpose_block(source, x_row, rows, columns, to, panel_row)
            product(x, x_row, 4, panel, panel_row, y + 4 * o, y_row, B, features, inputs)
            for b in range(B):
                at = f32_at(y + b * y_row + 4 * o)
                _finish_piece(at, f32_at(bias + 4 * o), relu != 0, piece, features)
                store_piece(piece, at, features)


@kernel
def _bwd_kernel(
    first_part: int,
    last_part: int,
    dy: int,  # float32 [B, O]
    x: int,  # float32 [B, I]
    weight: int,  # float32 [O, I]
    dweight: int,  # float32 [O, I]
    dx: int,  # float32 [parts, B, I], or 0
    B: int,
    inputs: int,
    outputs: int,
    parts: int,
) -> None:
    x_row, y_row = 4 * inputs, 4 * outputs
    for part in range(first_part, last_part):
        begin, end = part * outputs // parts, (part + 1) * outputs // parts
        mine, rows = dy + 4 * begin, begin * x_row
        product(mine, 4, y_row, x, x_row, dweight + rows, x_row, end - begin, inputs, B)
        if dx:
            product(mine, y_row, 4, weight + rows, x_row, dx + part * B * x_row, x_row, B, inputs, end - begin)


def layer_fwd(x: Tensor, weight: Tensor, bias: Tensor, relu: bool, parts: int) -> Tensor:
    """x W^T + b `[B, O]`, or where that is negative 0."""
    (B, inputs), outputs = x.shape, len(weight)
    y, panels = torch.empty(B, outputs), torch.empty(parts, inputs, COLUMNS)
    addresses = (tensor.data_ptr() for tensor in (x, weight, bias, y, panels))
    work = _NS_PER_MULTIPLY * B * weight.numel()
    run(_fwd_kernel, _plan(parts), work, *addresses, int(relu), B, inputs, outputs, parts)
    return y


def layer_bwd(dy: Tensor, x: Tensor, weight: Tensor, needs_dx: bool, dweight: Tensor, parts: int) -> Tensor | None:
    """dy^T x goes to `dweight`; what each part adds to dy W, `[parts, B, I]`, if it is needed. `dy` is contiguous."""
    (B, inputs), outputs = x.shape, len(weight)
    dx = torch.empty(parts, B, inputs) if needs_dx else None
    addresses = (tensor.data_ptr() for tensor in (dy, x, weight, dweight))
    work = (1 + needs_dx) * _NS_PER_MULTIPLY * B * weight.numel()
    run(_bwd_kernel, _plan(parts), work, *addresses, 0 if dx is None else dx.data_ptr(), B, inputs, outputs, parts)
    return dx
