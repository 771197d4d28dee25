"""tensor *= scale in place; nothing is touched where the scale is 1, as the upstream gradient of a loss mostly is."""

from __future__ import annotations

from torch import Tensor

__all__ = ["scale_"]


def scale_(tensor: Tensor, scale: Tensor) -> Tensor:
    """`tensor`, multiplied in place by the one element of `scale`."""
    return tensor if scale.item() == 1.0 else tensor.mul_(scale)
