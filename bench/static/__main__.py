"""The command line of the static report and its gate."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import tyro
from triton import knobs

from bench import records
from bench.static import baseline
from bench.static.collect import collect, is_main
from bench.static.measure import Result
from bench.static.tables import report
from fastvae.checkpoint import write_atomic

Architecture = Literal["sm_80", "sm_90", "sm_100", "sm_120", "gfx942"]


@dataclass(frozen=True)
class Arguments:
    """What the compilers make of the kernels, counted without a GPU."""

    arch: tuple[Architecture, ...] = ("sm_80", "sm_90", "sm_100", "sm_120", "gfx942")
    """Architectures to compile for."""
    op: str = ""
    """Only cases whose name contains this, e.g. "bernoulli_nll one pass" or "bf16"."""
    all_shapes: bool = False
    """Also the larger shapes and rarer dtypes, for sm_90 alone (not part of the baseline)."""
    check: bool = False
    """Compare with the baseline; exit with 1 if anything got worse."""
    update_baseline: bool = False
    """Make the present state the baseline."""
    jobs: int = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    """Processes."""
    out: Path = records.ROOT / "bench" / "results" / "static.json"
    """Result file of a report; the tables are written beside it."""


def check(arguments: Arguments, results: Sequence[Result]) -> list[str]:
    """What is wrong, in words."""
    version, entries = baseline.read(baseline.PATH)
    counts = baseline.same_compiler(version)
    if not counts:
        print(f"The baseline is Triton {version}'s: only spills, stack and access widths are compared.")
    found = [fault for result in results for fault in baseline.faults(result)]
    for result in results:
        found += baseline.compare(result, entries.get(f"{result.architecture} {result.case}"), counts=counts)
    measured = {f"{result.architecture} {result.case}" for result in results}
    for name in sorted(entries.keys() - measured):
        architecture, case = name.split(" ", 1)
        if architecture in arguments.arch and arguments.op in case:
            found.append(f"{name}: in the baseline, but no longer compiled")
    return found


def _update(results: Sequence[Result]) -> None:
    bad = [fault for result in results for fault in baseline.faults(result)]
    if bad:
        raise SystemExit("\n".join([*bad, "A baseline never has spills or stack: it was not written."]))
    baseline.write(baseline.PATH, [result for result in results if is_main(result)])
    print(f"wrote {baseline.PATH}")


def run(arguments: Arguments) -> None:
    """Measure, and check, update or report."""
    if knobs.runtime.interpret:
        raise SystemExit("TRITON_INTERPRET is set, and an interpreted kernel cannot be compiled: unset it")
    if arguments.update_baseline and (arguments.op or len(arguments.arch) < 5):
        raise SystemExit("--update-baseline takes all cases and architectures: leave out --op and --arch")
    results = collect(arguments.arch, arguments.op, all_shapes=arguments.all_shapes, jobs=arguments.jobs)
    if not results:
        raise SystemExit(f"no case contains {arguments.op!r}")
    if arguments.update_baseline:
        _update(results)
    elif arguments.check:
        bad = check(arguments, results)
        if bad:
            advice = f"If this is meant, say why in the commit and update the baseline: {baseline.UPDATE}"
            raise SystemExit("\n".join([*bad, advice]))
        print(f"{len(results)} results are no worse than {baseline.PATH.name}; no spill, no stack.")
    else:
        text = report(results)
        print(text)
        lines = [records.header("static", asdict(arguments)), *(result.record() for result in results)]
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(arguments.out, "[\n" + ",\n".join(map(json.dumps, lines)) + "\n]\n")
        write_atomic(arguments.out.with_suffix(".md"), text)
        print(f"wrote {arguments.out}", file=sys.stderr)


if __name__ == "__main__":
    try:
        run(tyro.cli(Arguments))
    except (RuntimeError, ValueError) as error:
        raise SystemExit(str(error)) from error
