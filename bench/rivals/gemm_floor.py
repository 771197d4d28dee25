"""The floor: the matrix products of one training step and nothing else, written to buffers that stay.

For each layer x [B, I] -> y [B, O] with W [O, I]: y = x W^T, dW = dy^T x, and dx = dy W for all but the first layer,
whose input is data. Elementwise work, data, loss and optimiser cost nothing here.
"""

from __future__ import annotations

import torch
from torch import Tensor

from bench.rivals import Work
from bench.rivals._torch_model import wait

REQUIRES = ("torch",)


class _Layer:
    """The buffers of one layer, and its products."""

    def __init__(self, batch: int, inputs: int, outputs: int, device: str, *, needs_dx: bool) -> None:
        generator = torch.Generator().manual_seed(0)

        def buffer(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator).to(device)

        self.x, self.w, self.y = buffer(batch, inputs), buffer(outputs, inputs), buffer(batch, outputs)
        self.dy, self.dw = buffer(batch, outputs), buffer(outputs, inputs)
        self.dx = buffer(batch, inputs) if needs_dx else None

    def forward(self) -> None:
        torch.mm(self.x, self.w.t(), out=self.y)

    def backward(self) -> None:
        torch.mm(self.dy.t(), self.x, out=self.dw)
        if self.dx is not None:
            torch.mm(self.dy, self.w, out=self.dx)


class Provider:
    def __init__(self, work: Work) -> None:
        torch.set_num_threads(work.threads)
        self.device = work.device
        data_dim = work.load("test").shape[1]
        shapes = work.encoder(data_dim) + work.decoder(data_dim)
        self.layers = [_Layer(work.batch_size, i, o, work.device, needs_dx=n > 0) for n, (i, o) in enumerate(shapes)]

    @torch.no_grad()
    def run(self, steps: int) -> None:
        for _ in range(steps):
            for layer in self.layers:
                layer.forward()
            for layer in reversed(self.layers):
                layer.backward()
        wait(self.device)
