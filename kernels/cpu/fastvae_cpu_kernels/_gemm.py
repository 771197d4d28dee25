"""Matrix products in the calling thread, without a copy of either matrix.

    C[i, j] = sum_k A[i, k] B[k, j],  tile by tile: 8 rows and up to 48 columns, in 24 vector registers

A vector of B meets one element of A at a time, so that A may lie in memory any way, and B's rows have to be contiguous.
Each step of k is 24 multiply-adds for 11 loads: what limits them is the arithmetic, wherever A and B lie in a cache.
They do, as a sum is made 256 terms at a time, which costs no digits either. Written for AVX-512: LLVM's vectoriser
would not keep a tile in registers.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable
from typing import Any

import llvmlite.binding
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from ._jit import loop, routine, term
from ._pieces import increase_piece, store_piece
from ._pointers import Floats, f32_at, f32_scratch, shifted

__all__ = ["COLUMNS", "LANES", "ROWS", "available", "product", "transpose_block", "width_of"]

ROWS, LANES, COLUMNS = 8, 16, 48
# terms of a sum at a time: so many rows of B that are a multiple of 4 KiB apart still fit the ways of a second cache
_TERMS = 256
_LONG, _FLOAT = ir.IntType(64), ir.FloatType()
_VECTOR, _MASK = ir.VectorType(_FLOAT, LANES), ir.VectorType(ir.IntType(1), LANES)


@functools.cache
def available() -> bool:
    """Whether this machine has the registers."""
    return bool(llvmlite.binding.get_host_cpu_features().get("avx512f", False))


def _integers(values: Iterable[int]) -> ir.Constant:
    values = list(values)
    return ir.Constant(ir.VectorType(ir.IntType(32), len(values)), values)


def _spread(builder: Any, value: Any) -> Any:
    """A scalar as a vector."""
    undefined = ir.Constant(ir.VectorType(value.type, LANES), ir.Undefined)
    vector = builder.insert_element(undefined, value, ir.IntType(32)(0))
    return builder.shuffle_vector(vector, undefined, _integers([0] * LANES))


def _tile_code(builder: Any, vectors: int, args: list[Any], count: Any = None) -> None:
    """So many vectors of columns; with `count` one, of which no more lanes are read."""
    a, a_row, a_k, rows, b, b_k, K, out = args
    pointer = _VECTOR.as_pointer()
    zero, alignment = ir.Constant(_VECTOR, [0.0] * LANES), ir.IntType(32)(4)
    fma_type = ir.FunctionType(_VECTOR, [_VECTOR] * 3)
    fma = cgutils.get_or_insert_function(builder.module, fma_type, f"llvm.fma.v{LANES}f32")
    load_type = ir.FunctionType(_VECTOR, [pointer, ir.IntType(32), _MASK, _VECTOR])
    masked_load = cgutils.get_or_insert_function(builder.module, load_type, f"llvm.masked.load.v{LANES}f32.p0")
    mask = None
    if count is not None:
        mask = builder.icmp_signed("<", _integers(range(LANES)), _spread(builder, builder.trunc(count, ir.IntType(32))))

    def load_b(address: Any) -> Any:
        place = builder.inttoptr(address, pointer)
        if mask is None:
            return builder.load(place, align=4)
        return builder.call(masked_load, [place, alignment, mask, zero])

    # rows that are not there are those of the last
    starts = []
    for i in range(ROWS):
        row = builder.select(builder.icmp_signed("<", _LONG(i), rows), _LONG(i), builder.sub(rows, _LONG(1)))
        starts.append(builder.add(a, builder.mul(row, a_row)))
    before, body, after = builder.block, builder.append_basic_block(), builder.append_basic_block()
    builder.cbranch(builder.icmp_signed(">", K, _LONG(0)), body, after)
    builder.position_at_end(body)
    k, a_at, b_at = (builder.phi(_LONG) for _ in range(3))
    sums = [builder.phi(_VECTOR) for _ in range(ROWS * vectors)]
    columns = [load_b(builder.add(b_at, _LONG(4 * LANES * v))) for v in range(vectors)]
    new = []
    for i, start in enumerate(starts):
        element = builder.load(builder.inttoptr(builder.add(start, a_at), _FLOAT.as_pointer()))
        element = _spread(builder, element)
        new += [builder.call(fma, [element, columns[v], sums[i * vectors + v]]) for v in range(vectors)]
    following = [builder.add(k, _LONG(1)), builder.add(a_at, a_k), builder.add(b_at, b_k)]
    for phi, first, value in zip([k, a_at, b_at, *sums], [_LONG(0), _LONG(0), b, *[zero] * len(sums)], following + new):
        phi.add_incoming(first, before)
        phi.add_incoming(value, body)
    builder.cbranch(builder.icmp_signed("<", following[0], K), body, after)
    builder.position_at_end(after)
    for i in range(ROWS):
        for v in range(vectors):
            total = builder.phi(_VECTOR)
            total.add_incoming(zero, before)
            total.add_incoming(new[i * vectors + v], body)
            new[i * vectors + v] = total
    for i in range(ROWS):
        for v in range(vectors):
            place = builder.gep(out, [_LONG(i * COLUMNS + v * LANES)])
            builder.store(new[i * vectors + v], builder.bitcast(place, pointer), align=4 * LANES)


def _vectors(number: int) -> Any:
    """The intrinsic of a tile that is so many whole vectors wide."""

    @intrinsic
    def vectors(
        typing_context: Any, a: Any, a_row: Any, a_k: Any, rows: Any, b: Any, b_k: Any, K: Any, out: Any
    ) -> Any:
        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> None:
            _tile_code(builder, number, args)

        return types.void(*[types.int64] * 7, types.CPointer(types.float32)), codegen

    return vectors


@intrinsic
def _one_vector(
    typing_context: Any, a: Any, a_row: Any, a_k: Any, rows: Any, b: Any, b_k: Any, K: Any, out: Any, count: Any
) -> Any:
    """The first `count` of its lanes; the others are not read."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> None:
        *args, count = args
        _tile_code(builder, 1, args, count)

    return types.void(*[types.int64] * 7, types.CPointer(types.float32), types.int64), codegen


