"""Compiled kernels: resources, instructions and access widths, read from SASS and PTX (NVIDIA) or GCN (AMD)."""

from __future__ import annotations

import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from triton import knobs

from bench.static.flow import Block, Instruction, MachineLoop, basic_blocks, natural_loops

__all__ = ["Code", "access_bits", "disassemble", "widths_by_argument"]


@dataclass
class Code:
    """A compiled kernel. Sizes in bytes; `spills` counts the instructions that access local (scratch) memory."""

    registers: int
    spills: int
    stack: int
    shared: int
    blocks: list[Block]
    loops: list[MachineLoop]
    counted: re.Pattern[str]  # opcodes that take an issue slot of the vector units
    special: re.Pattern[str]  # opcodes of the special-function units


def disassemble(compiled: Any) -> Code:
    """The code of what Triton's JIT returned."""
    return _gcn(compiled.asm["amdgcn"]) if "amdgcn" in compiled.asm else _sass(compiled.asm["cubin"])


def _sass(cubin: bytes) -> Code:
    def run(tool: Any, *arguments: str) -> str:
        return subprocess.run([tool.path, *arguments], capture_output=True, text=True, check=True).stdout

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "kernel.cubin")
        path.write_bytes(cubin)
        text = run(knobs.nvidia.nvdisasm, "-c", "-ndf", str(path))
        usage = dict(
            re.findall(r"(REG|STACK|SHARED|LOCAL):(\d+)", run(knobs.nvidia.cuobjdump, "-res-usage", str(path)))
        )
    code = []
    for line in text.splitlines():
        if label := re.match(r"\s*(\.L_x_\w+):", line):
            code.append(Instruction(label=label[1]))
        elif match := re.match(r"\s*/\*[0-9a-f]+\*/\s+(@\S+)?\s*([A-Z][\w.]+)\s*([^;]*)", line):
            predicate, opcode, operands = match.groups()
            name = opcode.partition(".")[0]
            # ptxas jumps with CALL too; where it is a call, the code behind it follows
            jump = re.match(r"(!?U?P\w+, *)?`\((\.L_x_\w+)\)", operands) if name in ("BRA", "CALL") else None
            conditional = bool(predicate or (jump and jump[1]) or name == "CALL")
            ends = name in ("BRA", "EXIT", "RET") and not conditional
            code.append(Instruction(opcode, target=jump[2] if jump else "", falls_through=not ends))
    blocks = basic_blocks(code)
    return Code(
        registers=int(usage["REG"]),
        spills=sum(opcode.startswith(("LDL", "STL")) for block in blocks for opcode in block.opcodes),
        stack=int(usage["STACK"]) + int(usage["LOCAL"]),
        shared=int(usage["SHARED"]),
        blocks=blocks,
        loops=_without_waits(natural_loops(blocks), blocks),
        counted=re.compile(r"(?!NOP)"),
        special=re.compile(r"MUFU"),
    )


def _without_waits(loops: list[MachineLoop], blocks: list[Block]) -> list[MachineLoop]:
    """The loops of the program: not those that try a barrier, or an allocation of tensor memory, until it succeeds."""
    kept = []
    for loop in loops:
        opcodes = [opcode for i in loop.blocks for opcode in blocks[i].opcodes]
        if len(loop.blocks) > 1 or not any(re.match(r"SYNCS\..*TRYWAIT|UTCATOMSWS", opcode) for opcode in opcodes):
            loop.children = _without_waits(loop.children, blocks)
            kept.append(loop)
    return kept


