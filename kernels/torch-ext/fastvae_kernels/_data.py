"""Data as it comes, float, bool or uint8, as float32 in [0, 1]; and its random binarisation.

uint8 means x / 255. Binarised data is Bernoulli(x): 1 where u < x, with u uniform in [0, 1) and a pure function of
(seed, example, element): the reference's draws, to the last one.
"""

# triton ships no types, and types jitted functions at launch
# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call, import-untyped"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._philox import STREAM_BINARIZE, uniform

# 1 / 255 = 257 / 2^16 + 1 / (255 * 2^16): a byte times the first is exact
_INV_255_HI = tl.constexpr(257 / 65536)
_INV_255_LO = tl.constexpr(1 / (255 * 65536))
_INV_255 = tl.constexpr(1 / 255)


def as_bytes(x: Tensor) -> tuple[Tensor, int]:
    """`x` as the kernels load it, and the integer that means 1: bool is bytes of 0 and 1, uint8 goes up to 255."""
    return (x.view(torch.uint8), 1) if x.dtype == torch.bool else (x, 255)


@triton.jit
def unit_interval(x, LEVELS: tl.constexpr, EXACT: tl.constexpr):
    """`x` as float32 in [0, 1]; integers are divided by LEVELS."""
    value = x.to(tl.float32)
    if x.dtype.is_int() and LEVELS == 255:
        # two instructions round all 256 bytes as the division does, one does not
        value = value * _INV_255_HI + value * _INV_255_LO if EXACT else value * _INV_255
    return value


@triton.jit
def binarize(x, example, first, key_lo, key_hi):
    """Bernoulli(x) draws in {0., 1.} for a tile `[ROWS, COLS]` whose first column is `first`, a multiple of 4."""
    quad = first // 4 + tl.arange(0, x.shape[1] // 4)[None, :]
    u = uniform(quad, example, 0, STREAM_BINARIZE, key_lo, key_hi)
    return tl.where(u < x, 1.0, 0.0)
