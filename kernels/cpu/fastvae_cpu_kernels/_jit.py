"""How the kernels are compiled: three decorators over `numba.njit`, and a cache that no edit can leave stale.

Numba stores compiled code on disk under the name of the function and the stamp of its own file. An edit of a file that
it calls into (`_math.py`) would go unseen, so the name of every kernel carries a hash of all sources of this package.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import numba
from numba import types
from numba.core.compiler import Compiler

__all__ = ["kernel", "loop", "routine", "term"]

F = TypeVar("F", bound=Callable[..., Any])


class _NoAlias(Compiler):
    """Tells LLVM that memory which a function writes is reached through one of its pointers only."""

    def __init__(self, typing: Any, target: Any, library: Any, args: Any, returns: Any, flags: Any, types: Any) -> None:
        flags.noalias = True
        super().__init__(typing, target, library, args, returns, flags, types)


# no nnan, no ninf: NaN and infinity propagate as in the reference. No arcp: x / 255 is rounded as PyTorch rounds it
_TERM: dict[str, Any] = {
    "fastmath": {"contract", "nsz"},
    "error_model": "numpy",
    "forceinline": True,
    "no_cpython_wrapper": True,
    "no_cfunc_wrapper": True,
}
# a sum must be reordered before it can be vectorised; the order is fixed when the kernel is compiled
_LOOP: dict[str, Any] = {**_TERM, "fastmath": {"contract", "nsz", "reassoc"}, "pipeline_class": _NoAlias}
_KERNEL: dict[str, Any] = {
    "fastmath": {"contract", "nsz"},
    "error_model": "numpy",
    "nogil": True,
    "no_cfunc_wrapper": True,
}


def _hash_of_sources() -> str:
    digest = hashlib.sha256()
    for source in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(source.name.encode() + b"\0" + source.read_bytes() + b"\0")
    return digest.hexdigest()[:16]


_SOURCES = _hash_of_sources()


def term(function: F) -> F:
    """A pure formula, inlined into its caller; its roundings are those that it states, but for fused multiply-adds."""
    inlined: F = numba.njit(**_TERM)(function)
    return inlined


def loop(function: F) -> F:
    """A loop over contiguous elements, inlined and vectorised; its sums are reordered.

    What it writes must not overlap with anything else that it is given: a kernel that works in place writes to scratch.
    """
    inlined: F = numba.njit(**_LOOP)(function)
    return inlined


def routine(function: F) -> F:
    """A `loop` that is called, not inlined: long code that several kernels share, and that is worth the call."""
    called = numba.njit(**{**_LOOP, "forceinline": False})(function)
    template = called.get_call_template
    # compiled once, not again for each set of arguments that are constants where it is called
    called.get_call_template = lambda args, kwargs: template(tuple(map(types.unliteral, args)), kwargs)
    compiled: F = called
    return compiled


def kernel(function: F) -> F:
    """An entry point: takes addresses and sizes as integers, runs without the GIL, is compiled once per machine.

    Cached beside the sources or, where these are read-only, in the user's cache directory; without either place it is
    compiled by each process.
    """
    function.__qualname__ += f"_{_SOURCES}"
    try:
        compiled: F = numba.njit(cache=True, **_KERNEL)(function)
    except RuntimeError:  # numba found no directory to write to
        compiled = numba.njit(**_KERNEL)(function)
    return compiled
