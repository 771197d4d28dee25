"""The integer operations of TTIR on arrays: what addresses, masks and loop bounds are made of."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bench.static.ttir import Op, tensor_shape

__all__ = ["Array", "apply", "constant"]

Array = NDArray[Any]


def _quotient(a: Array, b: Array) -> Array:
    # programs that a branch has masked out may divide by zero
    b = np.where(b == 0, 1, b)
    return np.sign(a) * np.sign(b) * (np.abs(a) // np.abs(b))


def _remainder(a: Array, b: Array) -> Array:
    return a - _quotient(a, b) * b


_BINARY: dict[str, Callable[[Array, Array], Array]] = {
    "arith.addi": np.add,
    "arith.subi": np.subtract,
    "arith.muli": np.multiply,
    "arith.divsi": _quotient,
    "arith.divui": _quotient,
    "arith.remsi": _remainder,
    "arith.remui": _remainder,
    "arith.minsi": np.minimum,
    "arith.minui": np.minimum,
    "arith.maxsi": np.maximum,
    "arith.maxui": np.maximum,
    "arith.andi": np.bitwise_and,
    "arith.ori": np.bitwise_or,
    "arith.xori": np.bitwise_xor,
    "arith.shli": np.left_shift,
    "arith.shrsi": np.right_shift,
    "arith.shrui": np.right_shift,
}
_COMPARE: dict[str, Callable[[Array, Array], Array]] = {
    "eq": np.equal,
    "ne": np.not_equal,
    "lt": np.less,
    "le": np.less_equal,
    "gt": np.greater,
    "ge": np.greater_equal,
}
_UNCHANGED = ("tt.splat", "tt.broadcast", "arith.index_cast", "arith.extf", "arith.extsi")


def constant(op: Op) -> Array:
    """The value of an `arith.constant`, which is the same in every lane."""
    text = re.sub(r"^\s*(\{[^}]*\})?\s*(dense<)?", "", op.text)
    word = re.split(r"[\s>:]", text, maxsplit=1)[0]
    value = {"true": 1.0, "false": 0.0}.get(word)
    if value is None:
        value = float(int(word, 16)) if word.startswith("0x") else float(word)
    exact: Any = int(word) if re.fullmatch(r"-?\d+", word) else value
    array = np.full((1,) * (1 + len(tensor_shape(op.text))), exact)
    return array.astype(bool) if re.search(r"(x|: )i1\b", op.text) or word in ("true", "false") else array


def _unsigned(a: Array, bits: int) -> Array:
    return a if a.dtype == bool or bits >= 64 else a & ((1 << bits) - 1)


def _width(text: str, last: bool) -> int:
    widths = re.findall(r"\bi(\d+)\b|xi(\d+)", text)
    return int("".join(widths[-1 if last else 0]))


def apply(op: Op, values: list[Array]) -> Array | list[Array] | None:
    """The result of a pure operation on integers or booleans; None for one that is not known here."""
    shape = tensor_shape(op.text)
    if op.name in _BINARY:
        return _BINARY[op.name](*values)
    if op.name in ("arith.cmpi", "arith.cmpf"):
        # signed, unsigned, ordered and unordered comparisons agree on sizes and indices
        return _COMPARE[op.text.split()[0].rstrip(",")[-2:]](*values)
    if op.name == "arith.select":
        return np.where(*values)
    if op.name in _UNCHANGED:
        a = values[0].astype(np.int64) if values[0].dtype == bool and op.name == "arith.extsi" else values[0]
        return a.reshape(len(a), *(1,) * len(shape)) if op.name == "tt.splat" else a
    if op.name == "arith.extui":
        return _unsigned(values[0].astype(np.int64), _width(op.text, last=False))
    if op.name == "arith.trunci":
        bits = _width(op.text, last=True)
        if bits == 1:
            return (values[0] & 1).astype(bool)
        return (values[0] + (1 << (bits - 1))) % (1 << bits) - (1 << (bits - 1))
    if op.name == "tt.make_range":
        bounds = dict(re.findall(r"(start|end) = (\d+)", op.text))
        return np.arange(int(bounds["start"]), int(bounds["end"]))[None]
    if op.name == "tt.expand_dims":
        match = re.search(r"axis = (\d+)", op.text)
        assert match is not None
        return np.expand_dims(values[0], 1 + int(match[1]))
    if op.name == "tt.reshape":
        source = tuple(int(n) for n in re.findall(r"tensor<((?:\d+x)+)", op.text)[0].split("x")[:-1])
        return np.broadcast_to(values[0], (len(values[0]), *source)).reshape(len(values[0]), *shape)
    if op.name == "tt.join":
        return np.stack(np.broadcast_arrays(*values), axis=-1)
    if op.name == "tt.split":
        pairs = values[0]
        return [pairs[..., 0], pairs[..., -1]]
    return None
