"""A kernel as what every thread of a team runs, in machine code: a thread that enters Python would wait for its lock.

    void region(job):   while there are tiles that nobody has taken: take a chunk of them, kernel(first, last, *args)

Written in LLVM's language around the kernel that is compiled already, which takes milliseconds; Numba would compile
another function, and take a hundred.
"""

from __future__ import annotations

import ctypes
import functools
import struct
import time
from collections.abc import Iterator
from typing import Any, NamedTuple

from llvmlite import ir
from numba import types
from numba.core.compiler_lock import global_compiler_lock
from numba.core.registry import cpu_target

__all__ = ["Job", "region_of"]

# a job in memory: the first tile that nobody has, ns of CPU time that it took so far; then what the threads only read
_NEXT, _SPENT, _TILES, _CHUNK, _ARGS = range(5)
_INT, _LONG = ir.IntType(32), ir.IntType(64)


class Region(NamedTuple):
    address: int
    layout: str  # of a job, for `struct`
    owner: Any  # of the code


class Job:
    """`kernel(first, last, *args)` for all of `tiles`, a chunk at a time."""

    def __init__(self, region: Region, tiles: int, chunk: int, args: tuple[Any, ...]) -> None:
        self.memory = ctypes.create_string_buffer(struct.pack(region.layout, 0, 0, tiles, chunk, *_flat(args)))

    def seconds(self) -> float:
        """CPU time of all threads, once it is done."""
        return 1e-9 * ctypes.c_int64.from_buffer(self.memory, 8 * _SPENT).value


def _flat(values: tuple[Any, ...]) -> Iterator[Any]:
    for value in values:
        if isinstance(value, tuple):
            yield from _flat(value)
        else:
            yield value


def region_of(kernel: Any) -> Region | None:
    """The region of a `kernel`; None until it has been compiled, and if it was for more than one signature."""
    return _region(kernel) if len(kernel.overloads) == 1 else None


@functools.cache
@global_compiler_lock
def _region(kernel: Any) -> Region:
    ((signature, compiled),) = kernel.overloads.items()
    context, name = cpu_target.target_context, f"{compiled.fndesc.llvm_func_name}.region"
    library = context.codegen().create_library(name)
    module = library.create_ir_module(name)
    region = ir.Function(module, ir.FunctionType(ir.VoidType(), [_LONG.as_pointer()]), name)
    begin, take, work, end = (region.append_basic_block() for _ in range(4))
    builder = ir.IRBuilder(begin)

    def at(number: int) -> ir.Value:
        return builder.gep(region.args[0], [_LONG(number)])

    def cpu_time() -> ir.Value:
        clock = ctypes.cast(ctypes.CDLL(None).clock_gettime, ctypes.c_void_p).value
        function = builder.inttoptr(_LONG(clock), ir.FunctionType(_INT, [_INT, _LONG.as_pointer()]).as_pointer())
        builder.call(function, [_INT(time.CLOCK_THREAD_CPUTIME_ID), timespec])
        seconds, ns = (builder.load(builder.gep(timespec, [_LONG(i)])) for i in range(2))
        return builder.add(builder.mul(seconds, _LONG(10**9)), ns)

    layout = ["q"] * _ARGS

    def argument(of: Any) -> ir.Value:
        if hasattr(of, "types"):
            return context.make_tuple(builder, of, [argument(item) for item in of.types])
        layout.append({types.int64: "q", types.float64: "d"}[of])
        return builder.bitcast(builder.load(at(len(layout) - 1)), context.get_value_type(of))

    timespec = builder.alloca(_LONG, 2)
    args = [argument(of) for of in signature[2:]]
    tiles, chunk, start = builder.load(at(_TILES)), builder.load(at(_CHUNK)), cpu_time()
    builder.branch(take)

    builder.position_at_end(take)
    first = builder.atomic_rmw("add", at(_NEXT), chunk, "monotonic")
    builder.cbranch(builder.icmp_signed("<", first, tiles), work, end)

    builder.position_at_end(work)
    last = builder.add(first, chunk)
    last = builder.select(builder.icmp_signed("<", last, tiles), last, tiles)
    convention = context.call_conv
    native = _LONG(compiled.library.get_pointer_to_function(compiled.fndesc.llvm_func_name))
    native = builder.inttoptr(native, convention.get_function_type(types.none, signature).as_pointer())
    convention.call_function(builder, native, types.none, signature, [first, last, *args])
    builder.branch(take)

    builder.position_at_end(end)
    builder.atomic_rmw("add", at(_SPENT), builder.sub(cpu_time(), start), "monotonic")
    builder.ret_void()

    library.add_ir_module(module)
    library.finalize()
    return Region(library.get_pointer_to_function(name), "".join(layout), library)
