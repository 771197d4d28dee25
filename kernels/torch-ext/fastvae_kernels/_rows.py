"""How a likelihood over R rows of D elements is cut into programs, and what sums the pieces they leave.

A program owns some tiles of rows and a part of the columns, in one of two ways. Without column sums it steps along its
one tile, so that a row's loss stays in registers; few long rows are split among several programs. With column sums it
keeps to one band of columns and steps through many tiles, so that the columns' sums stay in registers.

`sum_partials` adds what the programs left, in a fixed order: no atomics, and the same bits in every run. The sizes are
fixed rules of (R, D): a kernel bound by memory needs enough loads in flight, 16 elements per thread, and no autotuning.
"""

# triton ships no types, and types jitted functions at launch
# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call, import-untyped"

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._layout import Rows, as_rows, device_guard, grid_1d

_PROGRAMS = 512  # about four for each multiprocessor of the largest GPUs
_GROUPS = 64
_LONG = 16384  # elements of a row that may be split


class Walk(NamedTuple):
    """Tiles of `rows` x `cols`; each of `groups` groups of `tiles` tiles walks `splits` parts of `chunks` chunks.

    `tail` columns (a power of two, 0 for none) are left after the last whole chunk.
    """

    rows: int
    cols: int
    tail: int
    groups: int
    tiles: int
    splits: int
    chunks: int
    warps: int


def _floor_power_of_2(n: int) -> int:
    return 1 << (n.bit_length() - 1)


