"""The wake-sleep algorithm, the baseline of Kingma & Welling 2013: same encoder, same decoder, two losses.

    wake:   -log p(x|z),     z ~ q(z|x),                    differentiated in the decoder alone
    sleep:  -log q(z'|x'),   z' ~ p(z), x' ~ p(x'|z'),      differentiated in the encoder alone

Their sum is what is minimised; it bounds nothing. A dream (z', x') is a draw of the model, binary for Bernoulli pixels.

Source: Hinton, Dayan, Frey & Neal 1995, "The wake-sleep algorithm for unsupervised neural networks".
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fastvae import functional as F
from fastvae import reference

if TYPE_CHECKING:
    from fastvae.models import VAE

__all__ = ["wake_sleep"]


def wake_sleep(vae: VAE, x: Tensor, *, seed: Tensor, example_offset: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """The loss, and what the same draw says of the bound on log p(x): nll and KL.

    Args:
        vae: its encoder and decoder get gradients from the loss.
        x: data `[B, D]`, floating point in [0, 1].
        seed: int64 `[1]`; the dreams draw from streams of their own.
        example_offset: global index of the batch's first example.

    Returns:
        loss (scalar, the mean over the batch of both terms), nll `[B]` and kl `[B]`, without gradient, in nats.
    """
    with torch.no_grad():
        z, kl = F.reparameterize_kl(*vae.encode(x), seed=seed, example_offset=example_offset)
        prior = torch.zeros_like(z)
        dream_z = F.reparameterize(
            prior, prior, seed=seed, example_offset=example_offset, stream=reference.STREAM_PRIOR
        )
        # the streams of p(x|z) may have served the data of this step: the complement of its seed is unused
        dream_x = vae.likelihood.sample(vae.decode(dream_z), seed=~seed, example_offset=example_offset)
    wake, nll = vae.decoder_loss(z, x)
    sleep = F.gaussian_nll(*vae.encode(dream_x), dream_z).mean()
    return wake + sleep, nll.detach(), kl
