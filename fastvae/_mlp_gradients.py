"""The gradients of an MLP autoencoder's loss in as few launches and bytes as there can be.

Column sums (gradients of biases) are left by the kernels that pass over the data anyway; on a GPU as partial sums, like
the losses, all added up in one launch at the end. Under bfloat16 the float32 weights are cast once; products,
activations and their gradients are bfloat16, losses, sums and the gradients of the weights float32: autocast rounds the
latter to bfloat16.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fastvae import reference
from fastvae._autograd import Kernels

__all__ = ["AtHand", "nll_kl_gradients"]


class AtHand(NamedTuple):
    """What a training step has already: constants, where its batch is from, and the parameters in bfloat16."""

    row_weights: Tensor  # float32 [2]: 1 / B, beta / B
    rows: tuple[Tensor, Tensor] | None = None  # data [N, D], index [B]: row index[b] is x[b] before it was scaled
    low: Mapping[Tensor, Tensor] | None = None  # by parameter


def nll_kl_gradients(
    kernels: Kernels,
    x: Tensor,
    seed: Tensor,
    parameters: Sequence[Tensor],
    grads: Sequence[Tensor],
    beta: float | Tensor,
    example_offset: int,
    activation: str,
    num_encoder_layers: int,
    dtype: torch.dtype,
    at_hand: AtHand | None,
) -> tuple[Tensor, Tensor]:
    """nll `[B]` and kl `[B]`; the gradients of the loss go to `grads`, weights and biases taking turns."""
    B = len(x)
    if at_hand is None:
        at_hand = AtHand(torch.full((2,), 1.0 / B, device=x.device))
        at_hand.row_weights[1:] *= beta
    nll_weight, kl_weight = (weight.expand(B) for weight in at_hand.row_weights)
    if dtype == torch.float32:
        low = list(parameters)
    else:
        low = _cast(parameters, dtype) if at_hand.low is None else [at_hand.low[p] for p in parameters]
    h = x.to(dtype)
    weights, biases, dweights = low[::2], low[1::2], grads[::2]
    sums = kernels.ColumnSums(grads[1::2], B)

    def forward(h: Tensor, layers: range) -> list[Tensor]:
        """The input of every layer, then the output of the last."""
        values = [h]
        for i in layers:
            how = activation if i < layers[-1] else "none"
            values.append(kernels.linear_fwd(values[-1], weights[i], biases[i], how))
        return values

    def backward(dy: Tensor, values: list[Tensor], layers: range) -> Tensor:
        """The gradient of the first layer's output before its activation."""
        for i, y in zip(reversed(layers[1:]), reversed(values[1:-1])):
            dy = kernels.hidden_bwd(dy, y, weights[i], activation, dweights[i], sums.parts[i - 1])
        return dy

    encoder, decoder = range(num_encoder_layers), range(num_encoder_layers, len(weights))
    encoded = forward(h, encoder)
    mu, logvar = encoded[-1].chunk(2, dim=-1)
    z, kl, _ = kernels.reparameterize_kl_fwd(mu, logvar, seed, example_offset, reference.STREAM_NOISE, False)
    decoded = forward(z, decoder)

    logits = decoded[-1]
    data, *index = at_hand.rows or (x,)
    nll, dlogits, _ = kernels.bernoulli_nll_with_grad(logits, data, nll_weight, None, 0, sums.parts[-1], logits, *index)
    dy = backward(dlogits, decoded, decoder)
    dz = kernels.linear_bwd(dy, z, weights[decoder[0]], True, dweights[decoder[0]])

    dout, last = torch.empty_like(encoded[-1]), encoder[-1]
    noise = seed, example_offset, reference.STREAM_NOISE
    kernels.reparameterize_kl_bwd(dz, kl_weight, mu, logvar, *noise, tuple(dout.chunk(2, dim=-1)), sums.parts[last])
    dy = backward(dout, encoded, encoder)
    kernels.linear_bwd(dy, h, weights[0], False, dweights[0])
    return sums.finish(nll), kl


def _cast(parameters: Sequence[Tensor], dtype: torch.dtype) -> list[Tensor]:
    low = [torch.empty_like(p, dtype=dtype) for p in parameters]
    torch._foreach_copy_(low, list(parameters))
    return low
