"""Result files as Markdown and pictures: `python -m bench.report FILE...`.

For each `NAME.jsonl` it writes `NAME.md` and `NAME-*.png` beside it (or into `--out`). With `--spread` it compares
files of the same command instead: how far the same figure differs between runs.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import tyro

from bench import plots, records
from bench.records import Record
from bench.rivals import FLOOR, OURS
from bench.tables import fastest_rival, kernel_lines, kernel_tables, markdown, revision_table, throughput_tables, what
from fastvae.checkpoint import write_atomic


@dataclass(frozen=True)
class Arguments:
    """Turn result files of bench.kernels and bench.train into Markdown tables and plots."""

    files: tyro.conf.Positional[tuple[Path, ...]]
    """Result files."""
    out: Path | None = None
    """Folder for the reports (default: beside each file)."""
    spread: bool = False
    """Compare the files, runs of the same command, with each other."""


def _about(header: Record) -> str:
    machine = header["machine"]
    where = f"{machine['gpu']}, " if machine["gpu"] else ""
    where += f"{machine['cpu']} with {machine['cores']} cores, {machine['system']}"
    versions = ", ".join(f"{name} {version}" for name, version in header["versions"].items())
    lines = [f"Machine: {where}. Versions: {versions}. Commit {header['commit']}, {header['time']}."]
    if "copy_bytes_per_s" in header:
        threads = header["arguments"]["threads"]
        lines.append(f"A large copy moves {header['copy_bytes_per_s'] / 1e9:.1f} GB/s (read and written).")
        lines.append(f"Threads: {threads}. {OURS} ran on: {header['backend']}.")
    if header["arguments"]["quick"]:
        lines.append("**A quick run, to see that it works: its figures mean nothing.**")
    return "\n".join(lines) + "\n"


def lost(found: Sequence[Record]) -> list[str]:
    """A line for each figure where somebody is faster than we are, most first."""
    lines = []
    for line in kernel_lines(r for r in found if r["kind"] == "time"):
        rival = fastest_rival(line)
        if rival is not None and rival["times_ours"][1] < 1.0:
            low, median, high = rival["times_ours"]
            lines.append((median, f"{rival['op']}, {what(rival)}: {rival['provider']} takes {median:.2f} of our time"))
            lines[-1] = (median, f"{lines[-1][1]} (quartiles {low:.2f} to {high:.2f})")
    throughput = [r for r in found if r["kind"] == "throughput"]
    ours = {_setting(r): r["images_per_s"][1] for r in throughput if r["provider"] == OURS}
    for r in throughput:
        share = ours.get(_setting(r), math.inf) / r["images_per_s"][1]
        if share < 1.0 and r["provider"] != FLOOR:
            setting = f"{r['model']}, batch {r['batch_size']}, {r['condition']}"
            lines.append((share, f"{setting}: {r['provider']} makes {1 / share:.2f} times our images/s"))
    return [text for _, text in sorted(lines)]


def _setting(r: Record) -> tuple[str, int, str]:
    return r["model"], r["batch_size"], r["condition"]


def report(path: Path, folder: Path) -> Path:
    """Write the report of one result file into `folder` and return its path."""
    header, found = records.read(path)
    bench = header["bench"]
    pictures = {"kernels": plots.kernels, "train": plots.train}.get(bench, lambda *_: {})(header, found)
    parts = [f"# bench.{bench}: {path.stem}\n", _about(header)]
    for name, figure in pictures.items():
        picture = folder / f"{path.stem}-{name}.png"
        plots.save(figure, picture)
        parts.append(f"![{name}]({picture.name})\n")
    if bench != "base":
        defeats = [f"- {line}" for line in lost(found)] or ["Nowhere in this file."]
        parts += ["## Where a rival is faster\n", *defeats, "", "## All figures\n"]
    tables = {"kernels": kernel_tables, "train": throughput_tables, "base": revision_table}
    parts.append(tables[bench](found))
    out = folder / f"{path.stem}.md"
    write_atomic(out, "\n".join(parts) + "\n")
    return out


def _figures(found: Sequence[Record]) -> dict[str, float]:
    """The headline figure of each record by what it is of."""
    out = {}
    for r in found:
        if r["kind"] == "time":
            out[f"{r['op']}, {what(r)}, {r['provider']}, µs"] = 1e6 * r["seconds"][1]
            if r["times_ours"] is not None and r["provider"] != OURS:
                out[f"{r['op']}, {what(r)}, {r['provider']} / ours"] = r["times_ours"][1]
        elif r["kind"] == "throughput":
            name = f"{r['model']}, batch {r['batch_size']}, {r['condition']}, {r['provider']}"
            out[f"{name}, images/s"] = r["images_per_s"][1]
            if r["of_floor"] is not None:
                out[f"{name}, of the floor"] = r["of_floor"][1]
    return out


def spread(paths: Sequence[Path]) -> str:
    """How far figures differ between runs, largest over least less 1: medians, and the ten that differ most."""
    runs = [_figures(records.read(path)[1]) for path in paths]
    shared = [name for name in runs[0] if all(name in run for run in runs)]
    if len(runs) < 2 or not shared:
        raise SystemExit("--spread needs two or more files that share figures")
    by_name = {name: max(r[name] for r in runs) / min(r[name] for r in runs) - 1.0 for name in shared}
    kinds: dict[str, list[float]] = {"times and speeds": [], "ratios": []}
    for name, value in by_name.items():
        kinds["times and speeds" if name.endswith(("µs", "images/s")) else "ratios"].append(value)
    rows = [[kind, str(len(v)), f"{statistics.median(v):.1%}", f"{max(v):.1%}"] for kind, v in kinds.items() if len(v)]
    summary = markdown(["figures", "number", "median spread", "largest"], rows)
    worst = sorted(by_name, key=lambda name: -by_name[name])[:10]
    lines = [[name, *(f"{r[name]:.3g}" for r in runs), f"{by_name[name]:.1%}"] for name in worst]
    return f"{summary}\n\n{markdown(['figure', *(p.stem for p in paths), 'spread'], lines)}"


def main() -> None:
    """Entry point of `python -m bench.report`."""
    arguments = tyro.cli(Arguments)
    try:
        if arguments.spread:
            print(spread(arguments.files))
            return
        for path in arguments.files:
            folder = arguments.out or path.parent
            folder.mkdir(parents=True, exist_ok=True)
            print(f"wrote {report(path, folder)}")
    except (OSError, ValueError) as error:
        raise SystemExit(str(error)) from error


if __name__ == "__main__":
    main()
