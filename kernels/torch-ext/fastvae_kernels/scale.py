"""tensor *= scale in place, by a scalar that only the device knows; nothing is touched where it is 1.

The upstream gradient of a training loss is nearly always 1: asking would wait for the device, multiplying would cost a
pass. Each program reads the scalar and returns at once.
"""

# triton ships no types, and types jitted functions at launch
# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call, import-untyped"

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ._layout import device_guard, grid_1d

__all__ = ["scale_"]

_BLOCK = 2048
_PROGRAMS = 1024  # they walk over the tensor, so that nothing but these programs is launched where the scale is 1


@triton.jit(do_not_specialize=["programs"])
def _scale_kernel(
    tensor_ptr,  # [num_elements]
    scale_ptr,  # [1]
    num_elements: tl.int64,
    programs,
    BLOCK: tl.constexpr,
):
    scale = tl.load(scale_ptr).to(tl.float32)
    if scale != 1.0:
        for block in range(tl.program_id(0), tl.cdiv(num_elements, BLOCK), programs):
            offset = tl.cast(block, tl.int64) * BLOCK + tl.arange(0, BLOCK)
            mask = offset < num_elements
            value = tl.load(tensor_ptr + offset, mask).to(tl.float32) * scale
            tl.store(tensor_ptr + offset, value.to(tensor_ptr.dtype.element_ty), mask)


def scale_(tensor: Tensor, scale: Tensor) -> Tensor:
    """`tensor`, multiplied in place by the one element of `scale`."""
    if not tensor.is_contiguous():
        return tensor.mul_(scale)
    if tensor.numel():
        programs = min(_PROGRAMS, triton.cdiv(tensor.numel(), _BLOCK))
        with device_guard(tensor):
            _scale_kernel[grid_1d(programs)](tensor, scale, tensor.numel(), programs, BLOCK=_BLOCK)
    return tensor
