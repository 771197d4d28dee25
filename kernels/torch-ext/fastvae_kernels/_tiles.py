"""How the latent ops cut R rows of L elements into programs, and the loads and stores of one tile.

A tile is ROWS x COLS, powers of two, 16 elements per thread where there are enough of them to fill a GPU, else one
128-bit access per thread. The sizes are fixed rules of (R, L): autotuning would launch kernels during graph capture.
"""

# triton ships no types, and types jitted functions at launch
# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call, import-untyped"

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl

_TILE = 2048  # elements: 16 for each of the 128 threads of a program
_SMALL_TILE = 1024
_FULL = 128 * _TILE  # elements that keep about one program on each multiprocessor of the largest GPUs
_PROGRAMS = 512
_BAND = 128  # columns of a tile that sums down its columns: whole 512-byte stretches of a row


class Tiles(NamedTuple):
    """Program (group, split) walks `tiles` tiles of rows, times `chunks` tiles of columns."""

    rows: int
    cols: int
    groups: int
    tiles: int
    splits: int
    chunks: int


def _tile_size(num_rows: int, num_elements: int) -> int:
    return _TILE if num_rows * num_elements >= _FULL else _SMALL_TILE


def whole_rows(num_rows: int, num_elements: int) -> Tiles:
    """For sums along the rows: a program keeps to one tile of rows and walks along it; few long rows are split."""
    size = _tile_size(num_rows, num_elements)
    cols = max(4, min(size, triton.next_power_of_2(num_elements)))
    rows = min(size // cols, triton.next_power_of_2(num_rows))
    groups, col_tiles = triton.cdiv(num_rows, rows), triton.cdiv(num_elements, cols)
    chunks = min(col_tiles, max(1, groups * col_tiles // (2 * _PROGRAMS)))
    if groups >= _PROGRAMS:
        chunks = col_tiles
    return Tiles(rows, cols, groups, 1, triton.cdiv(col_tiles, chunks), chunks)


def single_tiles(num_rows: int, num_elements: int) -> Tiles:
    """For no sums along the rows: one tile per program."""
    tiles = whole_rows(num_rows, num_elements)
    return tiles._replace(splits=triton.cdiv(num_elements, tiles.cols), chunks=1)


def draw_chunks(num_draws: int, tiles: Tiles, least: int) -> tuple[int, int]:
    """(programs, draws of each) that share the draws of one tile: at least `least` draws each, if that fills a GPU."""
    programs = min(triton.cdiv(num_draws, least), triton.cdiv(_PROGRAMS, tiles.groups * tiles.splits))
    draws = triton.cdiv(num_draws, programs)
    return triton.cdiv(num_draws, draws), draws


def column_bands(num_rows: int, num_elements: int, groups: int | None = None) -> Tiles:
    """For sums down the columns: a program keeps to one tile of columns and walks down at least 128 rows of it.

    There are `groups` groups of programs if that is given; the last ones may then have nothing to do.
    """
    size = _tile_size(num_rows, num_elements)
    cols = max(4, min(_BAND, triton.next_power_of_2(num_elements)))
    rows = min(size // cols, triton.next_power_of_2(num_rows))
    row_tiles, splits = triton.cdiv(num_rows, rows), triton.cdiv(num_elements, cols)
    if groups is not None:
        return Tiles(rows, cols, groups, triton.cdiv(row_tiles, groups), splits, 1)
    groups = max(1, min(triton.cdiv(num_rows, 128), triton.cdiv(2 * _PROGRAMS, splits)))
    tiles = triton.cdiv(row_tiles, groups)
    return Tiles(rows, cols, triton.cdiv(row_tiles, tiles), tiles, splits, 1)


@triton.jit
def split_program(program, splits):
    """(group, split) of `program` = group * splits + split; unsigned, which halves the cost of the division."""
    group = tl.cast(program, tl.uint32) // tl.cast(splits, tl.uint32)
    return group.to(tl.int32), (tl.cast(program, tl.uint32) - group * tl.cast(splits, tl.uint32)).to(tl.int32)


@triton.jit
def row_pointer(ptr, k, b, stride_k, stride_b, W: tl.constexpr):
    """Pointers `[ROWS, 1]` to the rows (k, b), both int64; strides count units of W, so that alignment survives."""
    return ptr + (k * stride_k + b * stride_b) * W


@triton.jit
def load_tile(row_ptr, col, stride_l, mask):
    """A tile as float32; the padding is 0: mean and log-variance of the prior, whose terms all vanish."""
    return tl.load(row_ptr + col * stride_l, mask, other=0.0).to(tl.float32)


@triton.jit
def store_tile(row_ptr, col, stride_l, value, mask):
    tl.store(row_ptr + col * stride_l, value.to(row_ptr.dtype.element_ty), mask)
