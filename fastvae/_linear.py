"""Linear layers whose matrix products are those of the kernels, where these have the faster ones.

    y = activation(x W^T + b);   for the gradient da before the activation:   dx = da W,   dW = da^T x,   db = sum of da

On a GPU the vendor's products are the best there are. On a CPU ours keep both matrices where they are and use registers
that some BLAS leave idle, see their `_gemm.py`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from fastvae._autograd import Grad, Kernels, reference_grads

__all__ = ["Linear", "exact_linear", "linear", "linear_grads"]


def _ours(kernels: Kernels, *tensors: Tensor) -> bool:
    return hasattr(kernels, "linear_fwd") and kernels.supports("linear", *tensors) is None


def exact_linear(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str = "none") -> Tensor:
    """activation(x W^T + b) `[..., O]` for x `[..., I]`, by PyTorch."""
    y = torch.nn.functional.linear(x, weight, bias)
    return y if activation == "none" else getattr(torch, activation)(y)


def linear(kernels: Kernels, x: Tensor, weight: Tensor, bias: Tensor, activation: str = "none") -> Tensor:
    """The same by the kernels; nothing for autograd, it is what a Function calls."""
    if not _ours(kernels, x, weight, bias):
        return exact_linear(x, weight, bias, activation)
    y: Tensor = kernels.linear_fwd(x.flatten(0, -2), weight, bias, activation)
    return y.unflatten(0, x.shape[:-1])


def linear_grads(
    kernels: Kernels, dy: Tensor, x: Tensor, weight: Tensor, needed: tuple[bool, bool] = (True, True)
) -> tuple[Grad, Grad]:
    """dx `[..., I]` and dW `[O, I]`, those that are needed, for dy `[..., O]` and x `[..., I]`."""
    rows, inputs = dy.flatten(0, -2), x.flatten(0, -2)
    if _ours(kernels, inputs, weight, rows):
        dweight = torch.empty_like(weight) if needed[1] else None
        dx = kernels.linear_bwd(rows.contiguous(), inputs, weight, needed[0], dweight)
    else:
        dx = rows @ weight if needed[0] else None
        dweight = rows.t() @ inputs if needed[1] else None
    return None if dx is None else dx.view(x.shape), dweight


class Linear(Function):
    """x `[..., I]`, weight `[O, I]`, bias `[O]`, and the name of an activation."""

    @staticmethod
    def forward(ctx: Any, kernels: Kernels, x: Tensor, weight: Tensor, bias: Tensor, activation: str) -> Tensor:
        y = linear(kernels, x, weight, bias, activation)
        ctx.save_for_backward(x, weight, bias, y if activation != "none" else None)
        ctx.kernels, ctx.activation = kernels, activation
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
        x, weight, bias, y = ctx.saved_tensors
        if torch.is_grad_enabled():

            def op(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
                return exact_linear(x, weight, bias, ctx.activation)

            return None, *reference_grads(op, (x, weight, bias), (dy,)), None
        if ctx.activation == "relu":
            dy = torch.ops.aten.threshold_backward(dy, y, 0)
        elif ctx.activation == "tanh":
            dy = torch.ops.aten.tanh_backward(dy, y)
        _, dx, dw, db, _ = ctx.needs_input_grad
        grads = linear_grads(ctx.kernels, dy, x, weight, (dx, dw))
        return None, *grads, dy.flatten(0, -2).sum(0) if db else None, None
