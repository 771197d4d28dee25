"""When and how a kernel uses more than one thread.

`torch.get_num_threads()` is obeyed, and the threads are torch's own, those of its OpenMP runtime: they still wait awake
for its next product. Others would have to be woken, and to share the cores with these. Tiles are handed out in chunks,
those of a thread's own share to whoever asks first, so that a thread that is not scheduled, because another process has
its core, holds up one chunk at most.

Where the cores are taken, the caller still waits for all threads. So every shared call is compared with what the caller
would have needed alone, and after one that lost time, the kernel is not shared for a while: a short one, as a core is
often away for a moment only, and twice as long after each further loss, until what is lost is a small part of all.
It takes many calls that pay to forget a loss: of a core that is taken, every other time slice may be ours.
"""

from __future__ import annotations

import ctypes
import functools
import os
import time
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch

from ._layout import Plan
from ._native import address_of
from ._record import launch
from ._region import Job, region_of

__all__ = ["run", "team", "worth_sharing"]

# sharing takes 10 to 15 microseconds: less work than this is done sooner alone
_WORTH_SHARING_NS = 30_000
_CHUNKS_PER_THREAD = 4
# a shared call pays if it takes at most this part of the time of the caller alone
_PAYS, _LONGEST_PAUSE = 0.9, 512
# after so many losses a pause is as long as it gets, 64 times what was lost; of them, what a call that pays leaves
_MOST_LOSSES, _FORGETS = 7.0, 0.9


@functools.cache
def _openmp() -> Callable[..., None] | None:
    """`GOMP_parallel` of the OpenMP runtime that torch is linked to; None where it has another interface (Windows)."""
    address = address_of("GOMP_parallel")
    # what all threads of a team call, its argument, their number (the caller is one of them), flags
    form = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint)
    return None if address is None else form(address)


_forked = False


def _work_alone() -> None:
    """In a forked child OpenMP waits for threads that it does not have."""
    global _forked
    _forked = True


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_work_alone)


class _Patience:
    """Whether sharing pays at present."""

    def __init__(self) -> None:
        self.skip, self.losses = 0, 0.0

    def share(self) -> bool:
        if self.skip == 0:
            return True
        self.skip -= 1
        return False

    def learn(self, together: float, alone: float) -> None:
        """Seconds that a shared call took, and that the caller would have needed for it."""
        lost = together - _PAYS * alone
        if lost <= 0.0:
            self.losses *= _FORGETS
            return
        self.losses = min(self.losses + 1.0, _MOST_LOSSES)
        calls = 2.0 ** (self.losses - 1.0) * lost / max(alone, 1e-9)
        # a long call that lost a little is not worth even one without the others
        self.skip = round(min(_LONGEST_PAUSE, calls))


# by kernel and the power of two of its work: a slice of time that another process gets is long for little work, and
# short for much
_patience: defaultdict[tuple[Callable[..., None], int], _Patience] = defaultdict(_Patience)


def team() -> int:
    """How many threads a kernel gets if it is worth sharing."""
    return torch.get_num_threads() if _openmp() is not None and not _forked else 1


def worth_sharing(nanoseconds: float) -> bool:
    """Whether so much work on one thread is done sooner by several."""
    return nanoseconds > _WORTH_SHARING_NS


def run(kernel: Callable[..., None], plan: Plan, nanoseconds: float, *args: Any) -> None:
    """Calls `kernel(first_tile, last_tile, *args)` for all tiles; `nanoseconds` estimates the work on one thread."""
    launch(_run, kernel, plan, nanoseconds, args)


def _run(kernel: Callable[..., None], plan: Plan, nanoseconds: float, args: tuple[Any, ...]) -> None:
    threads = min(team(), plan.tiles) if worth_sharing(nanoseconds) else 1
    if threads < 2:
        kernel(0, plan.tiles, *args)
        return
    patience = _patience[kernel, int(nanoseconds).bit_length()]
    parallel, region = (_openmp(), region_of(kernel)) if patience.share() else (None, None)
    if parallel is None or region is None:
        kernel(0, plan.tiles, *args)
        return
    start = time.perf_counter()
    job = Job(region, plan.tiles, threads, -(-plan.tiles // (threads * _CHUNKS_PER_THREAD)), args)
    parallel(region.address, job.memory, threads, 0)
    patience.learn(time.perf_counter() - start, job.seconds())
