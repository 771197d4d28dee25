"""Training data that stays on the host: larger than the device's memory, or than the host's own.

A thread gathers the rows of the next batch out of the mapped file while the device works on this one. On CUDA it
gathers into pinned memory and copies on a stream of its own. Order, noise and numbers are those of data on the device.

Resident memory does not grow with the data: rows that have been read are given back to the page cache, and the order of
an epoch takes one byte per example.
"""

from __future__ import annotations

import mmap
import queue
import threading
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fastvae import reference
from fastvae.array_files import advise
from fastvae.distributed import Ranks

__all__ = ["BatchStream", "EpochOrder", "HostRows"]

MAPPED_BYTES = 128 * 2**20
"""About how much of a file is in this process's memory at most."""

FAULT_BYTES = 64 * 2**10
"""What Linux maps around a byte that is read, if it is in the page cache."""

BUCKET = 2**20
"""About how many examples of an epoch are put in order at a time."""

CHUNK = 2**15
"""torch does elementwise work of this size in the calling thread alone: no second pool of threads fights the step's."""

SLOTS = 2


class HostRows:
    """Rows `[N, D]` on the host, copied out of `data` in pieces; `file` is the map that `data` is a view of, if any."""

    def __init__(self, data: Tensor, file: mmap.mmap | None, *, random_access: bool = False) -> None:
        self.array: NDArray[Any] = data.numpy()
        self.file, self.mapped = file, 0
        self.dtype = data.dtype
        if file is not None and random_access:
            # the file would otherwise be read ahead around each row; whole pages of these rows only
            start = data.data_ptr() - np.frombuffer(file, np.uint8).ctypes.data
            first, end = -(-start // mmap.PAGESIZE) * mmap.PAGESIZE, start + data.nbytes
            advise(file, "MADV_RANDOM", first, max(0, end - first))

    def __len__(self) -> int:
        return len(self.array)

    def __getitem__(self, rows: slice | int) -> Tensor:
        taken = torch.from_numpy(self.array[rows].copy())
        self._has_read(taken.nbytes, places=1)
        return taken

    def take(self, index: NDArray[np.int64], out: NDArray[Any]) -> None:
        """Rows `index` `[B]` into `out` `[B, D]`, in the calling thread, without Python's lock."""
        # "clip" writes straight into `out`; no index is out of range
        np.take(self.array, index, axis=0, out=out, mode="clip")
        self._has_read(out.nbytes, places=len(index))

    def _has_read(self, num_bytes: int, places: int) -> None:
        self.mapped += num_bytes + FAULT_BYTES * places
        if self.mapped > MAPPED_BYTES:
            self.mapped = 0
            advise(self.file, "MADV_DONTNEED")


class EpochOrder:
    """`reference.permutation(seed, N)`, one part at a time: equal to it, in N bytes and no more than a few buckets.

    The permutation sorts the examples by random 62-bit keys. Examples whose keys begin with the same few bits are a
    bucket, and stand together in the order: it is enough to remember each one's bucket, and to sort the one in use.
    """

    def __init__(self, seed: Tensor, num_examples: int) -> None:
        self.seed = seed
        bits = min(8, (num_examples // BUCKET).bit_length())
        self.bucket_of = np.empty(num_examples, np.uint8)
        counts = np.zeros(2**bits, np.int64)
        for start in range(0, num_examples, CHUNK):
            keys = reference.shuffle_keys(seed, torch.arange(start, min(start + CHUNK, num_examples)))
            buckets = (keys >> (62 - bits)).numpy()
            self.bucket_of[start : start + CHUNK] = buckets
            counts += np.bincount(buckets, minlength=len(counts))
        self.start_of = np.concatenate([[0], np.cumsum(counts)])
        self.sorted, self.bucket = np.empty(0, np.int64), -1

    def __call__(self, first: int, last: int) -> NDArray[np.int64]:
        """The examples at positions `first` to `last - 1` of the epoch."""
        parts = []
        while first < last:
            bucket = int(np.searchsorted(self.start_of, first, side="right")) - 1
            start, end = self.start_of[bucket], min(last, self.start_of[bucket + 1])
            parts.append(self._in_order(bucket)[first - start : end - start])
            first = end
        return np.concatenate(parts)

    def _in_order(self, bucket: int) -> NDArray[np.int64]:
        if bucket != self.bucket:
            members = torch.from_numpy(np.flatnonzero(self.bucket_of == bucket))
            keys = torch.cat([reference.shuffle_keys(self.seed, part) for part in members.split(CHUNK)])
            self.sorted = members.numpy()[np.argsort(keys.numpy(), kind="stable")]
            self.bucket = bucket
        return self.sorted


class _Slot:
    """The memory of one batch on its way: on the host, on CUDA also on the device, with what its copies wait for."""

    def __init__(self, shape: tuple[int, int], dtype: torch.dtype, device: torch.device) -> None:
        self.host = torch.empty(shape, dtype=dtype, pin_memory=device.type == "cuda")
        if device.type == "cuda":
            self.device = torch.empty(shape, dtype=dtype, device=device)
            self.arrived, self.left = torch.cuda.Event(), torch.cuda.Event()


class BatchStream:
    """The batches of a run, one after the other: `load(number)`, then `batch` `[B / ranks, D]` is that of the step.

    Args:
        rows: the training set.
        key: of the run's step 0; epoch e has the order `reference.permutation(key + e, N)`.
        batch_size: B, over all ranks.
        num_steps: where the run ends.
        device: where `batch` is to be, at one address, which a graph may read.
        ranks: this rank takes its part of each batch.

    Use as a context manager, which ends the thread.
    """

    def __init__(
        self, rows: HostRows, *, key: int, batch_size: int, num_steps: int, device: torch.device, ranks: Ranks
    ) -> None:
        self.rows, self.key, self.batch_size, self.num_steps = rows, key, batch_size, num_steps
        self.device, self.dtype = device, rows.dtype
        self.part = ranks.part(batch_size)
        shape = (self.part[1] - self.part[0], rows.array.shape[1])
        self.batch = torch.zeros(shape, dtype=rows.dtype, device=device)
        self.copies = torch.cuda.Stream(device) if device.type == "cuda" else None
        self.thread: threading.Thread | None = None
        self.empty: queue.SimpleQueue[_Slot | None] = queue.SimpleQueue()
        self.full: queue.SimpleQueue[_Slot | BaseException] = queue.SimpleQueue()
        for _ in range(SLOTS):
            self.empty.put(_Slot(shape, rows.dtype, device))

    def __len__(self) -> int:
        return len(self.rows)

    def __enter__(self) -> BatchStream:
        return self

    def __exit__(self, *_: object) -> None:
        if self.thread is not None:
            self.empty.put(None)
            self.thread.join()

    def load(self, number: int) -> None:
        """Make `batch` that of step `number`; the first call decides where the stream begins."""
        if self.thread is None:
            self.thread = threading.Thread(target=self._run, args=(number,), name="fastvae batches", daemon=True)
            self.thread.start()
        slot = self.full.get()
        if isinstance(slot, BaseException):
            raise slot
        if self.copies is None:
            self.batch.copy_(slot.host)
            self.empty.put(slot)
        else:
            stream = torch.cuda.current_stream(self.device)
            stream.wait_event(slot.arrived)
            self.batch.copy_(slot.device)
            slot.left.record(stream)
            self.empty.put(slot)

    def _run(self, first: int) -> None:
        try:
            steps_per_epoch = len(self.rows) // self.batch_size
            order, order_epoch = None, -1
            for number in range(first, self.num_steps):
                slot = self.empty.get()
                if slot is None:
                    return
                epoch, position = divmod(number, steps_per_epoch)
                if order is None or epoch != order_epoch:
                    order = None  # two at a time would be twice the memory
                    order, order_epoch = EpochOrder(torch.tensor([self.key]) + epoch, len(self.rows)), epoch
                start = position * self.batch_size
                self._fill(slot, order(start + self.part[0], start + self.part[1]))
                self.full.put(slot)
        except BaseException as error:  # whatever it is, the step that waits for the batch is to raise it
            self.full.put(error)

    def _fill(self, slot: _Slot, index: NDArray[np.int64]) -> None:
        if self.copies is None:
            self.rows.take(index, slot.host.numpy())
            return
        slot.arrived.synchronize()
        self.rows.take(index, slot.host.numpy())
        with torch.cuda.stream(self.copies):
            self.copies.wait_event(slot.left)
            slot.device.copy_(slot.host, non_blocking=True)
            slot.arrived.record(self.copies)
