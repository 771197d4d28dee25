"""How the kernels are compiled: four decorators over `numba.njit`, and a cache that no edit can leave stale.

Numba stores compiled code on disk under the name of the function and the stamp of its own file. An edit of a file that
it calls into (`_math.py`) would go unseen, so the name of every kernel carries a hash of all sources of this package.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import hashlib
import inspect
from collections.abc import Callable, Hashable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import llvmlite.binding
import numba
from numba import types
from numba.core import cgutils
from numba.core.codegen import JITCodeLibrary
from numba.core.compiler import Compiler
from numba.core.dispatcher import Dispatcher
from numba.extending import intrinsic

__all__ = ["kernel", "loop", "routine", "term"]

F = TypeVar("F", bound=Callable[..., Any])


class _NoAlias(Compiler):
    """Tells LLVM that memory which a function writes is reached through one of its pointers only."""

    def __init__(self, typing: Any, target: Any, library: Any, args: Any, returns: Any, flags: Any, types: Any) -> None:
        flags.noalias = True
        super().__init__(typing, target, library, args, returns, flags, types)


class _LinkedIn(JITCodeLibrary):
    """Code for others to inline. No machine code is made of it alone, which would be a tenth of all compilation."""

    def _finalize_final_module(self) -> None:
        self._finalized = True


class _Inlined(Compiler):
    """Compiles a function that compiled code calls, nobody else, and always inlines."""

    def __init__(self, typing: Any, target: Any, library: Any, args: Any, returns: Any, flags: Any, types: Any) -> None:
        flags.no_compile = True
        super().__init__(typing, target, _LinkedIn(target.codegen(), "inlined"), args, returns, flags, types)

    def compile_extra(self, function: Any) -> Any:
        compiled = super().compile_extra(function)
        # callers find it by an entry point for Python, of which Numba demands that it be a built-in function
        entry: Any = [].append
        self.state.targetctx.insert_user_function(entry, compiled.fndesc, [compiled.library])
        return compiled._replace(entry_point=entry)


class _InlinedNoAlias(_Inlined, _NoAlias):
    pass


# no nnan, no ninf: NaN and infinity propagate as in the reference. No arcp: x / 255 is rounded as PyTorch rounds it
_FORMULA: dict[str, Any] = {"fastmath": {"contract", "nsz"}, "error_model": "numpy"}
# a sum must be reordered before it can be vectorised; the order is fixed when the kernel is compiled
_REORDERED: dict[str, Any] = {**_FORMULA, "fastmath": {"contract", "nsz", "reassoc"}}
# called by compiled code alone
_INTERNAL: dict[str, Any] = {"no_cpython_wrapper": True, "no_cfunc_wrapper": True}
_INLINED: dict[str, Any] = {**_INTERNAL, "forceinline": True}
_ROUTINE: dict[str, Any] = {**_REORDERED, **_INTERNAL, "pipeline_class": _NoAlias}
_KERNEL: dict[str, Any] = {**_FORMULA, "nogil": True, "no_cfunc_wrapper": True}
# the types of a routine's arguments, by their annotations
_TYPES = {
    "None": types.none,
    "int": types.int64,
    "Floats": types.CPointer(types.float32),
    "Words": types.CPointer(types.uint32),
}


def _hash_of_sources() -> str:
    digest = hashlib.sha256()
    for source in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(source.name.encode() + b"\0" + source.read_bytes() + b"\0")
    return digest.hexdigest()[:16]


_SOURCES = _hash_of_sources()


def _stored(function: Callable[..., Any], **options: Any) -> Any:
    """Compiled and cached beside the sources or, where these are read-only, in the user's cache directory.

    Without either place each process compiles for itself.
    """
    function.__qualname__ += f"_{_SOURCES}"
    try:
        return numba.njit(cache=True, **options)(function)
    except RuntimeError:  # numba found no directory to write to
        return numba.njit(**options)(function)


def term(function: F) -> F:
    """A pure formula, inlined into its caller; its roundings are those that it states, but for fused multiply-adds."""
    inlined: F = numba.njit(**_FORMULA, **_INLINED, pipeline_class=_Inlined)(function)
    return inlined


def loop(function: F) -> F:
    """A loop over contiguous elements, inlined and vectorised; its sums are reordered.

    What it writes must not overlap with anything else that it is given: a kernel that works in place writes to scratch.
    """
    inlined: F = numba.njit(**_REORDERED, **_INLINED, pipeline_class=_InlinedNoAlias)(function)
    return inlined


class _Routine(NamedTuple):
    symbol: str
    dispatcher: Any
    arguments: tuple[Any, ...]


# by what is called in their place
_routines: dict[Any, _Routine] = {}


def routine(function: F) -> F:
    """A `loop` that is called, not inlined: long code that several kernels share, and that is worth the call.

    It is compiled once, with the types of its annotations, and not again as a part of each kernel that calls it: a
    kernel knows its symbol, and `_define` tells LLVM where that is. It returns nothing and cannot fail.
    """
    *arguments, returns = (_TYPES[annotation] for annotation in function.__annotations__.values())
    symbol = f"{function.__module__}.{function.__name__}"

    def call(typing_context: Any, *given: Any) -> Any:
        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            convention = context.call_conv
            native_type = convention.get_function_type(returns, signature.args)
            native = cgutils.get_or_insert_function(builder.module, native_type, symbol)
            convention.call_function(builder, native, returns, signature.args, args)
            return context.get_dummy_value()

        return returns(*arguments), codegen

    # Numba asks for names and number of the arguments
    own = inspect.signature(function)
    context = inspect.Parameter("typing_context", inspect.Parameter.POSITIONAL_ONLY)
    call.__signature__ = own.replace(parameters=[context, *own.parameters.values()])  # type: ignore[attr-defined]
    called: Any = intrinsic(call)
    _routines[called] = _Routine(symbol, _stored(function, **_ROUTINE), tuple(arguments))
    stand_in: F = called
    return stand_in


@functools.cache
def _define(called: Any) -> None:
    """Compiles a routine, or loads it, and tells LLVM where it is."""
    symbol, dispatcher, arguments = _routines[called]
    _define_callees(dispatcher.py_func)
    dispatcher.compile(arguments)
    compiled = dispatcher.overloads[arguments]
    llvmlite.binding.add_symbol(symbol, compiled.library.get_pointer_to_function(compiled.fndesc.llvm_func_name))


@functools.cache
def _define_callees(function: Callable[..., Any]) -> None:
    """Defines the routines that a function calls, directly or not."""
    for name in function.__code__.co_names:
        value = function.__globals__.get(name)
        if isinstance(value, Dispatcher):
            _define_callees(value.py_func)
        elif isinstance(value, Hashable) and value in _routines:
            _define(value)


@contextlib.contextmanager
def _no_garbage_collection() -> Iterator[None]:
    """A compiler makes objects by the million and keeps them: looking for garbage is a fifth of its time."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def kernel(function: F) -> F:
    """An entry point: takes addresses and sizes as integers, runs without the GIL, is compiled once per machine."""
    dispatcher = _stored(function, **_KERNEL)
    compile_or_load = dispatcher.compile

    def compile_with_callees(signature: Any) -> Any:
        with _no_garbage_collection():
            _define_callees(function)
            return compile_or_load(signature)

    dispatcher.compile = compile_with_callees
    entry: F = dispatcher
    return entry
