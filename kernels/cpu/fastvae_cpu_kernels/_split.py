"""Products of which every thread makes its own output features, step after step.

Of T threads, the t-th has rows t O / T to (t + 1) O / T of a weight, of its gradient and of its moments (see
`adam.py`), which nobody else reads or writes: they stay in that core's cache. PyTorch's own products are read by all
threads, and to write a cache line that another core has read takes 8 ns even if both share their last cache.

The gradient of the input is a sum over the features, so that each thread makes a part of it.

Source: the column-parallel layer of Shoeybi et al. 2019, "Megatron-LM".
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ._blas import Blas, blas, multiply
from ._jit import kernel, loop
from ._layout import PIECE, Plan
from ._math import ZERO
from ._pieces import store_piece
from ._pointers import f32_at, f32_scratch
from ._threads import run, team

__all__ = ["parts_of", "split_bwd", "split_fwd"]

_NS_PER_MULTIPLY = 0.02
# what smaller weights cost to share is less than to add up the parts of an input's gradient
_LEAST_WEIGHTS = 2**16
# beyond, oneDNN's faster arithmetic is worth more than what lies in whose cache
_MOST_MULTIPLIES = 2**26
_LEAST_FEATURES_OF_A_THREAD = 8


def parts_of(x: Tensor, weight: Tensor) -> int:
    """Among how many threads a product of x `[B, I]` and `weight` `[O, I]` is to be split; 1: not at all."""
    threads = team()
    split = (
        weight.numel() >= _LEAST_WEIGHTS
        and len(weight) >= threads * _LEAST_FEATURES_OF_A_THREAD
        and len(x) * weight.numel() <= _MOST_MULTIPLIES
        and x.is_contiguous()
        # the BLAS knows float32 only
        and torch.get_float32_matmul_precision() == "highest"
        and blas() is not None
    )
    return threads if split else 1


def _plan(parts: int) -> Plan:
    return Plan(torch.Size(()), 1, 1, 1, parts, 1, 1, parts)


@loop
def _bias_piece(y: Any, bias: Any, out: Any, relu: bool, count: int) -> None:
    for i in range(count):
        value = y[i] + bias[i]
        out[i] = ZERO if relu and value < ZERO else value


@kernel
def _fwd_kernel(
    first_part: int,
    last_part: int,
    blas: Blas,
    x: int,  # float32 [B, I]
    weight: int,  # float32 [O, I]
    bias: int,  # float32 [O]
    y: int,  # float32 [B, O]
    relu: int,
    B: int,
    inputs: int,
    outputs: int,
    parts: int,
) -> None:
    piece = f32_scratch(512)
    for part in range(first_part, last_part):
        begin, end = part * outputs // parts, (part + 1) * outputs // parts
        weights = weight + 4 * begin * inputs
        multiply(blas, True, False, end - begin, B, inputs, weights, inputs, x, inputs, y + 4 * begin, outputs)
        for b in range(B):
            for o in range(begin, end, PIECE):
                count, at = min(PIECE, end - o), y + 4 * (b * outputs + o)
                _bias_piece(f32_at(at), f32_at(bias + 4 * o), piece, relu != 0, count)
                store_piece(piece, f32_at(at), count)


@kernel
def _bwd_kernel(
    first_part: int,
    last_part: int,
    blas: Blas,
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
    for part in range(first_part, last_part):
        begin, end = part * outputs // parts, (part + 1) * outputs // parts
        count, rows, mine = end - begin, 4 * begin * inputs, dy + 4 * begin
        multiply(blas, False, True, inputs, count, B, x, inputs, mine, outputs, dweight + rows, inputs)
        if dx:
            out = dx + 4 * part * B * inputs
            multiply(blas, False, False, inputs, B, count, weight + rows, inputs, mine, outputs, out, inputs)


def split_fwd(x: Tensor, weight: Tensor, bias: Tensor, relu: bool, parts: int) -> Tensor:
    """x W^T + b `[B, O]`, or where that is negative 0."""
    (B, inputs), outputs = x.shape, len(weight)
    y = torch.empty(B, outputs)
    addresses = (blas(), *(tensor.data_ptr() for tensor in (x, weight, bias, y)))
    run(
        _fwd_kernel,
        _plan(parts),
        _NS_PER_MULTIPLY * B * weight.numel(),
        *addresses,
        int(relu),
        B,
        inputs,
        outputs,
        parts,
    )
    return y


def split_bwd(dy: Tensor, x: Tensor, weight: Tensor, needs_dx: bool, dweight: Tensor, parts: int) -> Tensor | None:
    """dy^T x goes to `dweight`; what each part adds to dy W, `[parts, B, I]`, if it is needed. `dy` is contiguous."""
    (B, inputs), outputs = x.shape, len(weight)
    dx = torch.empty(parts, B, inputs) if needs_dx else None
    addresses = (blas(), *(tensor.data_ptr() for tensor in (dy, x, weight, dweight)))
    work = (1 + needs_dx) * _NS_PER_MULTIPLY * B * weight.numel()
    run(_bwd_kernel, _plan(parts), work, *addresses, 0 if dx is None else dx.data_ptr(), B, inputs, outputs, parts)
    return dx
