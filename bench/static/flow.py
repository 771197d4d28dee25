"""Basic blocks and natural loops of a compiled kernel."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

__all__ = ["Block", "Instruction", "MachineLoop", "basic_blocks", "natural_loops"]


class Instruction(NamedTuple):
    """An instruction, or a label (without an opcode): where it may jump, and whether the next one may follow."""

    opcode: str = ""
    label: str = ""
    target: str = ""
    falls_through: bool = True


@dataclass
class Block:
    """Opcodes without a branch into or out of them, and the indices of the blocks that may follow."""

    opcodes: list[str] = field(default_factory=list)
    successors: list[int] = field(default_factory=list)


@dataclass
class MachineLoop:
    """All blocks of a loop, those of inner ones included; the children in the order of the code."""

    header: int
    blocks: set[int]
    children: list[MachineLoop] = field(default_factory=list)


def basic_blocks(code: list[Instruction]) -> list[Block]:
    """The blocks that can be reached from the first: not the padding behind the end."""
    groups: list[list[Instruction]] = [[]]
    labels: dict[str, int] = {}
    for instruction in code:
        if instruction.label:
            if groups[-1]:
                groups.append([])
            labels[instruction.label] = len(groups) - 1
            continue
        groups[-1].append(instruction)
        if instruction.target or not instruction.falls_through:
            groups.append([])
    successors = []
    for i, group in enumerate(groups):
        last = group[-1] if group else Instruction()
        following = [labels[last.target]] if last.target else []
        successors.append(following + [i + 1] * (last.falls_through and i + 1 < len(groups)))
    seen: set[int] = set()
    pending = [0]
    while pending:
        i = pending.pop()
        if i not in seen:
            seen.add(i)
            pending += successors[i]
    index = {old: new for new, old in enumerate(sorted(seen))}
    return [Block([x.opcode for x in groups[i]], [index[s] for s in successors[i]]) for i in index]


def natural_loops(blocks: list[Block]) -> list[MachineLoop]:
    """The outermost loops: a jump to a block that dominates it, with all that leads back to the jump."""
    predecessors: list[list[int]] = [[] for _ in blocks]
    for i, block in enumerate(blocks):
        for successor in block.successors:
            predecessors[successor].append(i)
    dominators = _dominators(predecessors)
    bodies: dict[int, set[int]] = {}
    for i, block in enumerate(blocks):
        for header in dominators[i].intersection(block.successors):
            body = bodies.setdefault(header, {header})
            pending = [i]
            while pending:
                j = pending.pop()
                if j not in body:
                    body.add(j)
                    pending += predecessors[j]
    outermost: list[MachineLoop] = []
    for header in sorted(bodies, key=lambda h: (-len(bodies[h]), h)):
        siblings = outermost
        while parent := next((loop for loop in siblings if header in loop.blocks), None):
            siblings = parent.children
        siblings.append(MachineLoop(header, bodies[header]))
        siblings.sort(key=lambda loop: loop.header)
    return outermost


def _dominators(predecessors: list[list[int]]) -> list[set[int]]:
    everything = set(range(len(predecessors)))
    dominators = [{0}, *(everything for _ in predecessors[1:])]
    changed = True
    while changed:
        changed = False
        for i, before in enumerate(predecessors[1:], 1):
            new = set.intersection(*(dominators[p] for p in before)) | {i}
            changed |= new != dominators[i]
            dominators[i] = new
    return dominators
