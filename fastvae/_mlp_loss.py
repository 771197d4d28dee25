"""The training loss of a whole MLP autoencoder as one autograd Function, its gradients made in the forward.

    [mu, logvar] = encoder(x),   z = mu + exp(logvar / 2) eps,   loss = mean_b [-log p(x_b|z_b)] + beta mean_b KL_b

with Bernoulli pixels. What a layer at a time cannot do: the activation and the bias are part of a matrix product, its
derivative and the bias gradient are one pass that overwrites the upstream gradient, dlogits overwrites the logits, the
data's gradient is never made, and Python and autograd are entered once.

All gradients lie in one buffer, which the first backward gives up, scaled in place; a second one (`retain_graph`)
computes them again, and one that is itself differentiated (`create_graph`) goes to the reference.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function

from fastvae import functional as F
from fastvae import reference
from fastvae._autograd import Kernels, reference_grads
from fastvae._checks import draw_seed
from fastvae._mlp_gradients import AtHand, nll_kl_gradients

__all__ = ["AtHand", "Layers", "autograd_does_more", "mlp_loss"]

# (weight [O, I], bias [O]) of each layer; all but the last are followed by the activation
Layers = Sequence[tuple[Tensor, Tensor]]

ALIGNMENT = 4
"""Elements: every gradient begins where a 128-bit access may."""


def mlp_loss(
    x: Tensor,
    encoder: Layers,
    decoder: Layers,
    *,
    activation: str,
    seed: Tensor | None,
    beta: float | Tensor,
    example_offset: int = 0,
    write_gradients: bool = False,
    at_hand: AtHand | None = None,
) -> tuple[Tensor | None, Tensor, Tensor] | None:
    """(loss, nll `[B]`, kl `[B]`) for x float32 `[B, D]` in [0, 1], or None where the op by op way must be taken.

    With `write_gradients` its gradients have become the `.grad` of the parameters, and there is no loss: it is the mean
    of nll + beta * kl. `at_hand` is what spares launches then.
    """
    parameters = [tensor for layer in (*encoder, *decoder) for tensor in layer]
    beta_needs_grad = isinstance(beta, Tensor) and beta.requires_grad
    if (
        torch.compiler.is_compiling()
        or not torch.is_grad_enabled()
        or x.requires_grad
        or beta_needs_grad
        or not all(p.requires_grad and p.dtype == torch.float32 and p.is_contiguous() for p in parameters)
        or not x.numel()
        or (write_gradients and autograd_does_more(parameters))
    ):
        return None
    kernels, _ = F.choose_backend("mlp_loss", *parameters, x)
    if kernels is None or not hasattr(kernels, "linear_fwd"):
        return None
    dtype = torch.float32
    if torch.is_autocast_enabled(x.device.type):
        dtype = torch.get_autocast_dtype(x.device.type)
        if dtype != torch.bfloat16 or kernels.supports("bernoulli_nll", x.new_empty(0, dtype=dtype), x):
            return None
    seed = draw_seed(seed, None, x.device)
    options = _Options(beta, example_offset, activation, len(encoder), dtype, at_hand)
    if not write_gradients:
        return _MLPLoss.apply(kernels, x, seed, options, *parameters)
    with torch.no_grad():
        return None, *_nll_kl_gradients(kernels, x, seed, options, parameters, _own_gradients(parameters))


class _Options(NamedTuple):
    beta: float | Tensor
    example_offset: int
    activation: str
    num_encoder_layers: int
    dtype: torch.dtype = torch.float32  # of the products
    at_hand: AtHand | None = None


class _MLPLoss(Function):
    @staticmethod
    def forward(
        ctx: Any,
        kernels: Kernels,
        x: Tensor,
        seed: Tensor,
        options: _Options,
        *parameters: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        ctx.kernels, ctx.options = kernels, options
        ctx.save_for_backward(x, seed, *parameters)
        ctx.gradients = _gradient_buffer(parameters)
        nll, kl = _nll_kl_gradients(kernels, x, seed, options, parameters, ctx.gradients[1])
        ctx.mark_non_differentiable(nll, kl)
        return nll.mean() + options.beta * kl.mean(), nll, kl

    @staticmethod
    def backward(ctx: Any, dloss: Tensor, *_: Any) -> tuple[Any, ...]:
        x, seed, *parameters = ctx.saved_tensors
        constants = (None,) * 4
        if torch.is_grad_enabled():

            def op(*parameters: Tensor) -> Tensor:
                return _reference_loss(x, seed, ctx.options, parameters)

            return *constants, *reference_grads(op, parameters, (dloss,))
        if ctx.gradients is None:
            ctx.gradients = _gradient_buffer(parameters)
            _nll_kl_gradients(ctx.kernels, x, seed, ctx.options, parameters, ctx.gradients[1])
        (buffer, gradients), ctx.gradients = ctx.gradients, None
        ctx.kernels.scale_(buffer, dloss)
        return *constants, *gradients


def autograd_does_more(parameters: Sequence[Tensor]) -> bool:
    """Whether there is more to a backward than one gradient for each: hooks, or one that is used twice."""
    hooked = any(p._backward_hooks or p._post_accumulate_grad_hooks for p in parameters)
    return hooked or len({id(p) for p in parameters}) < len(parameters)


def _gradient_buffer(parameters: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]]:
    """Memory for the gradients of all parameters, and each in it."""
    sizes = [-(-p.numel() // ALIGNMENT) * ALIGNMENT for p in parameters]
    buffer, views, first = parameters[0].new_empty(sum(sizes)), [], 0
    for p, size in zip(parameters, sizes):
        views.append(buffer.as_strided(p.shape, p.stride(), first))
        if p.numel() < size:
            # what lies between is scaled with the rest
            buffer[first + p.numel() : first + size].zero_()
        first += size
    return buffer, views


def _own_gradients(parameters: Sequence[Tensor]) -> list[Tensor]:
    """The `.grad` of each parameter, to be overwritten; made where there is none that a kernel can write."""
    for p in parameters:
        if p.grad is None or p.grad.dtype != p.dtype or not p.grad.is_contiguous() or p.grad.requires_grad:
            p.grad = torch.empty_like(p)
    return [p.grad for p in parameters if p.grad is not None]


def _nll_kl_gradients(
    kernels: Kernels,
    x: Tensor,
    seed: Tensor,
    options: _Options,
    parameters: Sequence[Tensor],
    grads: Sequence[Tensor],
) -> tuple[Tensor, Tensor]:
    """nll `[B]` and kl `[B]`; the gradients of the loss go to `grads`, one of each parameter's shape."""
    # what is done in bfloat16 is said: autocast must not add to it
    with torch.autocast(x.device.type, enabled=False):
        return nll_kl_gradients(kernels, x, seed, parameters, grads, *options)


def _reference_loss(
    x: Tensor,
    seed: Tensor,
    options: _Options,
    parameters: Sequence[Tensor],
) -> Tensor:
    """The loss, differentiable any number of times."""
    beta, example_offset, activation, num_encoder_layers, *_ = options
    layers = list(zip(parameters[::2], parameters[1::2]))

    def mlp(value: Tensor, layers: Layers) -> Tensor:
        for weight, bias in layers[:-1]:
            value = getattr(torch, activation)(torch.nn.functional.linear(value, weight, bias))
        return torch.nn.functional.linear(value, *layers[-1])

    mu, logvar = mlp(x, layers[:num_encoder_layers]).chunk(2, dim=-1)
    z, kl = reference.reparameterize_kl(mu, logvar, seed, example_offset=example_offset)
    nll = reference.bernoulli_nll(mlp(z, layers[num_encoder_layers:]), x)
    return nll.mean() + beta * kl.mean()
