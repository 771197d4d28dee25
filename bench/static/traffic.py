"""Memory traffic, trip counts and matrix products of a launch, by the TTIR's integers, for every program of the grid.

Only what addresses, masks, loop bounds and branches depend on is evaluated, so the floating-point work costs nothing. A
value is an array with one leading axis for the programs; axes along which a tensor is constant keep length 1.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from bench.static import integers
from bench.static.integers import Array
from bench.static.ttir import Function, Op, element_bytes, matrix_product, tensor_shape, walk

__all__ = ["Loop", "Site", "Traffic", "evaluate"]

_BATCH = 1 << 21  # elements of a tile that are evaluated at once


class _Pointer(NamedTuple):
    argument: str
    offset: Array  # bytes from the start of the tensor


# nothing needed depends on a value that is None
_Value = Array | _Pointer | None
_Environment = dict[str, _Value]


@dataclass
class Site:
    """A load or store: bytes of its unmasked lanes in all (`requested`), and which elements of the tensor they are."""

    argument: str
    kind: str
    itemsize: int
    touched: Array
    requested: int = 0

    @property
    def unique(self) -> int:
        """Bytes, each once."""
        return int(np.count_nonzero(self.touched)) * self.itemsize


@dataclass
class Loop:
    """`trips` summed over all programs; a loop of a `constant` number of iterations may be unrolled by the compiler."""

    constant: bool
    children: list[Loop]
    trips: int = 0


@dataclass
class Traffic:
    """Sites and outermost loops in program order; floating-point operations of matrix products by type."""

    sites: list[Site] = field(default_factory=list)
    loops: list[Loop] = field(default_factory=list)
    products: dict[str, int] = field(default_factory=dict)


def _accesses(op: Op) -> tuple[str, str | None] | None:
    """Names of pointer and mask of a memory access."""
    if op.name == "tt.load":
        return op.operands[0], op.operands[1] if len(op.operands) > 1 else None
    if op.name == "tt.store":
        return op.operands[0], op.operands[2] if len(op.operands) > 2 else None
    if op.name.startswith(("tt.atomic", "tt.descriptor")):
        raise ValueError(f"memory access that bench.static does not follow: {op.name}")
    return None


def _needed(function: Function) -> set[str]:
    """Names of the values that an address, a mask, a loop bound or a branch depends on."""
    sources: dict[str, list[str]] = {}
    pending: list[str] = []
    for op in walk(function.ops):
        access = _accesses(op)
        if access:
            pending += [name for name in access if name]
        if op.name == "scf.for":
            pending += op.operands[:3]
            for result, inner, first, last in zip(
                op.results, op.inner[1:], op.operands[3:], op.regions[0][-1].operands
            ):
                sources.setdefault(result, []).append(inner)
                sources.setdefault(inner, []).extend((first, last))
        elif op.name == "scf.if":
            pending += op.operands
            for region in op.regions:
                for result, value in zip(op.results, region[-1].operands):
                    sources.setdefault(result, []).append(value)
        else:
            for result in op.results:
                sources.setdefault(result, []).extend(op.operands)
    needed: set[str] = set()
    while pending:
        name = pending.pop()
        if name not in needed:
            needed.add(name)
            pending += sources.get(name, [])
    return needed


def _constant_length(loop: Op, made_by: dict[str, Op]) -> bool:
    """Whether the bounds are constants, or the upper one is the lower one plus a constant."""

    def constant(name: str) -> bool:
        return name in made_by and made_by[name].name == "arith.constant"

    lower, upper, step = loop.operands[:3]
    last = made_by.get(upper)
    length = [x for x in last.operands if x != lower] if last and last.name == "arith.addi" else [lower, upper]
    return all(map(constant, [step, *length]))


def _loops(ops: list[Op], made_by: dict[str, Op], by_op: dict[int, Loop]) -> list[Loop]:
    found = []
    for op in ops:
        inner = [loop for region in op.regions for loop in _loops(region, made_by, by_op)]
        if op.name == "scf.for":
            by_op[id(op)] = loop = Loop(_constant_length(op, made_by), inner)
            found.append(loop)
        else:
            found += inner
    return found


def _merge(chosen: Array, new: _Value, old: _Value) -> _Value:
    """`new` for the chosen programs, `old` for the others."""
    if new is None or old is None:
        return None
    if isinstance(new, _Pointer) and isinstance(old, _Pointer):
        offset = _merge(chosen, new.offset, old.offset)
        assert isinstance(offset, np.ndarray)
        return _Pointer(new.argument, offset)
    assert isinstance(new, np.ndarray)
    assert isinstance(old, np.ndarray)
    return np.where(chosen.reshape(-1, *(1,) * (new.ndim - 1)), new, old)


class _Evaluator:
    def __init__(self, function: Function, tensors: dict[str, Tensor], programs: Array) -> None:
        self.tensors, self.programs = tensors, programs
        self.needed = _needed(function)
        self.traffic = Traffic()
        made_by = {name: op for op in walk(function.ops) for name in op.results}
        self.loops: dict[int, Loop] = {}
        self.traffic.loops = _loops(function.ops, made_by, self.loops)
        self.sites: dict[int, Site] = {}

    def ops(self, ops: list[Op], env: _Environment, active: Array) -> list[_Value]:
        """Evaluate for the active programs; returns what the last operation yields."""
        for op in ops:
            if _accesses(op):
                self._access(op, env, active)
            elif op.name == "scf.for":
                self._for(op, env, active)
            elif op.name == "scf.if":
                self._if(op, env, active)
            elif op.name == "tt.dot":
                kind, operations = matrix_product(op)
                done = self.traffic.products.get(kind, 0)
                self.traffic.products[kind] = done + operations * int(active.sum())
            elif op.name in ("scf.yield", "tt.return"):
                return [env.get(name) for name in op.operands]
            elif self.needed.intersection(op.results):
                results = self._pure(op, [env.get(name) for name in op.operands])
                env.update(zip(op.results, results if isinstance(results, list) else [results]))
        return []

    def _pure(self, op: Op, values: list[_Value]) -> _Value | list[Array]:
        if op.name == "arith.constant":
            return integers.constant(op)
        if op.name == "tt.get_program_id":
            return self.programs if op.text.split()[0] == "x" else np.zeros(1, np.int64)
        if any(value is None for value in values):
            return None
        if values and isinstance(values[0], _Pointer):
            pointer = values[0]
            if op.name == "tt.addptr":
                assert isinstance(values[1], np.ndarray)
                return _Pointer(pointer.argument, pointer.offset + values[1] * element_bytes(op.text))
            moved = pointer.offset if op.name == "tt.bitcast" else integers.apply(op, [pointer.offset])
            return _Pointer(pointer.argument, moved) if isinstance(moved, np.ndarray) else None
        return integers.apply(op, [value for value in values if isinstance(value, np.ndarray)])

    def _access(self, op: Op, env: _Environment, active: Array) -> None:
        pointer_name, mask_name = _accesses(op) or ("", None)
        pointer, mask = env.get(pointer_name), env.get(mask_name) if mask_name else np.ones(1, bool)
        if not isinstance(pointer, _Pointer) or not isinstance(mask, np.ndarray):
            raise ValueError(f"an address that depends on more than integers: {op.name} {op.text}")
        shape = tensor_shape(op.text)
        lanes = (len(self.programs), *shape)
        mask = mask.reshape(len(mask), *mask.shape[1:] or (1,) * len(shape)) & active.reshape(-1, *(1,) * len(shape))
        offset, mask = np.broadcast_to(pointer.offset, lanes), np.broadcast_to(mask, lanes)
        tensor, size = self.tensors[pointer.argument], element_bytes(op.text)
        site = self.sites.get(id(op))
        if site is None:
            span = tensor.untyped_storage().nbytes() - tensor.storage_offset() * tensor.element_size()
            site = Site(pointer.argument, op.name.removeprefix("tt."), size, np.zeros(span // size, bool))
            self.sites[id(op)] = site
            self.traffic.sites.append(site)
        index = offset[mask] // size
        site.requested += index.size * size
        site.touched[index] = True
        if self.needed.intersection(op.results):
            # indices and sizes in device memory: the tensors are real
            flat = tensor.as_strided((len(site.touched),), (1,))
            values = (flat.float() if flat.is_floating_point() else flat).numpy()
            env[op.results[0]] = values[np.where(mask, offset // size, 0)]

    def _for(self, op: Op, env: _Environment, active: Array) -> None:
        lower, upper, step = (env.get(name) for name in op.operands[:3])
        if not all(isinstance(bound, np.ndarray) for bound in (lower, upper, step)):
            raise ValueError(f"a loop whose bounds depend on more than integers: {op.text}")
        induction = np.broadcast_to(np.asarray(lower), active.shape)
        carried = [env.get(name) for name in op.operands[3:]]
        while (running := active & (induction < np.asarray(upper))).any():
            self.loops[id(op)].trips += int(running.sum())
            env.update(zip(op.inner, [induction, *carried]))
            yielded = self.ops(op.regions[0], env, running)
            carried = [_merge(running, new, old) for new, old in zip(yielded, carried)]
            induction = induction + np.asarray(step)
        env.update(zip(op.results, carried))

    def _if(self, op: Op, env: _Environment, active: Array) -> None:
        condition = env.get(op.operands[0])
        if not isinstance(condition, np.ndarray):
            raise ValueError(f"a branch that depends on more than integers: {op.text}")
        taken = np.broadcast_to(condition, active.shape).astype(bool)
        then = self.ops(op.regions[0], env, active & taken)
        otherwise = self.ops(op.regions[1], env, active & ~taken) if len(op.regions) > 1 else []
        env.update(zip(op.results, [_merge(taken, a, b) for a, b in zip(then, otherwise)]))


def evaluate(function: Function, arguments: dict[str, Any], num_programs: int) -> Traffic:
    """Traffic of one launch; `arguments` by the names of the function's parameters: tensors and integers.

    Raises:
        ValueError: an address, mask or bound that cannot be known without running the kernel.
    """
    tensors = {name: value for name, value in arguments.items() if isinstance(value, Tensor)}
    tile = max((np.prod(tensor_shape(op.text)) for op in walk(function.ops) if _accesses(op)), default=1)
    batch = max(1, _BATCH // int(tile))
    evaluator = _Evaluator(function, tensors, np.arange(0))
    with torch.no_grad():
        for first in range(0, num_programs, batch):
            evaluator.programs = np.arange(first, min(first + batch, num_programs))
            env: _Environment = {}
            for name, value in arguments.items():
                env[name] = _Pointer(name, np.zeros(1, np.int64)) if name in tensors else np.full(1, value)
            evaluator.ops(function.ops, env, np.ones(len(evaluator.programs), bool))
    return evaluator.traffic
