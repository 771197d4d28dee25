"""Data of any accepted type as float32 in [0, 1], a piece of a row at a time."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from ._jit import loop, routine, term
from ._math import ONE, ZERO
from ._philox import draw_uniforms
from ._pointers import Floats, f32_at, f32_scratch, u8_at

__all__ = ["FLOAT", "binarize_piece", "data_kind", "load_piece", "piece_at"]

FLOAT, BYTE, BOOL = range(3)
_KINDS = {torch.float32: FLOAT, torch.uint8: BYTE, torch.bool: BOOL}
STREAM_BINARIZE = 1
# 1 / 255 = 257 / 2^16 + 1 / (255 * 2^16): a byte times the first is exact, and the sum is rounded as the division is
INV_255_HIGH, INV_255_LOW = np.float32(257 / 65536), np.float32(1 / (255 * 65536))


def data_kind(x: Tensor) -> int:
    """The type of data as a kernel argument: one compilation serves all."""
    return _KINDS[x.dtype]


@term
def _byte(value: Any) -> Any:
    """value / 255 for the integers 0 to 255, without a division."""
    return np.float32(value) * INV_255_HIGH + np.float32(value) * INV_255_LOW


@routine
def load_piece(row: int, kind: int, first: int, count: int, x: Floats) -> None:
    """`x[:count]` = elements `first` onwards of the row at address `row`; a byte means its value / 255."""
    if kind == FLOAT:
        floats = f32_at(row + 4 * first)
        for d in range(count):
            x[d] = floats[d]
    else:
        data = u8_at(row + first)
        if kind == BYTE:
            for d in range(count):
                x[d] = _byte(data[d])
        else:
            for d in range(count):
                x[d] = np.float32(data[d])


@loop
def piece_at(row: int, kind: int, first: int, count: int, scratch: Any) -> Any:
    """As `load_piece`, but where floats lie they are left; a pointer to the values."""
    if kind == FLOAT:
        return f32_at(row + 4 * first)
    load_piece(row, kind, first, count, scratch)
    return scratch


@routine
def binarize_piece(x: Floats, first: int, count: int, seed: int, example: int) -> None:
    """Replaces `x[:count]`, elements `first` (a multiple of 4) onwards of an example, by Bernoulli(x) draws."""
    u = f32_scratch(512)
    draw_uniforms(u, first, count, seed, example, STREAM_BINARIZE)
    for d in range(count):
        x[d] = ONE if u[d] < x[d] else ZERO