def row_walk(num_rows: int, num_elements: int, itemsize: int) -> Walk:
    """Along the rows, both numbers at least 1; `itemsize` is that of the predictions.

    The end of a row, narrower than `cols`, gets a tile of its own width: 784 = 3 * 256 + 16 wastes no lane.
    """
    # two 128-bit accesses of the predictions per thread
    tile = 4096 // itemsize if num_rows * num_elements >= _PROGRAMS * 2048 else 1024
    rows = min(tile // 256, _floor_power_of_2(max(1, num_rows // _PROGRAMS)))
    cols = max(4, min(tile // rows, _floor_power_of_2(num_elements)))
    # short rows: more of them in a tile
    rows = min(tile // cols, triton.next_power_of_2(num_rows))
    groups = triton.cdiv(num_rows, rows)
    whole, tail = divmod(num_elements, cols)
    # a second stage pays where few programs would have long rows
    splits = max(1, _PROGRAMS // groups) if num_elements >= _LONG else 1
    chunks = max(1, triton.cdiv(whole, splits))
    splits = max(1, triton.cdiv(whole, chunks))
    return Walk(rows, cols, max(4, triton.next_power_of_2(tail)) if tail else 0, groups, 1, splits, chunks, warps=4)


def column_walk(num_rows: int, num_elements: int, itemsize: int, groups: int | None = None) -> Walk:
    """Down the columns, in tiles that bring 32 bytes of predictions to each thread.

    No more programs than keep a GPU busy: about one for each multiprocessor of the largest, of 32-bit values two. P
    programs leave 4 (splits R + groups D) bytes of partial sums, at least 8 sqrt(P R D), to be read again.
    There are `groups` groups of rows if that is given; the last ones may then have nothing to do.
    """
    tile, width = 8192 // itemsize, max(4, triton.next_power_of_2(num_elements))
    rows = min(tile // min(128, width), triton.next_power_of_2(num_rows))
    # of few rows, more columns
    cols = min(tile // rows, width)
    splits, all_tiles = triton.cdiv(num_elements, cols), triton.cdiv(num_rows, rows)
    tiles = triton.cdiv(all_tiles, groups or triton.cdiv(64 * itemsize, splits))
    return Walk(rows, cols, 0, groups or triton.cdiv(all_tiles, tiles), tiles, splits, 1, warps=8)


def output_rows(out: Tensor) -> Rows:
    """`as_rows` of a tensor that a kernel writes, which must not be a copy."""
    rows = as_rows(out)
    assert rows.tensor is out or out.ndim < 2, "three strides must be able to walk an output"
    return rows


@triton.jit
def locate_rows(first, num_examples, ROWS: tl.constexpr, SAMPLES: tl.constexpr):
    """(row, k, b), each `[ROWS, 1]` int64, of the rows k * B + b from `first` (int64) on; k is 0 without SAMPLES."""
    i = tl.arange(0, ROWS)[:, None]
    if SAMPLES:
        # one 64-bit division per program; those per row are of 32 bits, and much cheaper
        k = first // num_examples
        b = (first - k * num_examples + i).to(tl.uint32)
        wrap = b // num_examples.to(tl.uint32)
        b -= wrap * num_examples.to(tl.uint32)
        return first + i, k + wrap, b.to(tl.int64)
    else:
        return first + i, tl.zeros((ROWS, 1), tl.int64), first + i


@triton.jit
def load_weight(weight_ptr, offset, num_rows, in_rows):
    """The weights `[ROWS, 1]` at `offset`, or those of a mean over the rows; 0 for what is beyond the last row."""
    if weight_ptr is None:
        return tl.where(in_rows, tl.div_rn(1.0, num_rows.to(tl.float32)), 0.0)
    else:
        return tl.load(weight_ptr + offset, in_rows, other=0.0)


@triton.jit
def _sum_columns(partial_ptr, out_ptr, block, height, width, HEIGHT: tl.constexpr, WIDTH: tl.constexpr):
    row = tl.arange(0, HEIGHT)[None, :].to(tl.int64)
    col = block * WIDTH + tl.arange(0, WIDTH)[:, None]
    total = tl.zeros((WIDTH, HEIGHT), tl.float32)
    for _ in range(0, height, HEIGHT):
        total += tl.load(partial_ptr + row * width + col, (row < height) & (col < width), other=0.0)
        row += HEIGHT
    tl.store(out_ptr + col, tl.sum(total, axis=1, keep_dims=True), col < width)


@triton.jit(do_not_specialize=["height", "width", "second_height", "second_width"])
def _sum_partials_kernel(
    partial_ptr,  # [height, width]
    out_ptr,  # [width]
    second_ptr,  # [second_height, second_width]
    second_out_ptr,  # [second_width]
    height,
    width,
    second_height,
    second_width,
    HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr,
):
    block = tl.program_id(0).to(tl.int64)
    blocks = tl.cdiv(width, WIDTH)
    if block < blocks:
        _sum_columns(partial_ptr, out_ptr, block, height, width, HEIGHT, WIDTH)
    elif second_ptr is not None:
        _sum_columns(second_ptr, second_out_ptr, block - blocks, second_height, second_width, HEIGHT, WIDTH)


def sum_partials(
    first: Tensor, second: Tensor | None = None, *, out: Tensor | None = None, second_out: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """The sums over dimension 0 of one or two contiguous float32 tensors `[height, ...]`, in one launch.

    A tensor of one row is its own sum, as a view, unless there is a place for it: `out`, `second_out`, contiguous.
    """
    if second_out is None and second is not None and len(second) == 1:
        return sum_partials(first, out=out)[0], second[0]
    if out is None and second_out is None and len(first) == 1:
        return first[0], None if second is None else sum_partials(second)[0]
    if out is None:
        out = torch.empty(first.shape[1:], dtype=torch.float32, device=first.device)
    if second is not None and second_out is None:
        second_out = torch.empty(second.shape[1:], dtype=torch.float32, device=first.device)
    height, width = first.shape[0], out.numel()
    second_height, second_width = (0, 0) if second is None else (second.shape[0], second[0].numel())
    block = 32
    grid = grid_1d(triton.cdiv(width, block) + triton.cdiv(second_width, block))
    with device_guard(first):
        _sum_partials_kernel[grid](
            first, out, second, second_out, height, width, second_height, second_width, HEIGHT=64, WIDTH=block
        )
    return out, second_out


class ColumnSums:
    """Where kernels leave the column sums of several matrices of `num_rows` rows, the gradients of biases.

    They write partial sums into `parts`, `[groups, D]` each and side by side in one buffer; `finish` adds them up, all
    in one launch.
    """

    def __init__(self, outs: Sequence[Tensor], num_rows: int) -> None:
        """`outs`: what the sums are written to, contiguous float32 `[D]` each."""
        self.outs = outs
        ends = list(itertools.accumulate(out.numel() for out in outs))
        starts = [0, *ends[:-1]]
        groups = max(1, min(_GROUPS, triton.cdiv(num_rows, 16)))
        self.partial = torch.empty(groups, ends[-1], dtype=torch.float32, device=outs[0].device)
        self.parts = [self.partial[:, start:end] for start, end in zip(starts, ends)]
        place = outs[0].untyped_storage().data_ptr(), outs[0].storage_offset()
        self.adjacent = all(
            (out.untyped_storage().data_ptr(), out.storage_offset() - start) == place
            for start, out in zip(starts, outs)
        )

    def finish(self, nll: Tensor) -> Tensor:
        """The sums `[B]` of partial losses `[splits, B]`; those of the columns go where they are wanted."""
        if self.adjacent:
            return sum_partials(nll, self.partial, second_out=self.outs[0].as_strided(self.partial.shape[1:], (1,)))[0]
        losses, sums = sum_partials(nll, self.partial)
        assert sums is not None
        torch._foreach_copy_(list(self.outs), [sums[p.storage_offset() :][: p.shape[1]] for p in self.parts])
        return losses


def sums_layout(column_sum: Tensor) -> tuple[int, int]:
    """(stride in units of the width, width) of partial sums `[groups, D]`, see `vector_width`."""
    width = math.gcd(16, column_sum.stride(0))
    return column_sum.stride(0) // width, width
