"""Matrix products within a kernel, by the BLAS that torch is linked to, in the calling thread alone."""

from __future__ import annotations

import functools
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from ._native import address_of

__all__ = ["Blas", "blas", "multiply"]

# addresses: SGEMM, and what sets how many threads it may use when this thread calls it
Blas = tuple[int, int]


@functools.cache
def blas() -> Blas | None:
    """MKL's; None where torch has another, which cannot be told to keep to one thread."""
    product, set_num_threads = address_of("sgemm_"), address_of("MKL_Set_Num_Threads_Local")
    return None if product is None or set_num_threads is None else (product, set_num_threads)


@intrinsic
def _multiply(
    typing_context: Any,
    blas: types.Type,
    transpose_a: types.Type,
    transpose_b: types.Type,
    m: types.Type,
    n: types.Type,
    k: types.Type,
    a: types.Type,
    lda: types.Type,
    b: types.Type,
    ldb: types.Type,
    c: types.Type,
    ldc: types.Type,
) -> Any:
    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        def pointer_to(value: ir.Value) -> ir.Value:
            place = cgutils.alloca_once(builder, value.type)
            builder.store(value, place)
            return place

        addresses, transpose_a, transpose_b, m, n, k, a, lda, b, ldb, c, ldc = args
        product, set_num_threads = cgutils.unpack_tuple(builder, addresses)
        letters = [ir.IntType(8)(ord(letter)) for letter in "NT"]
        transpose_a, transpose_b = (builder.select(t, letters[1], letters[0]) for t in (transpose_a, transpose_b))
        m, n, k, lda, ldb, ldc = (pointer_to(builder.trunc(size, ir.IntType(32))) for size in (m, n, k, lda, ldb, ldc))
        one, zero = (pointer_to(ir.FloatType()(value)) for value in (1.0, 0.0))
        a, b, c = (builder.inttoptr(address, ir.FloatType().as_pointer()) for address in (a, b, c))
        call = [pointer_to(transpose_a), pointer_to(transpose_b), m, n, k, one, a, lda, b, ldb, zero, c, ldc]
        int32 = ir.IntType(32)
        set_num_threads = builder.inttoptr(set_num_threads, ir.FunctionType(int32, [int32]).as_pointer())
        before = builder.call(set_num_threads, [int32(1)])
        function_type = ir.FunctionType(ir.VoidType(), [value.type for value in call])
        builder.call(builder.inttoptr(product, function_type.as_pointer()), call)
        builder.call(set_num_threads, [before])

    long, flag = types.int64, types.boolean
    return types.void(types.UniTuple(long, 2), flag, flag, *[long] * 9), codegen


# multiply(blas(), transpose_a, transpose_b, m, n, k, a, lda, b, ldb, c, ldc): C = op(A) op(B), float32, where C is
# [n, m], op(A) [k, m] and op(B) [n, k], each row at its distance ld from the one before: BLAS calls rows columns
multiply: Any = _multiply
