"""The regression gate: what must never happen, and what must not get worse than the committed baseline.

Never: a spill, a stack. Not worse: launches, access widths; and by more than 5 %: instructions per element, bytes
moved, bytes requested. Another minor version of Triton compiles other code: then only spills, stack and widths count.
"""

from __future__ import annotations

import importlib.metadata
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench.records import ROOT
from bench.static.measure import Result
from fastvae.checkpoint import write_atomic

__all__ = ["PATH", "UPDATE", "compare", "faults", "read", "same_compiler", "write"]

PATH = ROOT / "bench" / "static_baseline.json"
UPDATE = "python -m bench.static --update-baseline"
ALLOWED = 1.05

Entry = dict[str, Any]


def _triton() -> str:
    return importlib.metadata.version("triton")


def _widths(result: Result) -> dict[str, list[int]]:
    """Narrowest and widest access in bits: by argument where that is known, else of all loads and all stores."""
    found: dict[str, set[int]] = {}
    for kernel in result.kernels:
        by_argument = {name: argument.widths for name, argument in kernel.arguments.items() if argument.widths}
        for name, bits in (by_argument or {"loads": kernel.loads, "stores": kernel.stores}).items():
            found.setdefault(name, set()).update(bits)
    return {name: [min(bits), max(bits)] for name, bits in found.items() if bits}


def entry(result: Result) -> Entry:
    """What the baseline keeps of a result."""
    return {
        "launches": result.launches,
        "bytes": result.bytes,
        "requested": result.requested,
        "instructions": round(result.instructions, 3),
        "special": round(result.special, 3),
        "widths": _widths(result),
    }


def write(path: Path, results: Sequence[Result]) -> None:
    """One line per case and architecture, so that a diff says what changed."""
    lines = sorted(f"{json.dumps(f'{r.architecture} {r.case}')}: {json.dumps(entry(r))}" for r in results)
    write_atomic(path, f'{{"triton": "{_triton()}", "cases": {{\n' + ",\n".join(lines) + "\n}}\n")


def read(path: Path) -> tuple[str, dict[str, Entry]]:
    """The version of Triton and the entries by "architecture case".

    Raises:
        ValueError: there is no such baseline.
    """
    try:
        found = json.loads(path.read_text())
        return found["triton"], found["cases"]
    except (OSError, ValueError, LookupError) as error:
        raise ValueError(f"no baseline in {path} ({error!r}); make one: {UPDATE}") from error


def same_compiler(version: str) -> bool:
    """Whether this Triton's code can be compared with that of `version`."""
    return version.split(".")[:2] == _triton().split(".")[:2]


def faults(result: Result) -> list[str]:
    """What must never happen."""
    where = f"{result.architecture} {result.case}"
    found = []
    for kernel in result.kernels:
        if kernel.spills:
            found.append(f"{where}: {kernel.name} spills ({kernel.spills} instructions access local memory)")
        if kernel.stack:
            found.append(f"{where}: {kernel.name} uses a stack of {kernel.stack} bytes")
    return found


def compare(result: Result, was: Entry | None, *, counts: bool) -> list[str]:
    """What got worse than the baseline's entry; with `counts` also how much is executed and moved."""
    where = f"{result.architecture} {result.case}"
    if was is None:
        return [f"{where}: not in the baseline"]
    now = entry(result)
    found = []
    for name, (narrow, wide) in was["widths"].items():
        narrow_now, wide_now = now["widths"].get(name, (0, 0))
        if narrow_now < narrow or wide_now < wide:
            found.append(f"{where}: accesses to {name} had {narrow} to {wide} bits, now {narrow_now} to {wide_now}")
    if not counts:
        return found
    names = ", ".join([kernel.name for kernel in result.kernels] + [op.name for op in result.host_ops])
    if now["launches"] > was["launches"]:
        found.append(f"{where}: {was['launches']} launches, now {now['launches']} ({names})")
    labels = {
        "bytes": "bytes moved",
        "requested": "bytes requested, repeated visits counted",
        "instructions": "instructions per element",
    }
    for key, label in labels.items():
        if now[key] > ALLOWED * was[key]:
            percent = 100.0 * (now[key] / was[key] - 1.0)
            found.append(f"{where}: {label} {was[key]:,}, now {now[key]:,} (+{percent:.1f} %) in {names}")
    return found
