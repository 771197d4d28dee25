"""C functions that are in the process anyway: of torch's OpenMP runtime, of its BLAS, of the C library."""

from __future__ import annotations

import ctypes
import functools

import torch

__all__ = ["address_of"]


@functools.cache
def address_of(name: str) -> int | None:
    """Where the function is, in a library that torch is linked to; None where none has it."""
    function = getattr(ctypes.CDLL(torch._C.__file__), name, None)
    return None if function is None else ctypes.cast(function, ctypes.c_void_p).value
