"""The loop that a careful PyTorch user writes by hand: uint8 data in memory, eager, fused Adam, no `.item()`."""

from __future__ import annotations

import torch
from torch import Tensor

from bench.rivals import Work
from bench.rivals._torch_model import PlainVAE, negative_elbo, test_negative_elbo, wait

REQUIRES = ("torch",)


class Provider:
    def __init__(self, work: Work) -> None:
        torch.set_num_threads(work.threads)
        torch.manual_seed(0)
        self.work = work
        self.train, self.test = (torch.from_numpy(work.load(split)).to(work.device) for split in ("train", "test"))
        self.model = PlainVAE(work, self.train.shape[1]).to(work.device)
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=work.lr, fused=True)
        self.batches: list[Tensor] = []

    def loss(self, rows: Tensor) -> Tensor:
        x = self.train[rows].float().div_(255.0)
        x = torch.bernoulli(x) if self.work.binarize == "dynamic" else x
        return negative_elbo(self.model(x), x) / len(x)

    def run(self, steps: int) -> None:
        for _ in range(steps):
            if not self.batches:
                order = torch.randperm(len(self.train), device=self.work.device)
                # whole batches only, as everywhere here
                self.batches = [*order.split(self.work.batch_size)][: len(order) // self.work.batch_size]
            loss = self.loss(self.batches.pop())
            self.optimizer.zero_grad(set_to_none=True)
            loss.backward()
            self.optimizer.step()
        wait(self.work.device)

    def test_negative_elbo(self) -> float:
        return test_negative_elbo(self.model, self.test, self.work.binarize)
