"""One case on one architecture: its launches recorded, compiled and counted."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from bench.chips import CHIPS, Modelled
from bench.static.capture import HostOp, Launch, recording, unique_bytes
from bench.static.cases import Case
from bench.static.flow import MachineLoop
from bench.static.machine import Code, access_bits, disassemble, widths_by_argument
from bench.static.traffic import Loop, Traffic, evaluate
from bench.static.ttir import parse

__all__ = ["Argument", "Kernel", "Result", "Traffics", "measure"]


@dataclass
class Argument:
    """A tensor argument of a launch; `passes` is bytes over the tensor's own size, `widths` in bits, widest first."""

    bytes: int
    requested: int
    passes: float
    itemsize: int
    aligned: int  # bytes that divide the start and end of every row, 16 at most; 1 where the tensor starts off 16
    widths: list[int]  # none for AMD GPUs: their code does not tell whose access it is


@dataclass
class Kernel:
    """One launch; lane-instructions and special functions of the whole grid."""

    name: str
    programs: int
    warps: int
    registers: int
    spills: int
    stack: int
    shared: int
    instructions: float
    special: float
    products: dict[str, int]  # floating-point operations of matrix products by type
    loads: list[int]  # widths in bits
    stores: list[int]
    arguments: dict[str, Argument]


@dataclass
class Result:
    """All launches of a case; per-element figures are per element of its largest tensor."""

    case: str
    architecture: str
    elements: int
    least_bytes: int
    kernels: list[Kernel]
    host_ops: list[HostOp]

    @property
    def launches(self) -> int:
        return len(self.kernels) + sum(op.launches for op in self.host_ops)

    @property
    def bytes(self) -> int:
        own = sum(argument.bytes for kernel in self.kernels for argument in kernel.arguments.values())
        return own + sum(op.bytes for op in self.host_ops)

    @property
    def requested(self) -> int:
        own = sum(argument.requested for kernel in self.kernels for argument in kernel.arguments.values())
        return own + sum(op.bytes for op in self.host_ops)

    @property
    def instructions(self) -> float:
        return sum(kernel.instructions for kernel in self.kernels) / self.elements

    @property
    def special(self) -> float:
        return sum(kernel.special for kernel in self.kernels) / self.elements

    @property
    def products(self) -> dict[str, int]:
        """Floating-point operations of matrix products by type."""
        kinds = dict.fromkeys(kind for kernel in self.kernels for kind in kernel.products)
        return {kind: sum(kernel.products.get(kind, 0) for kernel in self.kernels) for kind in kinds}

    def model(self) -> Modelled:
        """The modelled time."""
        instructions, special = self.instructions * self.elements, self.special * self.elements
        return CHIPS[self.architecture].model(self.bytes, instructions, special, self.products)

    def record(self) -> dict[str, Any]:
        """As a record of a result file, with the modelled time."""
        sums = {name: getattr(self, name) for name in ("launches", "bytes", "requested", "instructions", "special")}
        chip, model = CHIPS[self.architecture], self.model()
        kernels = {"kernels": [asdict(k) for k in self.kernels], "host_ops": [op._asdict() for op in self.host_ops]}
        about = {name: getattr(self, name) for name in ("case", "architecture", "elements", "least_bytes")}
        return {"kind": "static", **about, **sums, "model": {"chip": chip.name, **model._asdict()}, **kernels}


def _pairs(machine: list[MachineLoop], source: list[Loop]) -> list[tuple[MachineLoop, Loop]] | None:
    """Which loop of the code is which of the source, outer ones first: the same nest, but for unrolled loops."""
    if len(machine) == len(source):
        inner = [_pairs(a.children, b.children) for a, b in zip(machine, source)]
        if None not in inner:
            return [pair for a, b, below in zip(machine, source, inner) for pair in ((a, b), *(below or []))]
    # the compiler unrolls loops of few and known iterations
    if any(loop.constant for loop in source):
        return _pairs(machine, [kept for loop in source for kept in (loop.children if loop.constant else [loop])])
    return None


def _executions(code: Code, traffic: Traffic, programs: int) -> list[int]:
    """How often each block runs, over all programs."""
    executions = [programs] * len(code.blocks)
    pairs = _pairs(code.loops, traffic.loops)
    if pairs is None:
        raise ValueError("the loops of the machine code are not those of the source: bench.static cannot count them")
    for machine, source in pairs:
        for i in machine.blocks:
            executions[i] = source.trips
    return executions


