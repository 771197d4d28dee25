"""Second stages: partial sums of tiles, added in a fixed order, whoever made them."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from ._jit import kernel
from ._layout import Tiles
from ._pointers import f32_at, f64_at

__all__ = ["ColumnSums", "row_sums", "row_totals"]


@kernel
def _sum_rows(partial: int, rows: int, across: int, out: int) -> None:
    pieces, sums = f32_at(partial), f32_at(out)
    for r in range(rows):
        total = 0.0
        for piece in range(across):
            total += np.float64(pieces[r * across + piece])
        sums[r] = np.float32(total)


@kernel
def _sum_columns(partial: int, blocks: int, columns: int, out: int) -> None:
    totals, sums = f64_at(partial), f32_at(out)
    for b in range(1, blocks):
        for d in range(columns):
            totals[d] += totals[b * columns + d]
    for d in range(columns):
        sums[d] = np.float32(totals[d])


@kernel
def _sum_all(partial: int, count: int, out: int) -> None:
    totals, total = f64_at(partial), 0.0
    for i in range(count):
        total += totals[i]
    f32_at(out)[0] = np.float32(total)


def row_totals(num_rows: int, tiles: Tiles) -> Tensor:
    """Where a kernel writes the float32 total of each (row, tile across)."""
    # rows without elements have no tiles, and a sum of 0
    return torch.empty(num_rows * tiles.across) if tiles.total else torch.zeros(num_rows)


def row_sums(totals: Tensor, leading: torch.Size, tiles: Tiles) -> Tensor:
    """One float32 per row, `[*leading]`, of its totals; long rows have several."""
    if tiles.across == 1:
        return totals.view(leading)
    sums = torch.empty(leading)
    _sum_rows(totals.data_ptr(), sums.numel(), tiles.across, sums.data_ptr())
    return sums


class ColumnSums:
    """Sums over the rows: each block of rows adds up its own in float64, then the blocks are added in order."""

    def __init__(self, tiles: Tiles, columns: int) -> None:
        self._partial = torch.zeros(max(1, tiles.down), columns, dtype=torch.float64)

    @property
    def address(self) -> int:
        return self._partial.data_ptr()

    def per_column(self) -> Tensor:
        """float32 `[D]`"""
        blocks, columns = self._partial.shape
        sums = torch.empty(columns)
        _sum_columns(self._partial.data_ptr(), blocks, columns, sums.data_ptr())
        return sums

    def total(self) -> Tensor:
        """float32 `[]`"""
        total = torch.empty(())
        _sum_all(self._partial.data_ptr(), self._partial.numel(), total.data_ptr())
        return total
