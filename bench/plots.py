"""Pictures of result files: ratios to our time, distance to the copy bandwidth, shares of the GEMM floor."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullFormatter

from bench.records import Record
from bench.rivals import FLOOR, OURS
from bench.tables import fastest_rival, kernel_lines

__all__ = ["kernels", "save", "train"]

WIN, LOSS, QUIET, RIVAL = "#2a6f97", "#c1121f", "#8d99ae", "#e09f3e"


def save(figure: Figure, path: Path) -> None:
    """Write the picture as PNG."""
    # without matplotlib's version in it, the same figures give the same file
    figure.savefig(path, dpi=110, metadata={"Software": None})


def _machine(header: Record) -> str:
    machine = header["machine"]
    return machine["gpu"] or f"{machine['cpu']}, {machine['cores']} cores"


def kernels(header: Record, found: Sequence[Record]) -> dict[str, Figure]:
    """For `bench.kernels`: ratios and memory throughput, of forward and backward together where an op has both."""
    lines = kernel_lines(r for r in found if r["kind"] == "time")
    whole = [line for line in lines if _mode(line) == "both" or _only_forward(line, lines)]
    figures = {}
    if any(fastest_rival(line) for line in whole):
        figures["ratio"] = _ratios(header, [line for line in whole if fastest_rival(line)])
    ours = [line[OURS] for line in lines if OURS in line and line[OURS]["bytes_per_s"] is not None]
    if ours:
        figures["bandwidth"] = _bandwidth(header, ours)
    return figures


def _mode(line: dict[str, Record]) -> str:
    return str(next(iter(line.values()))["mode"])


def _only_forward(line: dict[str, Record], lines: Sequence[dict[str, Record]]) -> bool:
    op = next(iter(line.values()))["op"]
    return all(_mode(other) == "forward" for other in lines if next(iter(other.values()))["op"] == op)


def _ratios(header: Record, lines: Sequence[dict[str, Record]]) -> Figure:
    """One row per op and shape: torch.compile's time by ours as a bar, the fastest rival's as a dot."""
    figure = Figure(figsize=(9.0, 1.6 + 0.26 * len(lines)), layout="constrained")
    axes = figure.subplots()
    names = []
    for row, line in enumerate(lines):
        r, rival = next(iter(line.values())), fastest_rival(line)
        assert rival is not None
        names.append(f"{r['op']}  {r['shape']}" + (" uint8" if r["data"] == "uint8" else ""))
        if r["dtype"] != "float32":
            names[-1] += f" {r['dtype']}"
        if "compile" in line:
            ratio = line["compile"]["times_ours"][1]
            axes.barh(row, ratio - 1.0, left=1.0, color=WIN if ratio >= 1 else LOSS, height=0.7)
        fastest = rival["times_ours"][1]
        axes.plot(fastest, row, "o", color=RIVAL, markersize=5, markeredgecolor="black", markeredgewidth=0.6)
        axes.annotate(
            f"{fastest:.2f} {rival['provider']}", (1.01, row), xycoords=("axes fraction", "data"), va="center"
        )
    axes.axvline(1.0, color="black", linewidth=1.0)
    axes.set_xscale("log")
    # a log axis wants decades; ratios want plain numbers
    axes.xaxis.set_major_locator(_ticks(axes.get_xlim()))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}x"))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_yticks(range(len(lines)), names, fontsize=8)
    axes.invert_yaxis()
    axes.margins(y=0.01)
    axes.grid(axis="x", color="#dddddd", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.set_xlabel("time of torch.compile (bar) and of the fastest rival (dot, named at the right), by ours")
    threads = header["arguments"]["threads"]
    axes.set_title(f"Forward + backward (gather: forward), {_machine(header)}, threads: {threads}", fontsize=10)
    return figure


def _ticks(limits: tuple[float, float]):  # type: ignore[no-untyped-def]
    from matplotlib.ticker import FixedLocator

    low, high = limits
    steps = [m * 10.0**e for e in range(-3, 4) for m in (1.0, 2.0, 5.0)]
    return FixedLocator([s for s in steps if low <= s <= high])


def _bandwidth(header: Record, ours: Sequence[Record]) -> Figure:
    """Bytes that an op cannot avoid by its time, against the bandwidth of a copy."""
    figure = Figure(figsize=(9.0, 5.5), layout="constrained")
    axes = figure.subplots()
    markers = {"forward": "v", "backward": "^", "both": "o"}
    ops = list(dict.fromkeys(r["op"] for r in ours))
    for number, op in enumerate(ops):
        for mode, marker in markers.items():
            own = [r for r in ours if r["op"] == op and r["mode"] == mode]
            speeds = [r["bytes_per_s"] / 1e9 for r in own]
            # one entry per op in the legend
            label = op if mode == next(r["mode"] for r in ours if r["op"] == op) else None
            sizes = [r["least_bytes"] / 1e6 for r in own]
            axes.plot(sizes, speeds, marker, color=f"C{number % 10}", label=label, alpha=0.85, fillstyle=_fill(number))
    copy = header["copy_bytes_per_s"] / 1e9
    axes.axhline(copy, color="black", linewidth=1.0)
    axes.annotate(f"large copy: {copy:.1f} GB/s", (0.01, copy), xycoords=("axes fraction", "data"), va="bottom")
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel("least bytes of the op, MB (what fits the cache may pass the copy)")
    axes.set_ylabel("least bytes / time, GB/s")
    axes.set_title(f"Distance to memory: forward (v), backward (^), both (o), {_machine(header)}", fontsize=10)
    axes.grid(color="#dddddd", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), fontsize=8, frameon=False)
    return figure


def _fill(number: int) -> str:
    # ten colours serve twenty ops
    return "full" if number < 10 else "none"


def train(header: Record, found: Sequence[Record]) -> dict[str, Figure]:
    """For `bench.train`: images per second of every provider, a panel per setting."""
    throughput = [r for r in found if r["kind"] == "throughput"]
    if not throughput:
        return {}
    settings = list(dict.fromkeys((r["model"], r["batch_size"], r["condition"]) for r in throughput))
    columns = min(3, len(settings))
    rows = -(-len(settings) // columns)
    providers = list(dict.fromkeys(r["provider"] for r in throughput))
    height = 0.9 + 0.24 * len(providers)
    figure = Figure(figsize=(4.2 * columns + 1.0, height * rows + 0.6), layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False).flat
    # the settings first: of the panels, none is taken too many
    for setting, axes in zip(settings, panels):
        own = [r for r in throughput if (r["model"], r["batch_size"], r["condition"]) == setting]
        _train_panel(axes, sorted(own, key=lambda r: r["images_per_s"][1]))
        axes.set_title(f"{setting[0]}, batch {setting[1]}, {setting[2]}", fontsize=9)
    for axes in [*panels]:
        axes.set_visible(False)
    title = f"Thousands of images per second, and share of the GEMM floor\n{_machine(header)}"
    figure.suptitle(title, fontsize=10)
    return {"throughput": figure}


def _train_panel(axes, own: Sequence[Record]) -> None:  # type: ignore[no-untyped-def]
    colours = {OURS: WIN, FLOOR: "#333333"}
    for row, r in enumerate(own):
        low, median, high = (s / 1e3 for s in r["images_per_s"])
        error = [[median - low], [high - median]]
        axes.barh(row, median, xerr=error, color=colours.get(r["provider"], QUIET), height=0.7, ecolor="#555555")
        share = "" if r["of_floor"] is None else f" {r['of_floor'][1]:.2f}"
        axes.text(high, row, share, va="center", fontsize=8)
    axes.set_yticks(range(len(own)), [r["provider"] for r in own], fontsize=8)
    axes.margins(x=0.18, y=0.02)
    axes.tick_params(axis="x", labelsize=8)
