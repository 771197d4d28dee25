"""Result files: JSON lines, the first of which names the machine, the versions and the commit of the others.

    {"kind": "header", "bench": "train", "machine": {...}, "versions": {...}, "commit": "...", "arguments": {...}}
    {"kind": "...", ...}

A file is written whole and moved into place, so that one that exists is complete.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import subprocess
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

__all__ = ["Record", "cpu_name", "default_path", "gpu_name", "header", "read", "versions", "write"]

Record = dict[str, Any]

ROOT = Path(__file__).resolve().parent.parent
DISTRIBUTIONS = ("torch", "triton", "numba", "numpy")


def cpu_name() -> str:
    """The processor's model name, and with Linux on x86 its family and model, as generations share a name."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    fields = {name.strip(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
    name = fields.get("model name", platform.machine())
    return f"{name} (family {fields['cpu family']}, model {fields['model']})" if "cpu family" in fields else name


def versions(names: Iterable[str] = DISTRIBUTIONS) -> dict[str, str]:
    """Installed versions of these distributions; the ones that are not installed are left out."""
    # a name may be listed more than once, and with either of - and _
    installed = {d.metadata["Name"].lower().replace("_", "-"): d.version for d in importlib.metadata.distributions()}
    return {name: installed[name] for name in names if name in installed}


def _commit() -> str:
    """The commit that is checked out, marked when a tracked file of the library or the benchmarks differs from it."""

    def git(*arguments: str) -> str:
        return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()

    try:
        changed = git("status", "--porcelain", "--untracked-files=no", "--", "fastvae", "kernels", "bench/*.py")
        return git("rev-parse", "--short=12", "HEAD") + ("+changes" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def gpu_name(device: str) -> str | None:
    """The GPU's model name, if that is where we are."""
    if device != "cuda":
        return None
    import torch

    return torch.cuda.get_device_name()


def header(bench: str, arguments: dict[str, Any], *, gpu: str | None = None) -> Record:
    """The first line of a result file; of a path only the name, as the file is for others to read."""
    machine = {
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "gpu": gpu,
        "system": f"{platform.system()} {platform.machine()}",
    }
    return {
        "kind": "header",
        "bench": bench,
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "machine": machine,
        "versions": {"python": platform.python_version(), **versions()},
        "commit": _commit(),
        "arguments": {name: v.name if isinstance(v, Path) else v for name, v in arguments.items()},
    }


def default_path(bench: str, device: str) -> Path:
    """Where a run's results go unless told otherwise: a new file each time."""
    return ROOT / "bench" / "results" / f"{bench}-{device}-{time.strftime('%Y%m%d-%H%M%S')}.jsonl"


def write(path: Path, records: Iterable[Record]) -> None:
    """Write a result file atomically."""
    # not above: the rivals' own environments, which take this module's `versions`, have no fastvae
    from fastvae.checkpoint import write_atomic

    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, "".join(json.dumps(record) + "\n" for record in records))


def read(path: Path) -> tuple[Record, list[Record]]:
    """The header and the records of a result file.

    Raises:
        ValueError: the file is no result file.
    """
    try:
        records = [json.loads(line) for line in path.read_text().splitlines()]
        if records[0]["kind"] != "header":
            raise KeyError("header")
    except (ValueError, LookupError, TypeError) as error:
        raise ValueError(f"{path} is no result file of bench/: {error!r}") from error
    return records[0], records[1:]
