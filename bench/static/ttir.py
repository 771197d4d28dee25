"""Triton's first intermediate representation (TTIR) as a tree of operations, read from its text."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field

__all__ = ["Function", "Op", "element_bytes", "matrix_product", "parse", "tensor_shape", "walk"]

_VALUE = re.compile(r"%[\w.$-]+(?:#\d+)?")
_STATEMENT = re.compile(r'(?:(?P<results>%[^=]+?) = )?"?(?P<name>[a-z_]+\.[\w.]+)"?(?P<rest>.*)')
_LOCATION = re.compile(r"\s*loc\((?:[^()]|\([^()]*\))*\)")


@dataclass
class Op:
    """`results = name operands text`, and the operations in its regions.

    Of an `scf.for` the operands are (lower, upper, step, *initial values), `inner` (induction variable, *carried).
    """

    name: str
    results: list[str]
    operands: list[str]
    text: str
    inner: list[str] = field(default_factory=list)
    regions: list[list[Op]] = field(default_factory=list)


@dataclass
class Function:
    """A kernel: the names of its parameters and its operations."""

    parameters: list[str]
    ops: list[Op]


def walk(ops: list[Op]) -> Iterator[Op]:
    """All operations, also those in regions."""
    for op in ops:
        yield op
        for region in op.regions:
            yield from walk(region)


def tensor_shape(text: str) -> tuple[int, ...]:
    """Shape of the last type of a statement; () for a scalar."""
    shapes = re.findall(r"tensor<((?:\d+x)+)", text)
    return tuple(int(n) for n in shapes[-1].split("x")[:-1]) if shapes else ()


def element_bytes(text: str) -> int:
    """Bytes of what the last pointer type of a statement points to."""
    bits = re.findall(r"!tt\.ptr<[a-z]+(\d+)", text)
    return max(1, int(bits[-1]) // 8)


def matrix_product(op: Op) -> tuple[str, int]:
    """Type ("16 bits", "tf32" or "fp32") and floating-point operations of a `tt.dot`."""
    (rows, depth, bits), (_, cols, _) = re.findall(r"tensor<(\d+)x(\d+)xb?f(\d+)>", op.text)[:2]
    kind = f"{bits} bits" if int(bits) < 32 else "tf32" if "inputPrecision = tf32" in op.text else "fp32"
    return kind, 2 * int(rows) * int(cols) * int(depth)


def _results(text: str | None) -> list[str]:
    names: list[str] = []
    for part in (text or "").split(","):
        name, _, count = part.strip().partition(":")
        if name:
            names += [f"{name}#{i}" for i in range(int(count))] if count else [name]
    return names


def _op(match: re.Match[str]) -> Op:
    op = Op(match["name"], _results(match["results"]), _VALUE.findall(match["rest"]), match["rest"])
    if op.name == "scf.for":
        induction, *bounds = op.operands[:4]
        carried = op.operands[4:]
        op.inner, op.operands = [induction, *carried[::2]], bounds + carried[1::2]
    elif op.name.startswith("cf.") or op.name in ("scf.while", "tt.call"):
        raise ValueError(f"control flow that bench.static does not follow: {op.name}")
    return op


def parse(text: str) -> Function:
    """The kernel of a module; Triton has inlined all that it calls.

    Raises:
        ValueError: control flow other than `for` and `if`.
    """
    function = Function([], [])
    stack: list[list[Op]] = []
    for raw in text.splitlines():
        line = _LOCATION.sub("", raw).strip()
        if line.startswith("tt.func"):
            function.parameters = re.findall(r"(%[\w.$-]+): ", line)
            stack.append(function.ops)
        elif stack and line.startswith("}"):
            stack.pop()
            if line.startswith("} else"):
                stack[-1][-1].regions.append([])
                stack.append(stack[-1][-1].regions[-1])
        elif stack and (match := _STATEMENT.match(line)):
            op = _op(match)
            stack[-1].append(op)
            if line.endswith("{"):
                op.regions.append([])
                stack.append(op.regions[-1])
    return function
