"""Where a run's data is: on the device, or on the host and streamed from there."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

import torch
from torch import Tensor

from fastvae.config import TrainConfig
from fastvae.data import Dataset
from fastvae.distributed import Ranks
from fastvae.step import stream_seed
from fastvae.stream import BatchStream, HostRows

__all__ = ["fits_on", "placed"]


def fits_on(device: torch.device, num_bytes: int) -> bool:
    """Whether data takes at most half of the device's free memory (CPU: of the memory that there is)."""
    if device.type == "cuda":
        memory = torch.cuda.mem_get_info(device)[0]
    elif hasattr(os, "sysconf"):
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    else:
        return True
    return 2 * num_bytes <= memory


@contextlib.contextmanager
def placed(
    dataset: Dataset, config: TrainConfig, device: torch.device, num_steps: int, ranks: Ranks
) -> Iterator[tuple[Tensor | BatchStream, Tensor | HostRows]]:
    """Training and test data, on the device or on the host, as `config` and the device's memory have it."""
    if config.data_on == "device" or (config.data_on == "auto" and fits_on(device, dataset.num_bytes)):
        yield dataset.train.to(device), dataset.test.to(device)
        return
    rows = HostRows(dataset.train, dataset.train_file, random_access=True)
    key, batch_size = stream_seed(config.seed), config.batch_size
    with BatchStream(rows, key=key, batch_size=batch_size, num_steps=num_steps, device=device, ranks=ranks) as stream:
        yield stream, HostRows(dataset.test, dataset.test_file)
