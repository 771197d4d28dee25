"""Which tensors the kernels take. Nothing is probed: a device that cannot run them fails at its first launch."""

from __future__ import annotations

import torch
from torch import Tensor

_FLOAT = (torch.float32, torch.bfloat16, torch.float16)
_DATA = (torch.bool, torch.uint8, torch.int64)  # int64: seeds and row indices
# CPU tensors are for triton's interpreter
_DEVICES = ("cuda", "xpu", "cpu")


def supports(op: str, *tensors: Tensor) -> str | None:
    """None if `op` can run these tensors, else the reason, as a clause."""
    if op == "linear":
        return "no Triton kernel replaces the vendor's matrix products"
    for t in tensors:
        if t.device.type not in _DEVICES:
            return f"the Triton kernel of {op} does not run on {t.device.type} tensors"
        if t.dtype not in _FLOAT + _DATA:
            return f"the Triton kernel of {op} does not take {str(t.dtype).removeprefix('torch.')}"
    return None
