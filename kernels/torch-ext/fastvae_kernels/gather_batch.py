"""A batch of data in [0, 1] from rows of a data set: x[b] = transform(data[index[b]]).

    scale       data / 255 (float32 data as it is)
    binarize    1 where u < data / 255, else 0
    dequantize  (data + u) / 256, which makes a density on 8-bit data a bound on its probability mass

u is uniform in [0, 1), a pure function of (seed, b + example_offset, d). data `[N, D]` uint8 or float32, index int64
`[B]` in [0, N), x `[B, D]` float32, bfloat16 or float16.
"""

# triton ships no types, and types jitted functions at launch
# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call, import-untyped"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._data import binarize, unit_interval
from ._layout import as_rows, device_guard, grid_1d, vector_width
from ._philox import STREAM_DEQUANTIZE, load_key, uniform
from ._rows import row_walk

_TRANSFORMS = {"scale": 0, "binarize": 1, "dequantize": 2}
_BINARIZE, _DEQUANTIZE = tl.constexpr(1), tl.constexpr(2)


@triton.jit
def _step(
    data_row,  # pointers [ROWS, 1]
    x_row,  # pointers [ROWS, 1]
    first,
    D,
    in_rows,  # [ROWS, 1]
    example,  # [ROWS, 1]
    key_lo,
    key_hi,
    COLS: tl.constexpr,
    TRANSFORM: tl.constexpr,
    MASKED: tl.constexpr,
):
    col = first + tl.arange(0, COLS)[None, :]
    mask = in_rows & (col < D) if MASKED else in_rows
    data = tl.load(data_row + col, mask, other=0)
    if TRANSFORM == _DEQUANTIZE:
        u = uniform(first // 4 + tl.arange(0, COLS // 4)[None, :], example, 0, STREAM_DEQUANTIZE, key_lo, key_hi)
        x = (data.to(tl.float32) + u) * 0.00390625
    else:
        x = unit_interval(data, 255, True)
        if TRANSFORM == _BINARIZE:
            x = binarize(x, example, first, key_lo, key_hi)
    tl.store(x_row + col, x.to(x_row.dtype.element_ty), mask)


@triton.jit(do_not_specialize=["num_rows", "num_elements", "splits", "chunks", "example_offset"])
def _gather_batch_kernel(
    data_ptr,  # [N, D]
    index_ptr,  # [B]
    seed_ptr,  # [1], or None where nothing is random
    x_ptr,  # [B, D]
    num_rows,
    num_elements,
    splits,
    chunks,
    example_offset: tl.int64,
    WIDTH: tl.constexpr,
    TRANSFORM: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    TAIL: tl.constexpr,
):
    """See `_rows` for the walk. `num_elements` counts units of WIDTH."""
    D = num_elements * WIDTH
    split = tl.program_id(0) % splits
    row = (tl.program_id(0) // splits).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    in_rows = row < num_rows
    example = row + example_offset
    data_row = data_ptr + tl.load(index_ptr + row, in_rows, other=0) * D
    x_row = x_ptr + row * D
    key_lo = 0
    key_hi = 0
    if seed_ptr is not None:
        key_lo, key_hi = load_key(seed_ptr)
    whole = D // COLS
    for chunk in range(split * chunks, tl.minimum((split + 1) * chunks, whole)):
        _step(data_row, x_row, chunk * COLS, D, in_rows, example, key_lo, key_hi, COLS, TRANSFORM, False)
    if TAIL:  # noqa: SIM102  # known at compile time, the next one is not
        if split == splits - 1:
            _step(data_row, x_row, whole * COLS, D, in_rows, example, key_lo, key_hi, TAIL, TRANSFORM, True)


def gather_batch(
    data: Tensor,
    index: Tensor,
    transform: str,
    seed: Tensor | None,
    example_offset: int,
    dtype: torch.dtype,
) -> Tensor:
    """x `[B, D]` of `dtype`; `data` is contiguous and may have more than 2^31 elements; "scale" reads no seed."""
    (B,), D = index.shape, data.shape[1]
    x = torch.empty(B, D, dtype=dtype, device=data.device)
    if not x.numel():
        return x
    width = vector_width(D, as_rows(data))
    walk = row_walk(B, D, dtype.itemsize if transform == "scale" else 4)
    with device_guard(data):
        _gather_batch_kernel[grid_1d(walk.groups, walk.splits)](
            data,
            index.contiguous(),
            None if transform == "scale" else seed,
            x,
            B,
            D // width,
            walk.splits,
            walk.chunks,
            example_offset,
            WIDTH=width,
            TRANSFORM=_TRANSFORMS[transform],
            ROWS=walk.rows,
            COLS=walk.cols,
            TAIL=walk.tail,
            num_warps=walk.warps,
        )
    return x
