"""What happens to a finished piece of a row in scratch: it is stored, or added to column sums."""

from __future__ import annotations

from typing import Any

import numpy as np

from ._jit import loop

__all__ = ["add_piece", "store_piece"]


@loop
def store_piece(piece: Any, out: Any, count: int) -> None:
    for d in range(count):
        out[d] = piece[d]


@loop
def add_piece(piece: Any, sums: Any, count: int) -> None:
    for d in range(count):
        sums[d] += np.float64(piece[d])
