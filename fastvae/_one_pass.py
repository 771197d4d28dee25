"""Training losses whose forward already writes the gradient: half the passes of a likelihood and its backward.

loss = sum_r w_r nll_r with row weights w known before the forward (1 / batch for a mean, or importance weights). The
one kernel that reads the prediction and the data writes nll and d loss / d prediction; the backward multiplies by the
upstream scalar.

The first backward gives the gradient buffer up, scaled in place; a second one (`retain_graph`) computes it again. Under
torch.compile, which sees no attributes of ctx, the buffer is saved as it is and scaled out of place.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from fastvae._autograd import Grad, Kernels


def _keep(ctx: Any, inputs: tuple[Grad, ...], grads: tuple[Tensor, ...]) -> None:
    """Keep the gradients for `_scaled`, and what makes them again."""
    if torch.compiler.is_compiling():
        ctx.save_for_backward(*grads)
    else:
        ctx.save_for_backward(*inputs)
        ctx.grads = grads


def _scaled(ctx: Any, dloss: Tensor, again: Callable[..., tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
    """dloss times the kept gradients, or those that `again` makes of the saved inputs."""
    if torch.compiler.is_compiling():
        return tuple(grad * dloss.to(grad.dtype) for grad in ctx.saved_tensors)
    grads, ctx.grads = ctx.grads, None
    if grads is None:
        grads = again(*ctx.saved_tensors)
    return tuple(ctx.kernels.scale_(grad, dloss) for grad in grads)


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
        ctx.kernels, ctx.example_offset = kernels, example_offset
        inputs = logits, x, row_weight, binarize_seed
        nll, dlogits, _ = kernels.bernoulli_nll_with_grad(*inputs, example_offset, False)
        _keep(ctx, inputs, (dlogits,))
        ctx.mark_non_differentiable(nll)
        return (row_weight * nll).sum(), nll

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dloss: Tensor, _: Grad) -> tuple[Any, ...]:
        def again(*inputs: Grad) -> tuple[Tensor]:
            return (ctx.kernels.bernoulli_nll_with_grad(*inputs, ctx.example_offset, False)[1],)

        return None, *_scaled(ctx, dloss, again), None, None, None, None


class GaussianLoss(Function):
    @staticmethod
    def forward(
        ctx: Any, kernels: Kernels, mu: Tensor, logvar: Tensor, x: Tensor, row_weight: Tensor
    ) -> tuple[Tensor, Tensor]:
        ctx.kernels = kernels
        inputs = mu, logvar, x, row_weight
        nll, dmu, dlogvar, _ = kernels.gaussian_nll_with_grad(*inputs, False)
        _keep(ctx, inputs, (dmu, dlogvar))
        ctx.mark_non_differentiable(nll)
        return (row_weight * nll).sum(), nll

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dloss: Tensor, _: Grad) -> tuple[Any, ...]:
        def again(*inputs: Grad) -> tuple[Tensor, ...]:
            return ctx.kernels.gaussian_nll_with_grad(*inputs, False)[1:3]

        return None, *_scaled(ctx, dloss, again), None, None


class LinearBernoulliLoss(Function):
    """`BernoulliLoss` of the logits `h @ weight.T + bias`, which are the Function's own: dlogits overwrites them.

    The gradients of h, weight and bias are made in the forward, so that dlogits `[..., D]` is never kept, and the
    upstream scalar meets the small tensors alone.
    """

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
        ctx.kernels, ctx.example_offset = kernels, example_offset
        inputs = h, weight, bias, x, row_weight, binarize_seed
        nll, *grads = _linear_bernoulli(kernels, example_offset, *inputs)
        _keep(ctx, inputs, tuple(grads))
        ctx.mark_non_differentiable(nll)
        return (row_weight * nll).sum(), nll

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dloss: Tensor, _: Grad) -> tuple[Any, ...]:
        def again(*inputs: Any) -> tuple[Tensor, ...]:
            return _linear_bernoulli(ctx.kernels, ctx.example_offset, *inputs)[1:]

        return None, *_scaled(ctx, dloss, again), None, None, None, None


def _linear_bernoulli(
    kernels: Kernels,
    example_offset: int,
    h: Tensor,
    weight: Tensor,
    bias: Tensor,
    x: Tensor,
    row_weight: Tensor,
    binarize_seed: Grad,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """nll and the gradients of h, weight and bias."""
    logits = torch.nn.functional.linear(h, weight, bias)
    nll, dlogits, dbias = kernels.bernoulli_nll_with_grad(
        logits, x, row_weight, binarize_seed, example_offset, True, out=logits
    )
    dweight = dlogits.flatten(0, -2).t() @ h.flatten(0, -2)
    return nll, dlogits @ weight, dweight, dbias.to(bias.dtype)
