"""Result records as Markdown tables, which also read well in a terminal."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from bench.records import Record
from bench.rivals import OURS

__all__ = ["fastest_rival", "kernel_lines", "kernel_tables", "markdown", "revision_table", "throughput_tables", "what"]


def markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table, columns padded; the first column is text, the others are aligned to the right."""
    widths = [max(len(row[i]) for row in [head, *rows]) for i in range(len(head))]

    def line(cells: Sequence[str]) -> str:
        padded = [cells[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(cells[1:], widths[1:]))]
        return "| " + " | ".join(padded) + " |"

    rule = "|" + "|".join(["-" * (widths[0] + 2), *("-" * (w + 1) + ":" for w in widths[1:])]) + "|"
    return "\n".join([line(head), rule, *map(line, rows)])


def _setting(record: Record) -> tuple[str, int, str, str]:
    return record["model"], record["batch_size"], record["condition"], record["binarize"]


def _condition(name: str) -> str:
    words = {"one": "one thread", "two": "two threads", "gpu": "on the GPU"}
    return words.get(name, "two threads, one core kept busy by another process")


def throughput_tables(records: Sequence[Record]) -> str:
    """One table per setting of `bench.train`: a line per provider, fastest first."""
    parts = []
    throughput = [r for r in records if r["kind"] == "throughput"]
    for setting in dict.fromkeys(map(_setting, throughput)):
        model, batch_size, condition, binarize = setting
        data = "grey levels" if binarize == "none" else "binarised at each step"
        parts.append(f"**{model}, batch {batch_size}, {_condition(condition)}** ({data})\n")
        own = sorted((r for r in throughput if _setting(r) == setting), key=lambda r: -r["images_per_s"][1])
        head = ["provider", "images/s", "quartiles", "of the floor", "quartiles", "peak MB", "start s"]
        parts.append(markdown(head, [_throughput_row(r) for r in own]) + "\n")
        parts += [_breakdown(r) + "\n" for r in own if r.get("breakdown")]
    targets = [r for r in records if r["kind"] == "target"]
    if targets:
        head = ["provider", "setting", "target nats", "reached", "seconds", "epochs", "nats then"]
        parts.append("**Time to a test negative ELBO** (tests not counted)\n")
        parts.append(markdown(head, [_target_row(r) for r in targets]) + "\n")
    skipped = {r["provider"]: r["reason"] for r in records if r["kind"] == "skipped"}
    parts += [f"Not run: {name} ({reason})." for name, reason in skipped.items()]
    return "\n".join(parts)


def _throughput_row(r: Record) -> list[str]:
    low, median, high = r["images_per_s"]
    shares = ["", ""]
    if r["of_floor"] is not None:
        shares = [f"{r['of_floor'][1]:.3f}", f"{r['of_floor'][0]:.3f} to {r['of_floor'][2]:.3f}"]
    speed = [f"{median:,.0f}", f"{low:,.0f} to {high:,.0f}"]
    return [
        r["provider"],
        *speed,
        *shares,
        "" if r["peak_mb"] is None else f"{r['peak_mb']:,.0f}",
        f"{r['ready_s']:.1f}",
    ]


def _breakdown(r: Record) -> str:
    total = sum(r["breakdown"].values())
    shares = ", ".join(f"{name} {1e6 * s:,.0f} µs ({s / total:.0%})" for name, s in r["breakdown"].items())
    return f"A step of {r['provider']}, {1e6 * total:,.0f} µs: {shares}."


def _target_row(r: Record) -> list[str]:
    setting = f"{r['model']}, batch {r['batch_size']}, {_condition(r['condition'])}"
    return [
        r["provider"],
        setting,
        f"{r['target']:.1f}",
        "yes" if r["reached"] else "no",
        f"{r['seconds']:.1f}",
        str(r["epochs"]),
        f"{r['negative_elbo']:.2f}",
    ]


def kernel_tables(records: Sequence[Record]) -> str:
    """The records of `bench.kernels`: a table per op, a line per shape and mode, a column of microseconds per provider.

    `rival / ours` is the fastest rival's time by ours; below 1 we lose. GB/s and share of the copy bandwidth are ours.
    """
    parts = []
    times = [r for r in records if r["kind"] == "time"]
    for op in dict.fromkeys(r["op"] for r in times):
        own = [r for r in times if r["op"] == op]
        names = list(dict.fromkeys(r["provider"] for r in own))
        counted = any(r["launches"] is not None for r in own)
        head = ["shape, data, mode", *names, "fastest rival", "rival / ours", "GB/s", "of copy"]
        head += ["MB extra", "launches"] if counted else []
        lines = [_kernel_row(line, names, counted) for line in kernel_lines(own)]
        parts.append(f"**{op}** (µs)\n\n{markdown(head, lines)}\n")
    refused = [r for r in records if r["kind"] == "refused"]
    parts += [f"No time for {r['provider']} at {r['op']} {r['shape']}: {r['reason']}." for r in refused]
    return "\n".join(parts)


def kernel_lines(times: Iterable[Record]) -> list[dict[str, Record]]:
    """Records of one op, shape, type and mode together, by provider."""
    lines: dict[tuple[str, ...], dict[str, Record]] = {}
    for r in times:
        lines.setdefault((r["op"], r["shape"], r["dtype"], r["data"], r["mode"]), {})[r["provider"]] = r
    return list(lines.values())


def fastest_rival(line: dict[str, Record]) -> Record | None:
    """The rival with the least time by ours within a round, where we have a time as well."""
    rivals = [r for name, r in line.items() if name != OURS and r["times_ours"] is not None]
    return min(rivals, key=lambda r: r["times_ours"][1]) if rivals else None


def what(r: Record) -> str:
    """Shape, types and mode of a record, in words."""
    kind = r["dtype"] + (f" + {r['data']}" if r["data"] else "")
    return f"{r['shape']}, {kind}, {r['mode']}"


def _kernel_row(line: dict[str, Record], names: Sequence[str], counted: bool) -> list[str]:
    times = [f"{1e6 * line[name]['seconds'][1]:,.1f}" if name in line else "" for name in names]
    rival, ours = fastest_rival(line), line.get(OURS)
    ratio = ["", ""] if rival is None else [rival["provider"], f"{rival['times_ours'][1]:.2f}"]
    speed = ["", ""]
    if ours is not None and ours["bytes_per_s"] is not None:
        speed = [f"{ours['bytes_per_s'] / 1e9:.1f}", f"{ours['of_copy']:.0%}"]
    counts = [] if not counted else ["", ""]
    if counted and ours is not None:
        counts = [f"{ours['peak_extra_bytes'] / 1e6:.1f}", str(ours["launches"])]
    return [what(next(iter(line.values()))), *times, *ratio, *speed, *counts]


def revision_table(records: Sequence[Record]) -> str:
    """The records of `bench.kernels --base`: above 1 this revision is faster."""
    head = ["op", "shape, data, mode", "base µs", "here µs", "base / here", "quartiles"]
    rows = []
    for r in records:
        if r["kind"] == "revision":
            base, here = (f"{1e6 * r[f'{name}_seconds'][1]:,.1f}" for name in ("base", "here"))
            low, median, high = r["speedup"]
            rows.append([r["op"], what(r), base, here, f"{median:.2f}", f"{low:.2f} to {high:.2f}"])
    return markdown(head, rows)
