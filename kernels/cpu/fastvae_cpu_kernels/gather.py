"""Rows of a data set as a batch in [0, 1]: gathered, scaled, and binarised or dequantised, in one pass.

scale: x / 255 for bytes,   binarize: Bernoulli(x) draws of that,   dequantize: (x + u) / 256, u uniform in [0, 1)
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ._data import binarize_piece, data_kind, load_piece
from ._jit import kernel, routine
from ._layout import PIECE, plan
from ._philox import draw_uniforms
from ._pieces import store_piece
from ._pointers import Floats, f32_at, f32_scratch, i64_at, prefetch, u8_at
from ._record import launch
from ._threads import run

__all__ = ["gather_batch"]

_NS_PER_ELEMENT, _NS_PER_DRAW = 0.12, 0.5
SCALE, BINARIZE, DEQUANTIZE = range(3)
_TRANSFORMS = {"scale": SCALE, "binarize": BINARIZE, "dequantize": DEQUANTIZE}
STREAM_DEQUANTIZE = 2
# rows lie anywhere in memory: the processor is told of them a few rows before they are needed
AHEAD, PREFETCHED_BYTES = 6, 1024
TWO_TO_MINUS_8 = np.float32(2.0**-8)


@routine
def _dequantize_piece(row: int, first: int, count: int, seed: int, example: int, x: Floats) -> None:
    u = f32_scratch(512)
    draw_uniforms(u, first, count, seed, example, STREAM_DEQUANTIZE)
    data = u8_at(row + first)
    for d in range(count):
        x[d] = (np.float32(data[d]) + u[d]) * TWO_TO_MINUS_8


@kernel
def _gather_kernel(
    first_tile: int,
    last_tile: int,
    data: int,  # [N, D] of type kind, contiguous
    kind: int,
    row_bytes: int,
    index: int,  # int64 [B]
    index_bytes: int,
    out: int,  # float32 [B, D], contiguous
    invalid: int,  # int64 [1], set to 1 if an index is out of range
    transform: int,
    seed: int,  # int64 [1]
    N: int,
    K: int,  # 1
    B: int,
    D: int,
    across: int,
    height: int,
    width: int,
    example_offset: int,
) -> None:
    piece = f32_scratch(512)
    for tile in range(first_tile, last_tile):
        block, part = tile // across, tile % across
        end = min(D, (part + 1) * width)
        for b in range(block * height, min(B, (block + 1) * height)):
            n = i64_at(index + b * index_bytes)[0]
            if n < 0:
                n += N
            if n < 0 or n >= N:
                i64_at(invalid)[0] = np.int64(1)
                continue
            ahead = i64_at(index + min(b + AHEAD, B - 1) * index_bytes)[0]
            for line in range(0, min(row_bytes, PREFETCHED_BYTES), 64):
                prefetch(u8_at(data + row_bytes * ahead + line))
            row = data + row_bytes * n
            if transform == SCALE:
                d = part * width
                load_piece(row, kind, d, end - d, f32_at(out + 4 * (b * D + d)))
                continue
            for d in range(part * width, end, PIECE):
                count = min(PIECE, end - d)
                if transform == DEQUANTIZE:
                    _dequantize_piece(row, d, count, i64_at(seed)[0], b + example_offset, piece)
                else:
                    load_piece(row, kind, d, count, piece)
                    binarize_piece(piece, d, count, i64_at(seed)[0], b + example_offset)
                store_piece(piece, f32_at(out + 4 * (b * D + d)), count)


def gather_batch(
    data: Tensor,
    index: Tensor,
    transform: str,
    seed: Tensor | None,
    example_offset: int,
    dtype: torch.dtype,
) -> Tensor:
    """Rows `index` `[B]` int64 of contiguous `data` `[N, D]` (uint8; float32 but for dequantize), `[B, D]` of `dtype`.

    Raises:
        IndexError: an index is out of range. As in torch, negative ones count from the end.
    """
    N = data.shape[0]
    grid = plan(torch.Size((index.numel(), data.shape[1])))
    out = torch.empty(grid.B, grid.D, dtype=torch.float32)
    invalid = torch.empty(1, dtype=torch.int64).zero_()
    run(
        _gather_kernel,
        grid,
        (_NS_PER_ELEMENT if transform == "scale" else _NS_PER_DRAW) * grid.elements,
        data.data_ptr(),
        data_kind(data),
        data.stride(0) * data.element_size(),
        index.data_ptr(),
        index.stride(0) * 8,
        out.data_ptr(),
        invalid.data_ptr(),
        _TRANSFORMS[transform],
        0 if seed is None else seed.data_ptr(),
        N,
        *grid.sizes,
        example_offset,
    )
    launch(_check_index, invalid.numpy(), index, N)
    return out if dtype == torch.float32 else out.to(dtype)


def _check_index(invalid: NDArray[np.int64], index: Tensor, N: int) -> None:
    if invalid[0]:
        raise IndexError(f"expected indices into {N} examples, got {int(index.min())} to {int(index.max())}")
