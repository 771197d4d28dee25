# mypy: disable-error-code="import-not-found", allow-subclassing-any
"""pythae: its VAE with networks of these widths, its loss, and the body of its trainer's step over a DataLoader.

Source: pythae.trainers.BaseTrainer.train_step; the trainer itself cannot be stopped between steps.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from pythae.data.datasets import BaseDataset
from pythae.models import VAE, VAEConfig
from pythae.models.base.base_utils import ModelOutput
from pythae.models.nn import BaseDecoder, BaseEncoder
from torch import Tensor, nn
from torch.utils.data import DataLoader

from bench.rivals import Work
from bench.rivals._torch_model import mlp

REQUIRES = ("pythae", "torch")


class _Encoder(BaseEncoder):
    def __init__(self, work: Work, data_dim: int) -> None:
        super().__init__()
        shapes = work.encoder(data_dim)
        self.body = nn.Sequential(mlp(shapes[:-1]), nn.ReLU())
        self.embedding, self.log_var = (nn.Linear(shapes[-1][0], work.latent_dim) for _ in range(2))

    def forward(self, x: Tensor) -> ModelOutput:
        h = self.body(x)
        return ModelOutput(embedding=self.embedding(h), log_covariance=self.log_var(h))


class _Decoder(BaseDecoder):
    def __init__(self, work: Work, data_dim: int) -> None:
        super().__init__()
        self.body = mlp(work.decoder(data_dim))

    def forward(self, z: Tensor) -> ModelOutput:
        return ModelOutput(reconstruction=torch.sigmoid(self.body(z)))


class Provider:
    def __init__(self, work: Work) -> None:
        torch.set_num_threads(work.threads)
        torch.manual_seed(0)
        self.work = work
        self.train = torch.from_numpy(work.load("train"))
        self.test = torch.from_numpy(work.load("test")).to(work.device)
        data_dim = self.train.shape[1]
        config = VAEConfig(input_dim=(data_dim,), latent_dim=work.latent_dim, reconstruction_loss="bce")
        self.model = VAE(config, encoder=_Encoder(work, data_dim), decoder=_Decoder(work, data_dim)).to(work.device)
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=work.lr)
        # float32 once, as its own preprocessing does
        dataset = BaseDataset(self.train.float() / 255.0, torch.zeros(len(self.train)))
        self.loader = DataLoader(dataset, batch_size=work.batch_size, shuffle=True, drop_last=True)
        self.batches: Iterator[Any] = iter(())
        self.epoch_loss = 0.0

    def _loss(self, inputs: Any) -> Tensor:
        inputs["data"] = inputs["data"].to(self.work.device)
        if self.work.binarize == "dynamic":
            inputs["data"] = torch.bernoulli(inputs["data"])
        loss: Tensor = self.model(inputs, epoch=1, dataset_size=len(self.train), uses_ddp=False).loss
        return loss

    def run(self, steps: int) -> None:
        for _ in range(steps):
            inputs = next(self.batches, None)
            if inputs is None:
                self.batches = iter(self.loader)
                inputs = next(self.batches)
            loss = self._loss(inputs)
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
            self.epoch_loss += loss.item()

    @torch.no_grad()
    def test_negative_elbo(self) -> float:
        batches = self.test.split(1000)
        total = sum(float(self._loss({"data": rows.float() / 255.0})) * len(rows) for rows in batches)
        return total / len(self.test)
