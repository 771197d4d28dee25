"""Training losses whose forward already writes the gradient: half the passes of a likelihood and its backward.

loss = sum_r w_r nll_r with row weights w known before the forward (None: the mean; or importance weights). The one
kernel that reads the prediction and the data writes nll and d loss / d prediction; the backward multiplies by the
upstream scalar.

The first backward gives the gradient buffer up, scaled in place; a second one (`retain_graph`) computes it again, and
one that is itself differentiated (`create_graph`) goes to the reference. Under torch.compile, which sees no attributes
of ctx, the buffer is saved as it is and scaled out of place.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from fastvae import reference
from fastvae._autograd import Grad, Kernels, reference_grads
from fastvae._linear import exact_linear, linear, linear_grads
from fastvae._linear_nll import Gaussian


def weighted_sum(nll: Tensor, row_weight: Grad) -> Tensor:
    """sum_r w_r nll_r; without weights the mean, which of no rows is 0."""
    if row_weight is None:
        return nll.mean() if nll.numel() else nll.sum()
    return (row_weight * nll).sum()


class _OnePass(Function):
    """What the losses share. A subclass says how many of its inputs are differentiable, and two computations."""

    differentiable: int

    @staticmethod
    def grads(ctx: Any, *inputs: Any) -> tuple[Tensor, ...]:
        """nll, then the gradients of the loss for the differentiable inputs."""
        raise NotImplementedError

    @staticmethod
    def reference_loss(ctx: Any, *inputs: Any) -> Tensor:
        """The loss, differentiable any number of times."""
        raise NotImplementedError

    @classmethod
    def run(cls, ctx: Any, row_weight: Grad, *inputs: Any) -> tuple[Tensor, Tensor]:
        nll, *grads = cls.grads(ctx, *inputs)
        if torch.compiler.is_compiling():
            ctx.save_for_backward(*grads)
        else:
            ctx.save_for_backward(*inputs)
            ctx.gradients = grads
        ctx.mark_non_differentiable(nll)
        # or every backward would fill zeros for nll
        ctx.set_materialize_grads(False)
        return weighted_sum(nll, row_weight), nll

    @classmethod
    def gradients(cls, ctx: Any, dloss: Tensor) -> tuple[Grad, ...]:
        if torch.compiler.is_compiling():
            return tuple(grad * dloss.to(grad.dtype) for grad in ctx.saved_tensors)
        if torch.is_grad_enabled():
            inputs = ctx.saved_tensors
            fixed = inputs[cls.differentiable :]
            return reference_grads(
                lambda *given: cls.reference_loss(ctx, *given, *fixed), inputs[: cls.differentiable], (dloss,)
            )
        grads, ctx.gradients = ctx.gradients, None
        if grads is None:
            _, *grads = cls.grads(ctx, *ctx.saved_tensors)
        return tuple(ctx.kernels.scale_(grad, dloss) for grad in grads)


class BernoulliLoss(_OnePass):
    differentiable = 1

    @staticmethod
    def forward(
        ctx: Any,
        kernels: Kernels,
        logits: Tensor,
        x: Tensor,
        row_weight: Grad,
        binarize_seed: Grad,
        example_offset: int,
    ) -> tuple[Tensor, Tensor]:
        ctx.kernels, ctx.example_offset = kernels, example_offset
        return BernoulliLoss.run(ctx, row_weight, logits, x, row_weight, binarize_seed)

    @staticmethod
    def backward(ctx: Any, dloss: Tensor, _: Grad) -> tuple[Any, ...]:
        return None, *BernoulliLoss.gradients(ctx, dloss), None, None, None, None

    @staticmethod
    def grads(ctx: Any, *inputs: Any) -> tuple[Tensor, ...]:
        return ctx.kernels.bernoulli_nll_with_grad(*inputs, ctx.example_offset, False)[:2]

    @staticmethod
    def reference_loss(ctx: Any, logits: Tensor, x: Tensor, row_weight: Grad, seed: Grad) -> Tensor:
        nll = reference.bernoulli_nll(logits, x, binarize_seed=seed, example_offset=ctx.example_offset)
        return weighted_sum(nll, row_weight)


class GaussianLoss(_OnePass):
    differentiable = 2

    @staticmethod
    def forward(
        ctx: Any,
        kernels: Kernels,
        mu: Tensor,
        logvar: Tensor,
        x: Tensor,
        row_weight: Grad,
        logvar_floor: float | None,
    ) -> tuple[Tensor, Tensor]:
        ctx.kernels, ctx.logvar_floor = kernels, logvar_floor
        return GaussianLoss.run(ctx, row_weight, mu, logvar, x, row_weight)

    @staticmethod
    def backward(ctx: Any, dloss: Tensor, _: Grad) -> tuple[Any, ...]:
        return None, *GaussianLoss.gradients(ctx, dloss), None, None, None

    @staticmethod
    def grads(ctx: Any, *inputs: Any) -> tuple[Tensor, ...]:
        return ctx.kernels.gaussian_nll_with_grad(*inputs, False, floor=ctx.logvar_floor)[:3]

    @staticmethod
    def reference_loss(ctx: Any, mu: Tensor, logvar: Tensor, x: Tensor, row_weight: Grad) -> Tensor:
        return weighted_sum(reference.gaussian_nll(mu, logvar, x, logvar_floor=ctx.logvar_floor), row_weight)


class LinearBernoulliLoss(_OnePass):
    """`BernoulliLoss` of the logits `h @ weight.T + bias`, which are the Function's own: dlogits overwrites them.

    The gradients of h, weight and bias are made in the forward, so that dlogits `[..., D]` is never kept, and the
    upstream scalar meets the small tensors alone.
    """

    differentiable = 3

    @staticmethod
    def forward(
        ctx: Any,
        kernels: Kernels,
        h: Tensor,
        weight: Tensor,
        bias: Tensor,
        x: Tensor,
        row_weight: Grad,
        binarize_seed: Grad,
        example_offset: int,
    ) -> tuple[Tensor, Tensor]:
        ctx.kernels, ctx.example_offset = kernels, example_offset
        return LinearBernoulliLoss.run(ctx, row_weight, h, weight, bias, x, row_weight, binarize_seed)

    @staticmethod
    def backward(ctx: Any, dloss: Tensor, _: Grad) -> tuple[Any, ...]:
        return None, *LinearBernoulliLoss.gradients(ctx, dloss), None, None, None, None

    @staticmethod
    def grads(ctx: Any, *inputs: Any) -> tuple[Tensor, ...]:
        h, weight, bias, x, row_weight, seed = inputs
        logits = linear(ctx.kernels, h, weight, bias)
        nll, dlogits, dbias = ctx.kernels.bernoulli_nll_with_grad(
            logits, x, row_weight, seed, ctx.example_offset, True, out=logits
        )
        dh, dweight = linear_grads(ctx.kernels, dlogits, h, weight)
        assert dh is not None
        assert dweight is not None
        return nll, dh, dweight, dbias.to(bias.dtype)

    @staticmethod
    def reference_loss(ctx: Any, h: Tensor, weight: Tensor, bias: Tensor, *rest: Any) -> Tensor:
        return BernoulliLoss.reference_loss(ctx, exact_linear(h, weight, bias), *rest)


class LinearGaussianLoss(_OnePass):
    """`GaussianLoss` of the two halves of `h @ weight.T + bias`, likewise; `likelihood` knows the floor of logvar."""

    differentiable = 3

    @staticmethod
    def forward(
        ctx: Any, likelihood: Gaussian, h: Tensor, weight: Tensor, bias: Tensor, x: Tensor, row_weight: Grad
    ) -> tuple[Tensor, Tensor]:
        ctx.kernels, ctx.likelihood = likelihood.kernels, likelihood
        return LinearGaussianLoss.run(ctx, row_weight, h, weight, bias, x, row_weight)

    @staticmethod
    def backward(ctx: Any, dloss: Tensor, _: Grad) -> tuple[Any, ...]:
        return None, *LinearGaussianLoss.gradients(ctx, dloss), None, None

    @staticmethod
    def grads(ctx: Any, *inputs: Any) -> tuple[Tensor, ...]:
        h, weight, bias, x, row_weight = inputs
        out = linear(ctx.kernels, h, weight, bias)
        nll, dout, dbias = ctx.likelihood.one_pass(out, x, row_weight, column_sums=True)
        dh, dweight = linear_grads(ctx.kernels, dout, h, weight)
        assert dh is not None
        assert dweight is not None
        return nll, dh, dweight, dbias.to(bias.dtype)

    @staticmethod
    def reference_loss(ctx: Any, h: Tensor, weight: Tensor, bias: Tensor, x: Tensor, row_weight: Grad) -> Tensor:
        return weighted_sum(ctx.likelihood.exact(exact_linear(h, weight, bias), x), row_weight)
