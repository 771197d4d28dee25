"""The providers of `bench.train`: one module each, each run in a process of its own by `python -m bench.rivals`.

Every module defines `Provider(work)` with `run(steps)`, which returns when these steps are done; `REQUIRES`, the
distributions it needs; and, if it can be asked for a test loss, `test_negative_elbo()` in nats. All do the same work:
the model, batch, binarisation and learning rate of `Work`, Adam, data shuffled each epoch, one sample of the noise.

Nothing here is imported by the library. `Work` needs numpy only, because JAX lives in this folder as well.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

__all__ = ["FLOOR", "OURS", "PROVIDERS", "Work"]

FLOOR, OURS = "gemm_floor", "fastvae"

PROVIDERS = {
    FLOOR: "bare loop of the step's matrix products: the floor",
    OURS: "this trainer's step",
    "resident": "hand-written eager loop, data in memory, fused Adam",
    "compiled": "torch.compile of that loop",
    "torch_example": "pytorch/examples vae: DataLoader, ToTensor per item",
    "pythae": "pythae's model and training step",
    "pyro_svi": "Pyro, SVI with the analytic KL",
    "numpyro_svi": "NumPyro, SVI with the analytic KL, jitted epoch",
    "jax_loop": "hand-written JAX, jitted epoch",
}


@dataclass(frozen=True)
class Work:
    """What every provider does, so that images per second mean the same."""

    hidden: tuple[int, ...]
    """Widths from the data to the latent space."""
    latent_dim: int
    batch_size: int
    binarize: str
    """none: grey levels in [0, 1]; dynamic: Bernoulli draws at each step."""
    threads: int
    device: str
    """cpu, or cuda, which JAX takes by itself where it can."""
    data: str
    """Folder with train.npy and test.npy, uint8 `[N, D]`."""
    lr: float = 1e-3

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> Work:
        return cls(**{**fields, "hidden": tuple(fields["hidden"])})

    def load(self, split: str) -> np.ndarray[Any, np.dtype[np.uint8]]:
        """The examples of a split, uint8 `[N, D]`, in memory."""
        examples: np.ndarray[Any, np.dtype[np.uint8]] = np.load(Path(self.data) / f"{split}.npy")
        return examples

    def encoder(self, data_dim: int) -> list[tuple[int, int]]:
        """(inputs, outputs) of the encoder's layers; the last makes mu and logvar."""
        return list(pairwise([data_dim, *self.hidden, 2 * self.latent_dim]))

    def decoder(self, data_dim: int) -> list[tuple[int, int]]:
        """(inputs, outputs) of the decoder's layers; the last makes the logits."""
        return list(pairwise([self.latent_dim, *reversed(self.hidden), data_dim]))
