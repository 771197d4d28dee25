"""What a program of ours asks of its process; a library leaves these things to whoever runs it."""

from __future__ import annotations

import ctypes
import gc
import os
import sys

__all__ = ["collect_less_often", "keep_freed_memory", "prepare_process", "wait_a_moment_only"]

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4
SPIN_COUNT = "10000"
OBJECTS_PER_COLLECTION = 10_000


def prepare_process() -> None:
    """All of the following; before PyTorch is imported, as its OpenMP runtime reads its settings once."""
    keep_freed_memory()
    wait_a_moment_only()
    collect_less_often()


def keep_freed_memory() -> None:
    """Keep freed memory for the next allocation instead of giving it back to the system (glibc; elsewhere nothing).

    A training step frees and allocates the same tensors again and again. Those of megabytes are otherwise mapped anew
    each time, and the page faults can take longer than the arithmetic: 12.8 MB are 3,136 of them.
    """
    if sys.platform != "linux":
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(M_MMAP_MAX, 0)
        mallopt(M_TRIM_THRESHOLD, -1)


def wait_a_moment_only() -> None:
    """Have OpenMP's threads wait awake for 0.2 ms, not for 5, unless the environment says otherwise (GNU's runtime).

    Between the kernels of a step they wait for less. Where another process needs their core, they would take it from
    it for nothing, and then the scheduler takes a core from the thread that works.
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", SPIN_COUNT)


def collect_less_often() -> None:
    """Have Python look for garbage after every 10,000 new objects, not 700.

    PyTorch and Numba are hundreds of thousands of objects that stay: to look through them again and again was a fifth
    of the time that a short run takes in all. A training step makes too few objects for it to matter.
    """
    gc.set_threshold(OBJECTS_PER_COLLECTION)
