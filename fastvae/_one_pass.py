"""Training losses whose forward already writes the gradient: half the passes of a likelihood and its backward.

loss = sum_r w_r nll_r with row weights w known before the forward (1 / batch for a mean, or importance weights). The
one kernel that reads the prediction and the data writes nll and d loss / d prediction; the backward multiplies by the
upstream scalar. The gradient buffer is given up by the first backward: a second one (`retain_graph`) recomputes it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from fastvae._autograd import Grad, Kernels


class BernoulliLoss(Function):
    @staticmethod
    def forward(
        ctx: Any,
        kernels: Kernels,
        logits: Tensor,
        x: Tensor,
        row_weight: Tensor,
        binarize_seed: Grad,
        example_offset: int,
    ) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(logits, x, row_weight, binarize_seed)
        ctx.kernels, ctx.example_offset = kernels, example_offset
        nll, ctx.dlogits, _ = kernels.bernoulli_nll_with_grad(
            logits, x, row_weight, binarize_seed, example_offset, False
        )
        ctx.mark_non_differentiable(nll)
        return (row_weight * nll).sum(), nll

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dloss: Tensor, _: Grad) -> tuple[Any, ...]:
        dlogits, ctx.dlogits = ctx.dlogits, None
        if dlogits is None:
            dlogits = ctx.kernels.bernoulli_nll_with_grad(*ctx.saved_tensors, ctx.example_offset, False)[1]
        return None, ctx.kernels.scale_(dlogits, dloss), None, None, None, None


class GaussianLoss(Function):
    @staticmethod
    def forward(
        ctx: Any, kernels: Kernels, mu: Tensor, logvar: Tensor, x: Tensor, row_weight: Tensor
    ) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(mu, logvar, x, row_weight)
        ctx.kernels = kernels
        nll, dmu, dlogvar, _ = kernels.gaussian_nll_with_grad(mu, logvar, x, row_weight, False)
        ctx.grads = dmu, dlogvar
        ctx.mark_non_differentiable(nll)
        return (row_weight * nll).sum(), nll

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dloss: Tensor, _: Grad) -> tuple[Any, ...]:
        grads, ctx.grads = ctx.grads, None
        if grads is None:
            grads = ctx.kernels.gaussian_nll_with_grad(*ctx.saved_tensors, False)[1:3]
        return None, *(ctx.kernels.scale_(grad, dloss) for grad in grads), None, None


class LinearBernoulliLoss(Function):
    """`BernoulliLoss` of the logits `h @ weight.T + bias`, which are the Function's own: dlogits overwrites them."""

    @staticmethod
    def forward(
        ctx: Any,
        kernels: Kernels,
        h: Tensor,
        weight: Tensor,
        bias: Tensor,
        x: Tensor,
        row_weight: Tensor,
        binarize_seed: Grad,
        example_offset: int,
    ) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(h, weight, bias, x, row_weight, binarize_seed)
        ctx.kernels, ctx.example_offset = kernels, example_offset
        nll, *ctx.grads = _linear_bernoulli(kernels, ctx.saved_tensors, example_offset)
        ctx.mark_non_differentiable(nll)
        return (row_weight * nll).sum(), nll

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dloss: Tensor, _: Grad) -> tuple[Any, ...]:
        h, weight, bias = ctx.saved_tensors[:3]
        grads, ctx.grads = ctx.grads, None
        if grads is None:
            grads = _linear_bernoulli(ctx.kernels, ctx.saved_tensors, ctx.example_offset)[1:]
        dlogits, dbias = grads
        rows = dlogits.flatten(0, -2)
        # the upstream scalar meets the small gradients, not dlogits
        dh = (dlogits @ weight.to(rows.dtype)).to(h.dtype)
        dweight = (rows.t() @ h.flatten(0, -2).to(rows.dtype)).to(weight.dtype)
        small = [ctx.kernels.scale_(grad, dloss) for grad in (dh, dweight, dbias.to(bias.dtype))]
        return None, *small, None, None, None, None


def _linear_bernoulli(kernels: Kernels, saved: Any, example_offset: int) -> tuple[Tensor, Tensor, Tensor]:
    """nll, and the gradients of the logits (in their place) and of the bias."""
    h, weight, bias, x, row_weight, binarize_seed = saved
    logits = torch.nn.functional.linear(h, weight, bias)
    return kernels.bernoulli_nll_with_grad(logits, x, row_weight, binarize_seed, example_offset, True, out=logits)
