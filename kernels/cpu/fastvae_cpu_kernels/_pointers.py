"""What the kernels need below Python: memory by address, scratch on the stack, the bits of a float32.

An array argument costs Numba's dispatcher about 0.3 microseconds, and its indices are checked for negative values; a
kernel takes integer addresses instead. LLVM is told that what a loop writes is nothing else that it reads, so loops are
vectorised without run-time checks; a kernel that works in place writes to scratch on the stack first.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

__all__ = [
    "Floats",
    "Words",
    "bits_of",
    "f32_at",
    "f32_scratch",
    "f64_at",
    "f64_scratch",
    "float_of",
    "i64_at",
    "prefetch",
    "read_ahead",
    "shifted",
    "u8_at",
    "u32_scratch",
    "write_ahead",
]


# pointers to float32 and to uint32, as arguments of a routine
Floats: TypeAlias = Any
Words: TypeAlias = Any


def _pointer_at(element: types.Type) -> Any:
    @intrinsic
    def pointer_at(typing_context: Any, address: types.Type) -> Any:
        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            return builder.inttoptr(args[0], context.get_value_type(signature.return_type))

        return types.CPointer(element)(types.int64), codegen

    return pointer_at


f32_at, f64_at = _pointer_at(types.float32), _pointer_at(types.float64)
u8_at, i64_at = _pointer_at(types.uint8), _pointer_at(types.int64)


def _scratch(element: types.Type) -> Any:
    @intrinsic(prefer_literal=True)
    def scratch(typing_context: Any, size: types.Type) -> Any:
        if not isinstance(size, types.IntegerLiteral):
            return None

        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            buffer = cgutils.alloca_once(builder, context.get_data_type(element), size=size.literal_value)
            buffer.align = 64
            return buffer

        return types.CPointer(element)(size), codegen

    return scratch


f32_scratch, f64_scratch, u32_scratch = _scratch(types.float32), _scratch(types.float64), _scratch(types.uint32)


@intrinsic
def _shifted(typing_context: Any, pointer: types.Type, count: types.Type) -> Any:

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.gep(args[0], [args[1]])

    return pointer(pointer, types.int64), codegen


# shifted(pointer, count): the pointer to element `count`
shifted: Any = _shifted


def _prefetcher(lines: int, ahead: int, to_write: bool) -> Any:
    """Asks for so many cache lines, so many bytes beyond a pointer; any address will do."""

    @intrinsic
    def prefetcher(typing_context: Any, pointer: types.Type) -> Any:
        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            byte_pointer, flag = ir.IntType(8).as_pointer(), ir.IntType(32)
            function_type = ir.FunctionType(ir.VoidType(), [byte_pointer, flag, flag, flag])
            function = cgutils.get_or_insert_function(builder.module, function_type, "llvm.prefetch.p0")
            start = builder.bitcast(args[0], byte_pointer)
            for line in range(lines):
                place = builder.gep(start, [ir.IntType(64)(ahead + 64 * line)])
                # kept close, as data
                builder.call(function, [place, flag(int(to_write)), flag(3), flag(1)])

        return types.void(pointer), codegen

    return prefetcher


# prefetch(pointer): its cache line will be read soon
prefetch = _prefetcher(1, 0, to_write=False)
# read_ahead(pointer), write_ahead(pointer): what lies 8 KiB beyond these 64 float32, before it is read or written.
# Called between blocks of arithmetic: all lines of a piece at once would wait for one another
read_ahead, write_ahead = _prefetcher(4, 8192, to_write=False), _prefetcher(4, 8192, to_write=True)


def _float_intrinsic(result: types.Type, argument: types.Type, emit: Callable[[Any, Any, Any], Any]) -> Any:
    @intrinsic
    def operation(typing_context: Any, x: types.Type) -> Any:
        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            return emit(builder, args[0], context.get_value_type(result))

        return result(argument), codegen

    return operation


bits_of = _float_intrinsic(types.int32, types.float32, lambda builder, x, to: builder.bitcast(x, to))
float_of = _float_intrinsic(types.float32, types.int32, lambda builder, x, to: builder.bitcast(x, to))
