"""The three products of a layer in `_gemm.py`, and which thread makes what.

    y = activation(x W^T + b);   dW = dy^T x;   dx = dy W

Of T threads, the t-th has an equal share of the rows of a weight, of its gradient and of its moments (see `adam.py`),
which nobody else reads or writes: they stay in that core's cache. PyTorch's own products are read by all threads, and
to write a cache line that another core has read takes 8 ns even if both share their last cache. The gradient of the
input is a sum over the features, so that each thread makes a part of it. Source: the column-parallel layer of Shoeybi
et al. 2019, "Megatron-LM".

In a large batch the weights are a small part of what is read. There y and dx are made in blocks of examples, and dW in
more parts than there are threads, so that a thread without a core holds up little.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ._gemm import COLUMNS, LANES, ROWS, available, product, transpose_block, width_of
from ._jit import kernel, loop, term
from ._layout import Plan
from ._math import ZERO, tanh
from ._pieces import store_piece
from ._pointers import f32_at, f32_scratch
from ._threads import run, team, worth_sharing

__all__ = ["NONE", "RELU", "TANH", "Split", "layer_bwd", "layer_fwd", "split"]

NONE, RELU, TANH = range(3)
_NS_PER_MULTIPLY = 0.018
# fewer rows leave registers idle
_LEAST_ROWS = ROWS
# a batch of so many examples for each thread is large; and how many parts of a weight's gradient a thread then has
_LARGE_BATCH, _PARTS_EACH = 256, 2


class Split(NamedTuple):
    """Who makes what of a layer's products."""

    features: int
    """In how many parts y is made, and dx, which is the sum of these."""
    examples: int
    """In how many blocks of rows."""
    weights: int
    """In how many parts dW is made."""