# a kernel that several cases launch alike is the same object
_code = functools.lru_cache(maxsize=256)(disassemble)


class Traffics(dict[object, Traffic]):
    """Traffic by what determines it: the same launch on another architecture moves the same bytes."""

    def of(self, launch: Launch, values: dict[str, Any]) -> Traffic:
        """The launch's traffic, given the arguments that are no constants, in order."""
        text = launch.compiled.asm["ttir"]
        key = (text, launch.programs, *(tuple(v.stride()) if isinstance(v, Tensor) else v for v in values.values()))
        if key not in self:
            function = parse(text)
            found = evaluate(function, dict(zip(function.parameters, values.values(), strict=True)), launch.programs)
            names = dict(zip(function.parameters, values, strict=True))
            for site in found.sites:
                site.argument = names[site.argument]
            self[key] = found
        return self[key]


def _alignment(tensor: Tensor) -> int:
    """What Triton can know: of a pointer, whether 16 divides it; of the strides, what the launchers make plain."""
    if tensor.data_ptr() % 16:
        return 1
    rows = [stride for stride in tensor.stride() if stride > 1]
    return math.gcd(16, *(n * tensor.element_size() for n in (*rows, *tensor.shape[-1:])))


def _kernel(launch: Launch, traffics: Traffics) -> Kernel:
    compiled, metadata = launch.compiled, launch.compiled.metadata
    names = [name for name, kind in compiled.src.signature.items() if kind != "constexpr"]
    traffic = traffics.of(launch, {name: launch.arguments[name] for name in names})
    code = _code(compiled)
    instructions = special = 0.0
    for block, times in zip(code.blocks, _executions(code, traffic, launch.programs)):
        instructions += times * sum(code.counted.match(opcode) is not None for opcode in block.opcodes)
        special += times * sum(code.special.match(opcode) is not None for opcode in block.opcodes)
    threads = metadata.num_warps * metadata.target.warp_size
    widths = widths_by_argument(compiled.asm["ptx"], names) if "ptx" in compiled.asm else {}
    arguments = {}
    for name in names:
        tensor = launch.arguments[name]
        if isinstance(tensor, Tensor):
            sites = [site for site in traffic.sites if site.argument == name]
            moved, requested = sum(site.unique for site in sites), sum(site.requested for site in sites)
            passes = round(moved / unique_bytes(tensor), 3)
            arguments[name] = Argument(
                moved, requested, passes, tensor.element_size(), _alignment(tensor), widths.get(name, [])
            )
    accesses = {access for block in code.blocks for opcode in block.opcodes if (access := access_bits(opcode))}
    return Kernel(
        name=launch.kernel,
        programs=launch.programs,
        warps=metadata.num_warps,
        registers=code.registers,
        spills=code.spills,
        stack=code.stack,
        shared=metadata.shared,
        instructions=instructions * threads,
        special=special * threads,
        products=traffic.products,
        loads=sorted((bits for kind, bits in accesses if kind == "load"), reverse=True),
        stores=sorted((bits for kind, bits in accesses if kind == "store"), reverse=True),
        arguments=arguments,
    )


@contextmanager
def _float32_products(precision: str) -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def measure(case: Case, kernels: ModuleType, architectures: Sequence[str]) -> list[Result]:
    """The case on each architecture.

    Raises:
        ValueError: a kernel does something that the counting does not follow; the message says what.
    """
    results = []
    traffics = Traffics()
    arguments = case.arguments()
    given = {id(t): t for t in tree_leaves(arguments) if isinstance(t, Tensor)}
    for architecture in architectures:
        with recording(architecture) as record, _float32_products(case.precision):
            returned = getattr(kernels, case.function)(*arguments)
        # what is returned in memory that was given counts as given: once, or twice where it was read before
        memory = {t.untyped_storage().data_ptr() for t in given.values()}
        made = [t for t in tree_leaves(returned) if isinstance(t, Tensor)]
        tensors = [*given.values(), *(arguments[i] for i in case.in_place)]
        tensors += [t for t in made if t.untyped_storage().data_ptr() not in memory]
        results.append(
            Result(
                case=case.name,
                architecture=architecture,
                elements=max(math.prod(t.shape) for t in tensors),
                least_bytes=sum(map(unique_bytes, tensors)),
                kernels=[_kernel(launch, traffics) for launch in record if isinstance(launch, Launch)],
                host_ops=[op for op in record if isinstance(op, HostOp)],
            )
        )
    return results