two_vectors, three_vectors = _vectors(2), _vectors(3)
one_vector: Any = _one_vector


@routine
def _tile(a: int, a_row: int, a_k: int, rows: int, b: int, b_k: int, count: int, K: int, out: Floats) -> None:
    """C's first `rows` <= 8 rows and `count` <= 48 columns, as rows of 48 in `out`, which is 64-byte aligned.

    Of A float32 at address `a`, the next row is `a_row` bytes on, the next k `a_k`; of B at `b`, the next k `b_k`.
    """
    if count == COLUMNS:
        three_vectors(a, a_row, a_k, rows, b, b_k, K, out)
        return
    two = 0
    if count >= 2 * LANES:
        two = 2 * LANES
        two_vectors(a, a_row, a_k, rows, b, b_k, K, out)
    for j in range(two, count, LANES):
        one_vector(a, a_row, a_k, rows, b + 4 * j, b_k, K, shifted(out, j), min(LANES, count - j))


@term
def width_of(columns: int) -> int:
    """How wide the next tile of so many columns is; one vector by itself would wait for its loads, so 64 are 2 x 32."""
    if 3 * LANES < columns <= 4 * LANES:
        return 2 * LANES
    return min(COLUMNS, columns)


@routine
def product(a: int, a_row: int, a_k: int, b: int, b_k: int, c: int, c_row: int, M: int, N: int, K: int) -> None:
    """C [M, N] = A [M, K] B [K, N], strides in bytes as in `_tile`; the elements of a row of C are contiguous."""
    tile = f32_scratch(384)
    for k in range(0, max(K, 1), _TERMS):
        terms = min(_TERMS, K - k)
        j = 0
        while j < N:
            count = width_of(N - j)
            for i in range(0, M, ROWS):
                rows = min(ROWS, M - i)
                _tile(a + i * a_row + k * a_k, a_row, a_k, rows, b + k * b_k + 4 * j, b_k, count, terms, tile)
                for r in range(rows):
                    sums, to = shifted(tile, r * COLUMNS), f32_at(c + (i + r) * c_row + 4 * j)
                    if k == 0:
                        store_piece(sums, to, count)
                    else:
                        increase_piece(sums, to, count)
            j += count


@intrinsic
def _transpose(typing_context: Any, source: Any, source_row: Any, out: Any, out_row: Any) -> Any:
    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        source, source_row, out, out_row = args

        def at(base: Any, row: Any, number: int) -> Any:
            return builder.inttoptr(builder.add(base, builder.mul(row, _LONG(number))), _VECTOR.as_pointer())

        rows = [builder.load(at(source, source_row, i), align=4) for i in range(LANES)]
        # (row, column) as eight bits; each round rotates them by one
        halves = [[x for i in range(LANES // 2) for x in (i + first, i + first + LANES)] for first in (0, LANES // 2)]
        for _ in range(4):
            pairs = zip(rows[: LANES // 2], rows[LANES // 2 :])
            rows = [builder.shuffle_vector(*pair, _integers(half)) for pair in pairs for half in halves]
        for i, row in enumerate(rows):
            builder.store(row, at(out, out_row, i), align=4)

    long = types.int64
    return types.void(long, long, long, long), codegen


_transpose_16: Any = _transpose


@loop
def transpose_block(source: int, source_row: int, rows: int, columns: int, out: int, out_row: int) -> None:
    """out[c, r] = source[r, c] for up to 16 rows and columns of float32; rows are so many bytes apart."""
    if rows == LANES and columns == LANES:
        _transpose_16(source, source_row, out, out_row)
    else:
        for r in range(rows):
            for c in range(columns):
                f32_at(out + c * out_row)[r] = f32_at(source + r * source_row)[c]
