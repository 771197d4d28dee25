"""The C library's allocator, told that this process will need its memory again."""

from __future__ import annotations

import ctypes
import sys

__all__ = ["keep_freed_memory"]

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4


def keep_freed_memory() -> None:
    """Keep freed memory for the next allocation instead of giving it back to the system (glibc; elsewhere nothing).

    A training step frees and allocates the same tensors again and again. Those of megabytes are otherwise mapped anew
    each time, and the page faults can take longer than the arithmetic: 12.8 MB are 3,136 of them. For programs, not for
    libraries: the setting is the whole process's.
    """
    if sys.platform != "linux":
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(M_MMAP_MAX, 0)
        mallopt(M_TRIM_THRESHOLD, -1)
