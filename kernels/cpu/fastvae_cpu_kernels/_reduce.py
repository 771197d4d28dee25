"""Second stages: partial sums of tiles, added in a fixed order, whoever made them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from ._jit import kernel
from ._layout import Plan
from ._pointers import f32_at, f64_at
from ._record import launch

__all__ = ["ColumnSums", "PartialSums", "row_sums", "row_totals"]


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


def row_totals(leading: torch.Size, plan: Plan) -> Tensor:
    """Where a kernel writes the float32 total of each (row, tile across), for rows `[*leading]`."""
    if plan.tiles == 0:  # rows without elements sum to 0
        return torch.zeros(leading, dtype=torch.float32)
    if plan.across == 1 and leading:
        return torch.empty(*leading, dtype=torch.float32)
    return torch.empty(leading.numel() * plan.across, dtype=torch.float32)


def row_sums(totals: Tensor, leading: torch.Size, plan: Plan) -> Tensor:
    """One float32 per row, `[*leading]`, of its totals; long rows have several."""
    if plan.across == 1:
        return totals if leading else totals.view(())
    sums = torch.empty(leading, dtype=torch.float32)
    launch(_sum_rows, totals.data_ptr(), sums.numel(), plan.across, sums.data_ptr())
    return sums


class PartialSums:
    """Sums over the rows: each block of rows adds up its own in float64, then the blocks are added in order."""

    def __init__(self, plan: Plan, columns: int | None = None) -> None:
        """`columns`: the plan's own D, unless told otherwise."""
        blocks, columns = max(1, plan.tiles // plan.across), plan.D if columns is None else columns
        self._partial = torch.empty(blocks, columns, dtype=torch.float64).zero_()

    @property
    def address(self) -> int:
        return self._partial.data_ptr()

    def per_column(self, out: Tensor | None = None) -> Tensor:
        """float32 `[D]`, in `out` if given, which must stay where it is."""
        blocks, columns = self._partial.shape
        sums = torch.empty(columns, dtype=torch.float32) if out is None else out
        launch(_sum_columns, self._partial.data_ptr(), blocks, columns, sums.data_ptr())
        return sums

    def total(self) -> Tensor:
        """float32 `[]`"""
        total = torch.empty((), dtype=torch.float32)
        launch(_sum_all, self._partial.data_ptr(), self._partial.numel(), total.data_ptr())
        return total


class ColumnSums:
    """Where kernels leave the column sums of several matrices, the gradients of biases: in `parts`, whole at once.

    Its twin for the GPU adds up partial sums of all of them, and of the losses, in `finish`.
    """

    def __init__(self, outs: Sequence[Tensor], num_rows: int) -> None:
        """`outs`: what the sums are written to, contiguous float32 `[D]` each."""
        self.parts = list(outs)

    def finish(self, nll: Tensor) -> Tensor:
        """The losses `[B]` that `bernoulli_nll_with_grad` returned."""
        return nll
