"""When and how a kernel uses more than one thread.

`torch.get_num_threads()` is obeyed. Tiles are handed out in chunks, each to whoever asks first, and nobody spins: a
helper that is not scheduled, because another process or another pool has its core, costs nothing, as its chunks are
done by others. Numba's own pools split the work evenly in advance and wait at a barrier for the slowest.

Where the cores are taken, the caller may still wait for a helper that was stopped in the middle of a chunk. So every
shared call is compared with what the caller would have needed alone, and after one that did not pay, the next 1, 2, 4,
... calls are not shared.
"""

from __future__ import annotations

import os
import queue
import threading
import time
from collections.abc import Callable
from typing import Any

import torch

from ._layout import Plan
from ._record import launch

__all__ = ["run"]

# waking a helper takes 50 microseconds, and longer where torch's own threads still spin on its core, so that less work
# than this is done sooner alone (Adam of 650,000 parameters: 332 microseconds alone, 472 with a helper)
_WORTH_SHARING_NS = 500_000
_CHUNKS_PER_THREAD = 4
# a shared call pays if it takes at most this part of the time of the caller alone
_PAYS, _LONGEST_PAUSE = 0.9, 512


class _Job:
    """Chunks of tiles, taken one at a time by the caller and its helpers."""

    def __init__(self, kernel: Callable[..., None], tiles: int, chunk: int, args: tuple[Any, ...]) -> None:
        self.kernel, self.tiles, self.chunk, self.args = kernel, tiles, chunk, args
        self.next_tile = 0
        self.busy = 0
        self.changed = threading.Condition()

    def work(self) -> int:
        """Does chunks while there are any; returns the number of tiles done."""
        done = 0
        while True:
            with self.changed:
                first = self.next_tile
                if first >= self.tiles:
                    return done
                self.next_tile = last = min(first + self.chunk, self.tiles)
                self.busy += 1
            try:
                self.kernel(first, last, *self.args)
                done += last - first
            finally:
                with self.changed:
                    self.busy -= 1
                    self.changed.notify_all()

    def wait(self) -> None:
        with self.changed:
            self.changed.wait_for(lambda: self.busy == 0)


_jobs: queue.SimpleQueue[_Job] = queue.SimpleQueue()
_helpers = 0
_starting = threading.Lock()


def _help() -> None:
    while True:
        _jobs.get().work()


def _start_helpers(wanted: int) -> None:
    global _helpers
    with _starting:
        while _helpers < wanted:
            threading.Thread(target=_help, name=f"fastvae-{_helpers}", daemon=True).start()
            _helpers += 1


def _forget_helpers() -> None:
    """After a fork the child has the queue but not the threads."""
    global _helpers, _jobs, _starting
    _helpers, _jobs, _starting = 0, queue.SimpleQueue(), threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_helpers)


class _Patience:
    """Whether sharing pays at present."""

    def __init__(self) -> None:
        self.pause, self.skip = 0, 0

    def share(self) -> bool:
        if self.skip == 0:
            return True
        self.skip -= 1
        return False

    def learn(self, paid: bool) -> None:
        self.pause = 0 if paid else min(_LONGEST_PAUSE, max(1, 2 * self.pause))
        self.skip = self.pause


_patience = _Patience()


def run(kernel: Callable[..., None], plan: Plan, nanoseconds: float, *args: Any) -> None:
    """Calls `kernel(first_tile, last_tile, *args)` for all tiles; `nanoseconds` estimates the work on one thread."""
    launch(_run, kernel, plan, nanoseconds, args)


def _run(kernel: Callable[..., None], plan: Plan, nanoseconds: float, args: tuple[Any, ...]) -> None:
    threads = 1
    if nanoseconds > _WORTH_SHARING_NS:
        threads = min(torch.get_num_threads(), plan.tiles)
    if threads <= 1 or not _patience.share():
        kernel(0, plan.tiles, *args)
        return
    _start_helpers(threads - 1)
    start, start_of_work = time.perf_counter(), time.thread_time()
    job = _Job(kernel, plan.tiles, -(-plan.tiles // (threads * _CHUNKS_PER_THREAD)), args)
    for _ in range(threads - 1):
        _jobs.put(job)
    own_tiles = job.work()
    own_time = time.thread_time() - start_of_work
    job.wait()
    alone = own_time * plan.tiles / max(1, own_tiles)
    _patience.learn(time.perf_counter() - start < _PAYS * alone)
