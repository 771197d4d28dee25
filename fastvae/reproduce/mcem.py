"""Monte Carlo EM without a recognition model: what Figure 3 of Kingma & Welling 2013 compares with (Appendix E).

For each minibatch: one transition of Hamiltonian Monte Carlo of 10 leapfrog steps, adapted to 90 % acceptance, moves
each example's z; then 5 updates of the decoder maximise log p(x|z) there, with the prior N(0, I) on its parameters.
Each example keeps its z from one visit to the next; the first is a draw of the prior.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from fastvae import functional as F
from fastvae import reference
from fastvae.checkpoint import load_checkpoint, save_checkpoint
from fastvae.config import TrainConfig
from fastvae.hmc import Posterior, adapt, transition
from fastvae.models import VAE
from fastvae.step import make_optimizer, stream_seed

__all__ = ["MonteCarloEM"]

LEAPFROG_STEPS = 10
UPDATES = 5
FIRST_STEP_SIZE = 0.1


class MonteCarloEM:
    """Calling it takes a minibatch: a move of its z, and 5 updates. All randomness is a function of (seed, batch).

    Args:
        config: Adagrad's step, the batch size, the weight decay, the seed.
        model: its decoder is trained, its encoder left alone.
        data: the training set `[N, D]` on the device.

    Attributes:
        batches: minibatches taken.
        nll: -log p(x|z) of the last minibatch before its last update, mean, in nats.
    """

    def __init__(self, config: TrainConfig, model: VAE, data: Tensor) -> None:
        self.config, self.model, self.data = config, model, data
        self.optimizer = make_optimizer(config, list(model.decoder.parameters()), len(data))
        self.key = torch.tensor([stream_seed(config.seed)], device=data.device)
        zeros = torch.zeros(len(data), model.latent_dim, device=data.device)
        self.z = F.reparameterize(zeros, zeros, seed=self.key, stream=reference.STREAM_PRIOR)
        self.step_size = torch.full((1,), FIRST_STEP_SIZE, device=data.device)
        self.batches, self.epoch = 0, -1
        self.nll = torch.zeros((), device=data.device)

    def __call__(self) -> None:
        size = self.config.batch_size
        epoch, position = divmod(self.batches, len(self.data) // size)
        if epoch != self.epoch:
            self.epoch, self.order = epoch, reference.permutation(self.key + epoch, len(self.data))
        index, seed = self.order[position * size : (position + 1) * size], self.key + self.batches
        x = F.gather_batch(self.data, index, transform=self.config.transform, seed=seed)
        z, acceptance = transition(
            Posterior(self.model, x),
            self.z[index].unsqueeze(0),
            self.step_size,
            leapfrog_steps=LEAPFROG_STEPS,
            seed=seed,
            number=0,
        )
        self.z[index] = z[0]
        self.step_size = adapt(self.step_size, acceptance.mean())
        for _ in range(UPDATES):
            loss, nll = self.model.decoder_loss(z[0], x)
            self.optimizer.zero_grad(set_to_none=True)
            loss.backward()
            self.optimizer.step()
        self.nll = nll.mean()
        self.batches += 1

    def save(self, path: Path) -> None:
        """Everything that `load` needs to go on bit for bit."""
        tensors = {f"model.{k}": v for k, v in self.model.state_dict().items()}
        for number, state in self.optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer.{number}.{k}": v for k, v in state.items()}
        save_checkpoint(path, tensors | {"z": self.z, "step_size": self.step_size}, {"batches": self.batches})

    def load(self, path: Path) -> None:
        """Go on from `save`."""
        tensors, metadata = load_checkpoint(path)
        self.model.load_state_dict({k[6:]: v for k, v in tensors.items() if k.startswith("model.")})
        state: dict[int, dict[str, Tensor]] = {}
        for name, tensor in tensors.items():
            if name.startswith("optimizer."):
                _, number, key = name.split(".")
                state.setdefault(int(number), {})[key] = tensor
        groups = self.optimizer.state_dict()["param_groups"]
        self.optimizer.load_state_dict({"state": state, "param_groups": groups})
        self.z.copy_(tensors["z"])
        self.step_size.copy_(tensors["step_size"])
        self.batches, self.epoch = int(metadata["batches"]), -1
