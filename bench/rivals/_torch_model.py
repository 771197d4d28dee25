"""The model that the plain PyTorch rivals share: a ReLU MLP, one matrix product for mu and logvar."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bench.rivals import Work


def wait(device: str) -> None:
    """Until the device has done what it was told."""
    if device == "cuda":
        torch.cuda.synchronize()


def mlp(shapes: list[tuple[int, int]]) -> nn.Sequential:
    layers: list[nn.Module] = []
    for inputs, outputs in shapes:
        layers += [nn.Linear(inputs, outputs), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


class PlainVAE(nn.Module):
    def __init__(self, work: Work, data_dim: int) -> None:
        super().__init__()
        self.encoder, self.decoder = mlp(work.encoder(data_dim)), mlp(work.decoder(data_dim))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Logits, mu and logvar."""
        mu, logvar = self.encoder(x).chunk(2, dim=-1)
        z = mu + torch.exp(0.5 * logvar) * torch.randn_like(mu)
        return self.decoder(z), mu, logvar


def negative_elbo(output: tuple[Tensor, Tensor, Tensor], x: Tensor) -> Tensor:
    """Summed over the batch, in nats, from logits, mu and logvar."""
    logits, mu, logvar = output
    nll = F.binary_cross_entropy_with_logits(logits, x, reduction="sum")
    return nll - 0.5 * torch.sum(1 + logvar - mu.pow(2) - logvar.exp())


@torch.no_grad()
def test_negative_elbo(model: Callable[[Tensor], tuple[Tensor, Tensor, Tensor]], test: Tensor, binarize: str) -> float:
    """Mean over the test set with one sample each, in nats; `model` gives logits, mu and logvar."""
    total = 0.0
    for rows in test.split(1000):
        x = rows.float() / 255.0
        x = torch.bernoulli(x) if binarize == "dynamic" else x
        total += float(negative_elbo(model(x), x))
    return total / len(test)
