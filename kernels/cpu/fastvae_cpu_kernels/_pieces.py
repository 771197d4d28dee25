"""Where a row is, and what happens to a finished piece of it in scratch: it is stored, or added to something."""

from __future__ import annotations

from typing import Any

import numpy as np

from ._jit import loop, term
from ._layout import Rows

__all__ = ["add_piece", "increase_piece", "row_address", "store_piece"]


@term
def row_address(rows: Rows, k: int, b: int) -> int:
    """The address of row (k, b)."""
    return rows[0] + k * rows[1] + b * rows[2]


@loop
def store_piece(piece: Any, out: Any, count: int) -> None:
    for d in range(count):
        out[d] = piece[d]


@loop
def increase_piece(piece: Any, out: Any, count: int) -> None:
    for d in range(count):
        out[d] += piece[d]


@loop
def add_piece(piece: Any, sums: Any, count: int) -> None:
    for d in range(count):
        sums[d] += np.float64(piece[d])
