"""Which tensors these kernels take; everything else goes to the reference."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["supports"]

# fewer multiplications than this and PyTorch's products are done before ours are launched
_LEAST_MULTIPLIES = 2**22

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
    if op == "linear":
        return _supports_products(*tensors)
    if op not in _PREDICTIONS:
        return f"the Numba kernels have no {op}"
    predictions = _PREDICTIONS[op]
    for i, tensor in enumerate(tensors):
        if not tensor.is_cpu:
            return f"the Numba kernels take CPU tensors, not {tensor.device.type}"
        if i < predictions and tensor.dtype != torch.float32:
            return f"the Numba kernels take float32, not {str(tensor.dtype)[6:]}"
        if i >= predictions and tensor.dtype not in _DATA_TYPES:
            return f"the Numba kernels take data as float32, uint8 or bool, not {str(tensor.dtype)[6:]}"
    return None


def _supports_products(x: Tensor, weight: Tensor, *others: Tensor) -> str | None:
    """Of a linear layer, x `[..., I]` and weight `[O, I]`."""
    for tensor in (x, weight, *others):
        if not tensor.is_cpu or tensor.dtype != torch.float32:
            return "the Numba kernels multiply float32 on a CPU"
    if weight.ndim != 2 or x.ndim < 2 or x.shape[-1] != weight.shape[1] or x.numel() * len(weight) < _LEAST_MULTIPLIES:
        return "PyTorch's products are for small matrices"
    from ._products import split

    return None if split(x.flatten(0, -2), weight) else "PyTorch's products are for these matrices, or this processor"
