"""Checkpoints that training does not wait for: it goes on as soon as the tensors are copied, a thread does the rest."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from fastvae.checkpoint import save_checkpoint

__all__ = ["CheckpointWriter"]


class CheckpointWriter:
    """A context manager: at its end, however it ends, the last checkpoint is whole on the disk.

    One is written at a time: `save` waits for the one before. The memory of the copies is used again.
    """

    def __init__(self) -> None:
        self.thread: threading.Thread | None = None
        self.error: BaseException | None = None
        self.copies: dict[str, Tensor] = {}

    def save(self, paths: Sequence[Path], tensors: Mapping[str, Tensor], metadata: Mapping[str, Any]) -> None:
        """Write `tensors` as they are now to each of `paths` (see `save_checkpoint`).

        Raises: FastvaeError if the one before could not be written.
        """
        self.wait()
        self.copies = {name: _copy(tensor, self.copies.get(name)) for name, tensor in tensors.items()}
        devices = {tensor.device for tensor in tensors.values() if tensor.is_cuda}
        arrived = [torch.cuda.current_stream(device).record_event() for device in devices]
        self.thread = threading.Thread(target=self._write, args=(paths, dict(metadata), arrived), name="fastvae saves")
        self.thread.start()

    def wait(self) -> None:
        """Until nothing is being written. Raises: FastvaeError if it could not be written."""
        if self.thread is not None:
            self.thread.join()
            self.thread = None
        error, self.error = self.error, None
        if error is not None:
            raise error

    def __enter__(self) -> CheckpointWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            self.wait()
        elif self.thread is not None:
            # what ended the run is the news
            self.thread.join()

    def _write(self, paths: Sequence[Path], metadata: Mapping[str, Any], arrived: Sequence[torch.cuda.Event]) -> None:
        try:
            for event in arrived:
                event.synchronize()
            for path in paths:
                save_checkpoint(path, self.copies, metadata)
        except BaseException as error:  # whatever it is, `wait` raises it
            self.error = error


def _copy(tensor: Tensor, into: Tensor | None) -> Tensor:
    """On the host, in memory of its own; from a CUDA device the copy is only begun."""
    tensor = tensor.detach()
    if into is None or (into.shape, into.dtype) != (tensor.shape, tensor.dtype):
        into = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
    return into.copy_(tensor, non_blocking=True)
