"""Initial parameters as the papers have them.

normal: every parameter from N(0, 0.01), as ever in that paper a variance (Kingma & Welling 2013, Section 5).
glorot: weights uniform in +-sqrt(6 / (fan_in + fan_out)), biases 0, but the decoder's last gives the mean image of the
training data, kept within [0.001, 0.999] (Burda et al. 2015 and its published code).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from fastvae.errors import FastvaeError
from fastvae.models import VAE, MLPDecoder

__all__ = ["initialize"]

VARIANCE = 0.01

MEAN_BYTES = 2**28
"""The mean image is that of about so much data (MNIST is less): a mapped file may be larger than memory."""

BLOCK_BYTES = 2**20


@torch.no_grad()
def initialize(model: VAE, init: str, data: Tensor) -> None:
    """Overwrite the parameters of `model` from torch's generator; "torch" leaves them as they are.

    `data` is the training set `[N, D]`, uint8 (x / 255) or float32. Raises FastvaeError for "glorot" and a decoder that
    is no MLP with one output per pixel, or an unknown name.
    """
    if init == "torch":
        return
    if init == "normal":
        for parameter in model.parameters():
            parameter.normal_(0.0, math.sqrt(VARIANCE))
    elif init == "glorot":
        decoder = model.decoder
        if not isinstance(decoder, MLPDecoder) or model.likelihood.outputs_per_element != 1:
            raise FastvaeError("--init glorot belongs to --architecture mlp and --likelihood bernoulli")
        for module in model.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        decoder.head.bias.copy_(torch.logit(_mean_image(data), eps=0.001))
    else:
        raise FastvaeError(f"unknown initialisation {init!r}, expected torch, normal or glorot")


def _mean_image(data: Tensor) -> Tensor:
    """Float64 `[D]`: the mean of all examples, or of evenly spaced blocks of them that make up `MEAN_BYTES`."""
    blocks = data.split(max(1, BLOCK_BYTES * len(data) // data.nbytes))[:: -(-data.nbytes // MEAN_BYTES)]
    mean = torch.stack([block.double().sum(0) for block in blocks]).sum(0) / sum(len(block) for block in blocks)
    return mean / 255.0 if data.dtype == torch.uint8 else mean
