"""tensor *= scale in place; nothing is touched where the scale is 1, as the upstream gradient of a loss mostly is."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ._jit import kernel, loop
from ._layout import plan
from ._math import ONE
from ._pointers import f32_at
from ._threads import run

__all__ = ["scale_"]

_NS_PER_ELEMENT = 0.1


@loop
def _scale_piece(values: Any, scale: Any, count: int) -> None:
    for i in range(count):
        values[i] *= scale


@kernel
def _scale_kernel(
    first_tile: int,
    last_tile: int,
    values: int,  # float32, contiguous; rows of a grid that is one row high
    scale: int,  # float32 [1]
    K: int,
    B: int,
    D: int,
    across: int,
    height: int,
    width: int,
) -> None:
    factor = f32_at(scale)[0]
    if factor == ONE:
        return
    for tile in range(first_tile, last_tile):
        first = tile * width
        _scale_piece(f32_at(values + 4 * first), factor, min(width, D - first))


def scale_(tensor: Tensor, scale: Tensor) -> Tensor:
    """`tensor`, multiplied in place by the one element of `scale`, which is read where it is."""
    if not tensor.is_contiguous() or scale.dtype != tensor.dtype:
        return tensor.mul_(scale)
    grid = plan(torch.Size((tensor.numel(),)))
    run(_scale_kernel, grid, _NS_PER_ELEMENT * grid.elements, tensor.data_ptr(), scale.data_ptr(), *grid.sizes)
    return tensor
