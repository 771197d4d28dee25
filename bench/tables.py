"""Result records as Markdown tables, which also read well in a terminal."""

from __future__ import annotations

from collections.abc import Sequence

from bench.records import Record

__all__ = ["markdown", "throughput_tables"]


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
    return {
        "one": "one thread",
        "two": "two threads",
        "two+busy": "two threads, one core kept busy by another process",
    }[name]


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
    return [r["provider"], *speed, *shares, f"{r['peak_mb']:,.0f}", f"{r['ready_s']:.1f}"]


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
