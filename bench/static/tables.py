"""The static report as Markdown: a table per architecture, and torch.compile's figures beside ours."""

from __future__ import annotations

from collections.abc import Sequence

from bench.chips import CHIPS
from bench.static.measure import Result
from bench.tables import markdown

__all__ = ["report"]

# Inductor's code for the same work, forward and backward: launches, MB moved, registers, instructions per element.
# Source: torch.compile of torch 2.14.1 for a fake sm_90 device, compiled ahead of time and counted, never run
_SAMPLE_KL = (3, 10.52, "22 to 255 by config, one spills 408 B", "forward 138 to 217, backward 34 to 46")
_BERNOULLI = (2, 64.3, "126", "forward 65")
_BERNOULLI_MIXED = (2, 25.7, "128", "forward 63")
_HEAD = (5, 77.0, "", "")
_GAUSSIAN = (2, 102.8, "72", "forward 20 to 32")
_COMPILED = [
    ("sample + KL, fp32", ["reparameterize_kl fwd fp32 4096x64", "reparameterize_kl bwd fp32 4096x64"], _SAMPLE_KL),
    ("Bernoulli NLL, fp32", ["bernoulli_nll fwd fp32 4096x784", "bernoulli_nll bwd fp32 4096x784"], _BERNOULLI),
    ("Bernoulli NLL, fp32, one pass", ["bernoulli_nll one pass fp32 4096x784"], _BERNOULLI),
    ("the same with the bias gradient", ["bernoulli_nll one pass, column sums fp32 4096x784"], _HEAD),
    ("Bernoulli NLL, bf16+uint8, one pass", ["bernoulli_nll one pass bf16+uint8 4096x784"], _BERNOULLI_MIXED),
    ("Gaussian NLL, fp32", ["gaussian_nll fwd fp32 4096x784", "gaussian_nll bwd fp32 4096x784"], _GAUSSIAN),
    ("Gaussian NLL, fp32, one pass", ["gaussian_nll one pass fp32 4096x784"], _GAUSSIAN),
]


def _bits(widths: list[int]) -> str:
    return "/".join(map(str, widths)) or "-"


def _row(result: Result) -> list[str]:
    model = result.model()
    kernels = result.kernels

    def each(values: list[int]) -> str:
        return "+".join(map(str, values))

    return [
        result.case,
        str(result.launches),
        f"{result.bytes / 1e6:.2f}",
        f"{result.bytes / result.least_bytes:.3f}",
        each([k.registers for k in kernels]),
        each([k.spills for k in kernels]),
        each([k.stack for k in kernels]),
        each([k.shared for k in kernels]),
        _bits(sorted({w for k in kernels for w in k.loads}, reverse=True)),
        _bits(sorted({w for k in kernels for w in k.stores}, reverse=True)),
        f"{result.instructions:.1f}",
        f"{result.special:.2f}",
        f"{model.microseconds:.1f}",
        model.bound,
    ]


_HEAD_LINE = [
    *("case", "launches", "MB", "of least", "registers", "spills", "stack", "shared"),
    *("loads, bits", "stores, bits", "instr/elem", "special/elem", "model µs", "bound"),
]


def _architecture(name: str, results: Sequence[Result]) -> list[str]:
    chip = CHIPS[name]
    rows = [_row(result) for result in results]
    other = sorted(f"{row[0]} ({row[-1]})" for row in rows if row[-1] != "DRAM")
    memory = f"{len(rows) - len(other)} of {len(rows)} cases are bound by DRAM in the model"
    return [
        f"## {name}: {chip.name}\n",
        f"{chip.dram / 1e12:.2f} TB/s, {chip.multiprocessors} multiprocessors at {chip.clock / 1e9:.3f} GHz: "
        f"{chip.multiprocessors * chip.clock * chip.issue_lanes / chip.dram:.1f} lane-instructions and "
        f"{chip.multiprocessors * chip.clock * chip.special_lanes / chip.dram:.2f} special functions per byte. "
        f"Source: {chip.source}.\n",
        markdown(_HEAD_LINE, rows) + "\n",
        memory + (f"; not: {'; '.join(other)}.\n" if other else ".\n"),
    ]


def _compiled(results: Sequence[Result]) -> list[str]:
    by_case = {r.case: r for r in results if r.architecture == "sm_90"}
    rows = []
    for work, names, (launches, megabytes, registers, instructions) in _COMPILED:
        own = [by_case[name] for name in names if name in by_case]
        if len(own) < len(names):
            continue
        rows.append(
            [
                work,
                f"{sum(r.launches for r in own)} / {launches}",
                f"{sum(r.bytes for r in own) / 1e6:.2f} / {megabytes:.2f}",
                f"{' + '.join(str(k.registers) for r in own for k in r.kernels)} / {registers}",
                f"{' + '.join(f'{r.instructions:.1f}' for r in own)} / {instructions}",
            ]
        )
    if not rows:
        return []
    head = ["forward + backward", "launches", "MB moved", "registers", "instructions per element"]
    return [
        "## Beside torch.compile, sm_90\n",
        "Ours / Inductor's. Inductor's: torch 2.14.1 for a fake sm_90 device, compiled ahead of time and counted.\n",
        markdown(head, rows) + "\n",
    ]


def report(results: Sequence[Result]) -> str:
    """The whole report."""
    parts = [
        "# What the compilers made of the kernels\n",
        "Made by `python -m bench.static`; `bench/static/__init__.py` defines the figures. Several launches: a figure\n"
        "each, joined by +. **Times are modelled, never measured**: the largest of bytes over bandwidth, instructions\n"
        "over issue rate and special functions over their rate, with no latency, cache or launch cost.\n",
    ]
    for name in dict.fromkeys(r.architecture for r in results):
        parts += _architecture(name, [r for r in results if r.architecture == name])
    return "\n".join(parts + _compiled(results))
