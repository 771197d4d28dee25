"""A kernel as what every thread of a team runs, in machine code: a thread that enters Python would wait for its lock.

    void region(job):   for each share of the tiles, my own first, then those of the threads after me:
                            while nobody has taken all of it: take a chunk of tiles, kernel(first, last, *args)

So a thread gets the same tiles at every call, and what it wrote is in its own cache, unless others are held up.

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

from ._native import address_of

__all__ = ["Job", "region_of"]

# a job in memory: ns of CPU time that it took so far; what the threads only read; then, a cache line apart, how many
# tiles of each share are taken
_SPENT, _TILES, _SHARES, _CHUNK, _ARGS = range(5)
_LINE = 8
_INT, _LONG = ir.IntType(32), ir.IntType(64)


class Region(NamedTuple):
    address: int
    layout: str  # of a job, for `struct`
    owner: Any  # of the code


class Job:
    """`kernel(first, last, *args)` for all of `tiles`, a chunk at a time, by as many threads as there are `shares`."""

    def __init__(self, region: Region, tiles: int, shares: int, chunk: int, args: tuple[Any, ...]) -> None:
        head = struct.pack(region.layout, 0, tiles, shares, chunk, *_flat(args))
        self.memory = ctypes.create_string_buffer(head, len(head) + 8 * _LINE * (shares + 1))

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
    begin, next_share, choose, take, work, end = (region.append_basic_block() for _ in range(6))
    builder = ir.IRBuilder(begin)

    def at(number: ir.Value) -> ir.Value:
        return builder.gep(region.args[0], [number])

    def call(function: str, of: list[ir.Type], *args: ir.Value) -> ir.Value:
        address = _LONG(address_of(function))
        return builder.call(builder.inttoptr(address, ir.FunctionType(_INT, of).as_pointer()), args)

    def cpu_time() -> ir.Value:
        call("clock_gettime", [_INT, _LONG.as_pointer()], _INT(time.CLOCK_THREAD_CPUTIME_ID), timespec)
        seconds, ns = (builder.load(builder.gep(timespec, [_LONG(i)])) for i in range(2))
        return builder.add(builder.mul(seconds, _LONG(10**9)), ns)

    layout = ["q"] * _ARGS

    def argument(of: Any) -> ir.Value:
        if hasattr(of, "types"):
            return context.make_tuple(builder, of, [argument(item) for item in of.types])
        layout.append({types.int64: "q", types.float64: "d"}[of])
        return builder.bitcast(builder.load(at(_LONG(len(layout) - 1))), context.get_value_type(of))

    timespec = builder.alloca(_LONG, 2)
    args = [argument(of) for of in signature[2:]]
    tiles, shares, chunk = (builder.load(at(_LONG(i))) for i in (_TILES, _SHARES, _CHUNK))
    me, start = builder.zext(call("omp_get_thread_num", []), _LONG), cpu_time()
    builder.branch(next_share)

    builder.position_at_end(next_share)
    number = builder.phi(_LONG)
    number.add_incoming(_LONG(0), begin)
    builder.cbranch(builder.icmp_signed("<", number, shares), choose, end)

    builder.position_at_end(choose)
    share = builder.urem(builder.add(me, number), shares)
    begins, ends = (builder.udiv(builder.mul(s, tiles), shares) for s in (share, builder.add(share, _LONG(1))))
    taken = at(builder.add(_LONG(len(layout) + _LINE), builder.mul(share, _LONG(_LINE))))
    builder.branch(take)

    builder.position_at_end(take)
    first = builder.add(begins, builder.atomic_rmw("add", taken, chunk, "monotonic"))
    number.add_incoming(builder.add(number, _LONG(1)), take)
    builder.cbranch(builder.icmp_signed("<", first, ends), work, next_share)

    builder.position_at_end(work)
    last = builder.add(first, chunk)
    last = builder.select(builder.icmp_signed("<", last, ends), last, ends)
    convention = context.call_conv
    native = _LONG(compiled.library.get_pointer_to_function(compiled.fndesc.llvm_func_name))
    native = builder.inttoptr(native, convention.get_function_type(types.none, signature).as_pointer())
    convention.call_function(builder, native, types.none, signature, [first, last, *args])
    builder.branch(take)

    builder.position_at_end(end)
    builder.atomic_rmw("add", at(_LONG(_SPENT)), builder.sub(cpu_time(), start), "monotonic")
    builder.ret_void()

    library.add_ir_module(module)
    library.finalize()
    return Region(library.get_pointer_to_function(name), "".join(layout), library)