def split(x: Tensor, weight: Tensor) -> Split | None:
    """How the products of x `[B, I]` and weight `[O, I]` are split; None: they are not for here."""
    (B, outputs), multiplies = (len(x), len(weight)), len(x) * weight.numel()
    ours = (
        available()
        and len(x) >= _LEAST_ROWS
        and x.is_contiguous()
        and weight.is_contiguous()
        # float32 is all that there is here
        and torch.get_float32_matmul_precision() == "highest"
    )
    if not ours:
        return None
    threads = team() if worth_sharing(_NS_PER_MULTIPLY * multiplies) else 1
    most, rounds = -(-outputs // ROWS), B // (_LARGE_BATCH * threads)
    if rounds == 0:
        return Split(min(threads, most), 1, min(threads, most))
    return Split(1, threads * rounds, min(threads if threads == 1 else threads * _PARTS_EACH, most))


def _plan(tiles: int) -> Plan:
    return Plan(torch.Size(()), 1, 1, 1, tiles, 1, 1, tiles)


@term
def _share(part: int, parts: int, whole: int) -> int:
    """Where a part begins: parts are whole tiles high."""
    return min(whole, ROWS * (part * -(-whole // ROWS) // parts))


@loop
def _finish_piece(y: Any, bias: Any, relu: bool, out: Any, count: int) -> None:
    for o in range(count):
        value = y[o] + bias[o]
        out[o] = ZERO if relu and value < ZERO else value


@loop
def _finish_tanh_piece(y: Any, bias: Any, out: Any, count: int) -> None:
    for o in range(count):
        out[o] = tanh(y[o] + bias[o])


@kernel
def _fwd_kernel(
    first_tile: int,
    last_tile: int,
    x: int,  # float32 [B, I]
    weight: int,  # float32 [O, I]
    bias: int,  # float32 [O]
    y: int,  # float32 [B, O]
    panels: int,  # float32 [tiles, I, 48]
    activation: int,
    B: int,
    inputs: int,
    outputs: int,
    parts: int,
    blocks: int,
) -> None:
    piece = f32_scratch(48)
    x_row, y_row, panel_row = 4 * inputs, 4 * outputs, 4 * COLUMNS
    for tile in range(first_tile, last_tile):
        block, part, panel = tile // parts, tile % parts, panels + tile * inputs * panel_row
        top, bottom = _share(block, blocks, B), _share(block + 1, blocks, B)
        begin, end = _share(part, parts, outputs), _share(part + 1, parts, outputs)
        o = begin
        while o < end:
            features = width_of(end - o)
            for first in range(0, features, LANES):
                for i in range(0, inputs, LANES):
                    source, to = weight + (o + first) * x_row + 4 * i, panel + i * panel_row + 4 * first
                    rows, columns = min(LANES, features - first), min(LANES, inputs - i)
                    transpose_block(source, x_row, rows, columns, to, panel_row)
            here = y + top * y_row + 4 * o
            product(x + top * x_row, x_row, 4, panel, panel_row, here, y_row, bottom - top, features, inputs)
            for b in range(bottom - top):
                at = f32_at(here + b * y_row)
                if activation == TANH:
                    _finish_tanh_piece(at, f32_at(bias + 4 * o), piece, features)
                else:
                    _finish_piece(at, f32_at(bias + 4 * o), activation == RELU, piece, features)
                store_piece(piece, at, features)
            o += features


@kernel
def _bwd_kernel(
    first_part: int,
    last_part: int,
    dy: int,  # float32 [B, O]
    x: int,  # float32 [B, I]
    weight: int,  # float32 [O, I]
    dweight: int,  # float32 [O, I], or 0
    dx: int,  # float32 [parts, B, I], or 0
    B: int,
    inputs: int,
    outputs: int,
    parts: int,
) -> None:
    x_row, y_row = 4 * inputs, 4 * outputs
    for part in range(first_part, last_part):
        begin, end = _share(part, parts, outputs), _share(part + 1, parts, outputs)
        mine, rows = dy + 4 * begin, begin * x_row
        if dweight:
            product(mine, 4, y_row, x, x_row, dweight + rows, x_row, end - begin, inputs, B)
        if dx:
            product(mine, y_row, 4, weight + rows, x_row, dx + part * B * x_row, x_row, B, inputs, end - begin)


@kernel
def _dx_kernel(
    first_block: int,
    last_block: int,
    dy: int,  # float32 [B, O]
    weight: int,  # float32 [O, I]
    dx: int,  # float32 [B, I]
    B: int,
    inputs: int,
    outputs: int,
    blocks: int,
) -> None:
    x_row, y_row = 4 * inputs, 4 * outputs
    for block in range(first_block, last_block):
        top, bottom = _share(block, blocks, B), _share(block + 1, blocks, B)
        product(dy + top * y_row, y_row, 4, weight, x_row, dx + top * x_row, x_row, bottom - top, inputs, outputs)


def layer_fwd(x: Tensor, weight: Tensor, bias: Tensor, activation: int, how: Split) -> Tensor:
    """activation(x W^T + b) `[B, O]`."""
    (B, inputs), outputs, tiles = x.shape, len(weight), how.features * how.examples
    y, panels = torch.empty(B, outputs), torch.empty(tiles, inputs, COLUMNS)
    addresses = (tensor.data_ptr() for tensor in (x, weight, bias, y, panels))
    work = _NS_PER_MULTIPLY * B * weight.numel()
    run(_fwd_kernel, _plan(tiles), work, *addresses, activation, B, inputs, outputs, how.features, how.examples)
    return y


def layer_bwd(
    dy: Tensor, x: Tensor, weight: Tensor, needs_dx: bool, dweight: Tensor | None, how: Split
) -> Tensor | None:
    """dy^T x goes to `dweight`, if there is one; what each part adds to dy W, `[parts, B, I]`, if it is needed.

    `dy` is contiguous.
    """
    (B, inputs), outputs = x.shape, len(weight)
    dx = torch.empty(how.features, B, inputs) if needs_dx else None
    dx_at, dweight_at = (0 if tensor is None else tensor.data_ptr() for tensor in (dx, dweight))
    work, apart = _NS_PER_MULTIPLY * B * weight.numel(), how.examples > 1
    both = (bool(dweight_at) + (bool(dx_at) and not apart)) * work
    given, sizes = (dy.data_ptr(), x.data_ptr(), weight.data_ptr()), (B, inputs, outputs)
    if both:
        run(_bwd_kernel, _plan(how.weights), both, *given, dweight_at, 0 if apart else dx_at, *sizes, how.weights)
    if apart and dx_at:
        run(_dx_kernel, _plan(how.examples), work, given[0], given[2], dx_at, *sizes, how.examples)
    return dx
