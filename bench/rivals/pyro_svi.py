# mypy: disable-error-code="import-not-found"
"""Pyro: its VAE example (SVI over a DataLoader of tensors) with the analytic KL, logits and data in memory.

Source: https://pyro.ai/examples/vae.html.
"""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import torch
from pyro.infer import SVI, TraceMeanField_ELBO
from torch import Tensor, nn

from bench.rivals import Work
from bench.rivals._torch_model import mlp

REQUIRES = ("pyro-ppl", "torch")


class _VAE(nn.Module):
    def __init__(self, work: Work, data_dim: int) -> None:
        super().__init__()
        self.latent_dim = work.latent_dim
        self.encoder, self.decoder = mlp(work.encoder(data_dim)), mlp(work.decoder(data_dim))

    def model(self, x: Tensor) -> None:
        pyro.module("decoder", self.decoder)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(len(x), self.latent_dim), 1.0).to_event(1))
            likelihood = dist.Bernoulli(logits=self.decoder(z), validate_args=False)
            pyro.sample("obs", likelihood.to_event(1), obs=x)

    def guide(self, x: Tensor) -> None:
        pyro.module("encoder", self.encoder)
        with pyro.plate("data", len(x)):
            mu, logvar = self.encoder(x).chunk(2, dim=-1)
            pyro.sample("z", dist.Normal(mu, torch.exp(0.5 * logvar)).to_event(1))


class Provider:
    def __init__(self, work: Work) -> None:
        torch.set_num_threads(work.threads)
        # the parameters of an earlier provider in this process
        pyro.clear_param_store()
        pyro.set_rng_seed(0)
        pyro.enable_validation(False)
        self.work = work
        self.train, self.test = (torch.from_numpy(work.load(split)).to(work.device) for split in ("train", "test"))
        vae = _VAE(work, self.train.shape[1]).to(work.device)
        self.svi = SVI(vae.model, vae.guide, pyro.optim.Adam({"lr": work.lr}), TraceMeanField_ELBO())
        self.batches: list[Tensor] = []

    def _batch(self, rows: Tensor) -> Tensor:
        x = rows.float().div_(255.0)
        return torch.bernoulli(x) if self.work.binarize == "dynamic" else x

    def run(self, steps: int) -> None:
        for _ in range(steps):
            if not self.batches:
                order = torch.randperm(len(self.train), device=self.work.device)
                self.batches = [*order.split(self.work.batch_size)][: len(order) // self.work.batch_size]
            self.svi.step(self._batch(self.train[self.batches.pop()]))

    def test_negative_elbo(self) -> float:
        return sum(self.svi.evaluate_loss(self._batch(rows)) for rows in self.test.split(1000)) / len(self.test)
