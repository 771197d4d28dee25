"""How tensors of any strides become rows that a kernel can walk, and rows become tiles of work.

A tensor `[*leading, D]` is K x B rows of D contiguous elements: b is the last leading index, k the others flattened. A
kernel gets a triple (address, bytes to the next k, bytes to the next b); a stride of 0 (an expanded tensor) is as good
as any other. Rows that are not contiguous are copied, as nothing else is fast on a CPU.
"""

from __future__ import annotations

import functools
import itertools
import math
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["NO_ROWS", "PIECE", "Plan", "Rows", "deliver", "destination", "plan", "rows_of", "scalars_of", "walkable"]

# (address, bytes to the next sample, bytes to the next example)
Rows = tuple[int, int, int]
# of a tensor that is not there
NO_ROWS: Rows = (0, 0, 0)

# columns that pass through the stages of a kernel together: 2 KiB of scratch each
PIECE = 512
_TILE_COLUMNS, _TILE_ROWS, _TILE_ELEMENTS = 8192, 64, 32768


def _collapse(sizes: tuple[int, ...], strides: tuple[int, ...]) -> int | None:
    """The one stride that walks these dimensions in row-major order, or None where there is no such stride."""
    dims = [(size, stride) for size, stride in zip(sizes, strides, strict=True) if size != 1]
    for (_, outer), (size, inner) in itertools.pairwise(dims):
        if outer != inner * size:
            return None
    return dims[-1][1] if dims else 0


def walkable(tensor: Tensor) -> Tensor:
    """The tensor itself if `rows_of` can express it, else a contiguous copy."""
    if tensor.is_contiguous():
        return tensor
    *leading, elements = tensor.shape
    *strides, inner = tensor.stride()
    if (inner == 1 or elements == 1) and _collapse(tuple(leading[:-1]), tuple(strides[:-1])) is not None:
        return tensor
    return tensor.contiguous()


def destination(out: Tensor | None, like: Tensor) -> Tensor:
    """A `walkable` tensor to write to: `out` if it is one, else a new one of the shape of `like`."""
    if out is not None and walkable(out) is out:
        return out
    return torch.empty_like(like, memory_format=torch.contiguous_format)


def deliver(written: Tensor, out: Tensor | None) -> Tensor:
    """`written`, or `out` holding its values."""
    return written if out is None or written is out else out.copy_(written)


def rows_of(tensor: Tensor) -> Rows:
    """Where the rows of a `walkable` tensor are; the caller keeps the tensor alive."""
    if tensor.ndim == 2:
        return tensor.data_ptr(), 0, tensor.stride(0) * tensor.element_size()
    if tensor.ndim < 2:
        return tensor.data_ptr(), 0, 0
    size = tensor.element_size()
    stride_k = _collapse(tuple(tensor.shape[:-2]), tensor.stride()[:-2])
    assert stride_k is not None
    return tensor.data_ptr(), stride_k * size, tensor.stride(-2) * size


def scalars_of(tensor: Tensor) -> tuple[Tensor, Rows]:
    """One float32 per row, `[*leading]` of any strides: a tensor to keep alive, and where its values are."""
    if tensor.ndim < 2:
        return tensor, (tensor.data_ptr(), 0, tensor.stride(0) * 4 if tensor.ndim else 0)
    tensor = walkable(tensor.unsqueeze(-1))
    return tensor, rows_of(tensor)


class Plan(NamedTuple):
    """A grid of tiles over the K * B rows and D columns of a shape `[*leading, D]`.

    Tile t covers rows `height * (t // across)` and columns `width * (t % across)` onwards. The grid depends on the
    shape alone, so that no result depends on who does a tile.
    """

    leading: torch.Size
    K: int
    B: int
    D: int
    across: int
    height: int
    width: int
    tiles: int

    @property
    def sizes(self) -> tuple[int, int, int, int, int, int]:
        """The arguments of a kernel."""
        return self[1:7]

    @property
    def elements(self) -> int:
        return self.K * self.B * self.D


@functools.lru_cache(4096)
def plan(shape: torch.Size, samples: int = 1) -> Plan:
    """Tiles of about 30 microseconds of work, none for empty tensors; each row is gone through `samples` times.

    b is the last leading index, k the others flattened: without leading dimensions K = B = 1.
    """
    *leading, D = shape
    K, B = (math.prod(leading[:-1]), leading[-1]) if leading else (1, 1)
    if K * B * D == 0:
        return Plan(torch.Size(leading), K, B, D, 1, 1, 1, 0)
    width = min(D, _TILE_COLUMNS)
    height = max(1, min(_TILE_ROWS, _TILE_ELEMENTS // (width * samples)))
    # as few tiles, all of a size
    height = -(-K * B // -(-K * B // height))
    across = -(-D // width)
    return Plan(torch.Size(leading), K, B, D, across, height, width, -(-K * B // height) * across)
