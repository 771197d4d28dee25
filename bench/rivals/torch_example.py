"""The VAE of pytorch/examples as it stands: DataLoader, `ToTensor` of each item, probabilities, `.item()` per step.

Source: https://github.com/pytorch/examples/blob/main/vae/main.py, with the hidden layers a parameter. `ToTensor` of an
8-bit image is written out below as torchvision has it, so that torchvision need not be installed.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn, optim
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset

from bench.rivals import Work
from bench.rivals._torch_model import mlp, test_negative_elbo

REQUIRES = ("torch", "pillow")


class _Items(Dataset[tuple[Tensor, int]]):
    """torchvision.datasets.MNIST with transforms.ToTensor()."""

    def __init__(self, images: Tensor, binarize: str) -> None:
        side = round(images.shape[1] ** 0.5)
        # any number of pixels is an image: a square one where it can be
        self.images = images.view(-1, side, side) if side * side == images.shape[1] else images.unsqueeze(1)
        self.binarize = binarize

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        picture = Image.fromarray(self.images[index].numpy(), mode=None)
        image = torch.from_numpy(np.array(picture, np.uint8, copy=True))
        image = image.view(picture.size[1], picture.size[0], 1).permute((2, 0, 1)).contiguous()
        image = image.to(dtype=torch.float32).div(255)
        return (torch.bernoulli(image) if self.binarize == "dynamic" else image), 0


class _VAE(nn.Module):
    def __init__(self, work: Work, data_dim: int) -> None:
        super().__init__()
        self.data_dim = data_dim
        shapes = work.encoder(data_dim)
        self.body = nn.Sequential(mlp(shapes[:-1]), nn.ReLU())
        self.fc21, self.fc22 = (nn.Linear(shapes[-1][0], work.latent_dim) for _ in range(2))
        self.decoder = mlp(work.decoder(data_dim))

    def logits(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        h = self.body(x)
        mu, logvar = self.fc21(h), self.fc22(h)
        std = torch.exp(0.5 * logvar)
        return self.decoder(mu + torch.randn_like(std) * std), mu, logvar

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        logits, mu, logvar = self.logits(x.view(-1, self.data_dim))
        return torch.sigmoid(logits), mu, logvar


def _loss_function(recon_x: Tensor, x: Tensor, mu: Tensor, logvar: Tensor) -> Tensor:
    bce = F.binary_cross_entropy(recon_x, x.view(len(x), -1), reduction="sum")
    kld = -0.5 * torch.sum(1 + logvar - mu.pow(2) - logvar.exp())
    return bce + kld


class Provider:
    def __init__(self, work: Work) -> None:
        torch.set_num_threads(work.threads)
        torch.manual_seed(0)
        self.work = work
        self.train = torch.from_numpy(work.load("train"))
        self.test = torch.from_numpy(work.load("test")).to(work.device)
        items = _Items(self.train, work.binarize)
        # the example's arguments; the last, smaller batch is left out for the same work everywhere
        on_gpu: dict[str, Any] = {"num_workers": 1, "pin_memory": True} if work.device == "cuda" else {}
        self.loader = DataLoader(items, batch_size=work.batch_size, shuffle=True, drop_last=True, **on_gpu)
        self.batches: Iterator[list[Tensor]] = iter(())
        self.model = _VAE(work, self.train.shape[1]).to(work.device)
        self.optimizer = optim.Adam(self.model.parameters(), lr=work.lr)
        self.train_loss = 0.0

    def run(self, steps: int) -> None:
        for _ in range(steps):
            batch = next(self.batches, None)
            if batch is None:
                self.batches = iter(self.loader)
                batch = next(self.batches)
            data = batch[0].to(self.work.device)
            self.optimizer.zero_grad()
            recon_batch, mu, logvar = self.model(data)
            loss = _loss_function(recon_batch, data, mu, logvar)
            loss.backward()
            self.train_loss += loss.item()
            self.optimizer.step()

    def test_negative_elbo(self) -> float:
        return test_negative_elbo(self.model.logits, self.test, self.work.binarize)
