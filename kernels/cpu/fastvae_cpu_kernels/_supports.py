"""Which tensors these kernels take; everything else goes to the reference."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["supports"]

_DATA_TYPES = (torch.float32, torch.uint8, torch.bool)
# the number of predictions of each op; the tensors after them are data
_PREDICTIONS = {
    "bernoulli_nll": 1,
    "gather_batch": 0,
    "gaussian_nll": 2,
    "kl_normal": 4,
    "kl_standard_normal": 2,
    "reparameterize": 2,
    "reparameterize_kl": 2,
    "reparameterize_log_ratio": 2,
}


def supports(op: str, *tensors: Tensor) -> str | None:
    """None if `op` can run these tensors (predictions first, then data), else one short reason."""
    if op == "mlp_loss":
        # weights and biases, then data: all float32
        return supports("kl_normal", *tensors[:4]) or supports("bernoulli_nll", *tensors[-2:])
    if op not in _PREDICTIONS:
        return f"the Numba kernels have no {op}"
    predictions = _PREDICTIONS[op]
    for i, tensor in enumerate(tensors):
        if tensor.device.type != "cpu":
            return f"the Numba kernels take CPU tensors, not {tensor.device.type}"
        if i < predictions and tensor.dtype != torch.float32:
            return f"the Numba kernels take float32, not {str(tensor.dtype)[6:]}"
        if i >= predictions and tensor.dtype not in _DATA_TYPES:
            return f"the Numba kernels take data as float32, uint8 or bool, not {str(tensor.dtype)[6:]}"
    return None
