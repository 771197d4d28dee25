"""Output layer and likelihood in one, with a gradient for any upstream weight of each row.

    nll_r = sum_d [softplus(l_rd) - x_rd l_rd],   l = h W^T + b,   G_rd = d nll_r / d l_rd = sigmoid(l_rd) - x_rd

for upstream weights w_r:

    dh = w (G W)        dW = G^T (w h)        db = G^T w

The weights (importance weights need all samples' nll) are known only after the forward, yet one pass is enough: the
forward overwrites the logits, which are its own, with G, and the backward folds w into the small matrices h and G W.
G `[..., D]` itself is read by the two matrix products and by nothing else.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from fastvae import reference
from fastvae._autograd import Grad, Kernels, reference_grads


class LinearBernoulliNLL(Function):
    @staticmethod
    def forward(ctx: Any, kernels: Kernels, h: Tensor, weight: Tensor, bias: Tensor, x: Tensor) -> Tensor:
        logits = torch.nn.functional.linear(h, weight, bias)
        one = logits.new_ones((), dtype=torch.float32).expand(logits.shape[:-1])
        nll, gradient, _ = kernels.bernoulli_nll_with_grad(logits, x, one, None, 0, False, out=logits)
        ctx.save_for_backward(h, weight, bias, x, gradient)
        return nll

    @staticmethod
    def backward(ctx: Any, dnll: Tensor) -> tuple[Any, ...]:
        h, weight, bias, x, gradient = ctx.saved_tensors
        if torch.is_grad_enabled():

            def op(h: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
                return reference.bernoulli_nll(torch.nn.functional.linear(h, weight, bias), x)

            return None, *reference_grads(op, (h, weight, bias), (dnll,)), None
        return None, *_weighted(ctx.needs_input_grad[1:4], dnll, h, weight, gradient), None


def _weighted(
    needed: tuple[bool, ...], dnll: Tensor, h: Tensor, weight: Tensor, gradient: Tensor
) -> tuple[Grad, Grad, Grad]:
    """dh, dW, db from G, those that are needed."""
    w = dnll.to(h.dtype).unsqueeze(-1)
    rows = gradient.flatten(0, -2).t()
    dh = w * (gradient @ weight) if needed[0] else None
    dweight = rows @ (w * h).flatten(0, -2) if needed[1] else None
    dbias = rows @ w.flatten() if needed[2] else None
    return dh, dweight, dbias