def _gcn(text: str) -> Code:
    code = []
    body = text[text.index(".type\t") : text.index(".Lfunc_end0:")]
    for line in body.splitlines():
        if label := re.match(r"(\.LBB\w+):", line):
            code.append(Instruction(label=label[1]))
        elif match := re.match(r"\s+([a-z]\w+)\s*([^;]*)", line):
            opcode, operands = match.groups()
            target = operands.strip() if opcode.startswith(("s_cbranch", "s_branch")) else ""
            code.append(Instruction(opcode, target=target, falls_through=opcode not in ("s_branch", "s_endpgm")))
    blocks = basic_blocks(code)
    resources = {name: int(n) for name, n in re.findall(r"^ +(?:- )?\.(\w+): +(\d+)$", text, re.MULTILINE)}
    scratch = sum(opcode.startswith("scratch_") for block in blocks for opcode in block.opcodes)
    return Code(
        registers=resources["vgpr_count"],
        spills=resources["vgpr_spill_count"] + resources["sgpr_spill_count"] + scratch,
        stack=resources["private_segment_fixed_size"],
        shared=resources["group_segment_fixed_size"],
        blocks=blocks,
        loops=natural_loops(blocks),
        # scalar instructions issue beside the vector ones, waits and no-ops take no unit
        counted=re.compile(r"v_|ds_|buffer_|global_|flat_|scratch_"),
        special=re.compile(r"v_(exp|log|rcp|rsq|sqrt|sin|cos)_"),
    )


_GCN_BITS = {"dwordx4": 128, "dwordx3": 96, "dwordx2": 64, "dword": 32}


def access_bits(opcode: str) -> tuple[str, int] | None:
    """("load" or "store", bits per lane) of an access to global memory."""
    # LDGSTS is a load that goes to shared memory without passing through registers
    if match := re.match(r"(LD|ST)G(?:STS)?\.", opcode):
        widths = re.findall(r"\.[US]?(8|16|64|128|256)(?=\.|$)", opcode)
        return ("load" if match[1] == "LD" else "store"), int(widths[0]) if widths else 32
    if match := re.match(r"(?:global|buffer|flat)_(load|store)_(\w+)", opcode):
        size = match[2]
        small = 8 if "byte" in size else 16
        return match[1], next((bits for name, bits in _GCN_BITS.items() if size.startswith(name)), small)
    return None


def widths_by_argument(ptx: str, names: list[str]) -> dict[str, list[int]]:
    """Bits of the accesses to each pointer argument, widest first; `names` are those of the kernel's parameters."""
    origins: dict[str, set[str]] = {}
    accesses: list[tuple[str, int]] = []
    flows: list[tuple[str, list[str]]] = []
    for line in ptx.splitlines():
        if match := re.search(r"ld\.param\.\w+\s+(%rd\d+), \[\w+_param_(\d+)", line):
            if int(match[2]) < len(names):
                origins[match[1]] = {names[int(match[2])]}
        elif match := re.search(r"\b(?:ld|st)\.global((?:\.\w+(?:::\w+)*)+)", line):
            vector = re.search(r"\.v(\d)", match[1])
            width = re.search(r"\.[busf](\d+)", match[1])
            address = re.search(r"\[\s*(%rd\d+)", line)
            if width and address:
                accesses.append((address[1], int(width[1]) * (int(vector[1]) if vector else 1)))
        elif match := re.search(
            r"\bcp\.async\.c[ag]\.shared\.global \[[^]]*\], \[\s*(%rd\d+)[^]]*\], (0x[0-9a-f]+)", line
        ):
            accesses.append((match[1], 8 * int(match[2], 16)))
        elif match := re.match(r"\s*(?:@!?%p\d+\s+)?[a-z][\w.]+\s+(%rd\d+), (.*);", line):
            flows.append((match[1], re.findall(r"%rd\d+", match[2])))
    changed = True
    while changed:
        changed = False
        for result, sources in flows:
            known = origins.setdefault(result, set())
            new = known.union(*(origins.get(source, set()) for source in sources))
            changed |= len(new) > len(known)
            origins[result] = new
    widths: dict[str, set[int]] = {}
    for register, size in accesses:
        for name in origins.get(register, ()):
            widths.setdefault(name, set()).add(size)
    return {name: sorted(sizes, reverse=True) for name, sizes in widths.items()}
