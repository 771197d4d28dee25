"""How tensors of any strides become rows that a kernel can walk: samples K x examples B x elements L.

A kernel takes one pointer and three strides per tensor. The leading dimensions `[]`, `[B]`, `[K, B]`, or more, become
(K, B) without a copy wherever strides can express it; a stride of 0 (an expanded tensor) is as good as any other.
"""

from __future__ import annotations

import itertools
import math
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["Rows", "as_rows", "collapse", "device_guard", "grid_1d", "merge_rows", "vector_width"]


class Rows(NamedTuple):
    """A tensor `[*leading, L]` seen as K x B rows of L elements; strides count elements."""

    tensor: Tensor
    stride_k: int
    stride_b: int
    stride_l: int

    def strides_in(self, width: int) -> tuple[int, int, int]:
        """The strides as a kernel takes them: those of the rows in units of `width`, see `vector_width`."""
        return self.stride_k // width, self.stride_b // width, self.stride_l


def collapse(sizes: tuple[int, ...], strides: tuple[int, ...]) -> int | None:
    """The one stride that walks these dimensions in row-major order, or None where there is no such stride."""
    dims = [(size, stride) for size, stride in zip(sizes, strides, strict=True) if size != 1]
    for (_, outer), (size, inner) in itertools.pairwise(dims):
        if outer != inner * size:
            return None
    return dims[-1][1] if dims else 0


def as_rows(tensor: Tensor, *, event: bool = True) -> Rows:
    """Strides (K, B, L) of a tensor `[*leading, L]`, or of one value per row `[*leading]` without an `event`.

    Dimensions of size 1 get stride 0, the elements of a one-element row stride 1. What three strides cannot express is
    copied (three or more leading dimensions that do not collapse).
    """
    if not event:
        tensor = tensor.unsqueeze(-1)
    while tensor.ndim < 2:
        tensor = tensor.unsqueeze(0)
    *samples, examples, elements = tensor.shape
    stride_k = collapse(tuple(samples), tensor.stride()[:-2])
    if stride_k is None:
        tensor = tensor.contiguous()
        stride_k = examples * elements
    stride_b, stride_l = tensor.stride()[-2:]
    return Rows(tensor, stride_k, stride_b if examples != 1 else 0, stride_l if elements != 1 else 1)


def merge_rows(shape: torch.Size, *rows: Rows) -> tuple[int, int, list[Rows]]:
    """(K, B, rows) of tensors of one `shape` `[*leading, L]`, with K merged into B where every tensor's strides allow.

    For kernels that need no noise, hence neither k nor b. (K, B) = (1, K * B) after the merge.
    """
    *samples, examples, _ = (1, *shape) if len(shape) < 2 else shape
    num_samples = math.prod(samples)
    merged = []
    for row in rows:
        stride = collapse((num_samples, examples), (row.stride_k, row.stride_b))
        if stride is None:
            return num_samples, examples, list(rows)
        merged.append(row._replace(stride_k=0, stride_b=stride))
    return 1, num_samples * examples, merged


def vector_width(num_elements: int, *rows: Rows) -> int:
    """The largest power of two up to 16 that divides the row length and every row stride.

    Triton sees the divisibility of an integer argument by 16 only. Handed over as `stride // width` and multiplied by
    the constant `width` in the kernel, rows of 20 elements still get 128-bit accesses.
    """
    return math.gcd(16, num_elements, *(stride for row in rows for stride in (row.stride_k, row.stride_b)))


def grid_1d(*programs: int) -> tuple[int]:
    """A grid of `prod(programs)` along x, the only axis that is not limited to 65,535."""
    return (math.prod(programs),)


def device_guard(tensor: Tensor) -> AbstractContextManager[object]:
    """Launches go to the tensor's device, not to the current one; CPU tensors (interpreter, emulator) need no guard."""
    if tensor.is_cuda:
        return torch.cuda.device_of(tensor)
    if tensor.is_xpu:
        return torch.xpu.device_of(tensor)
    return nullcontext()
