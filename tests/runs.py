"""What tests of whole training runs share: what a run decides, and how it is started as a process of its own."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from fastvae.checkpoint import load_checkpoint

ARGUMENTS = ["digits", "--hidden", "16", "--latent-dim", "3", "--batch-size", "100", "--epochs", "12"]
ARGUMENTS += ["--log-every", "5", "--eval-every", "4"]


def final(run: Path) -> dict[str, Any]:
    """Everything that a run decides: weights, optimiser state, logged numbers (but not the clock)."""
    tensors, _ = load_checkpoint(run / "checkpoints" / "last.safetensors")
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return tensors | {"rows": [{k: v for k, v in row.items() if k != "images_per_s"} for row in rows]}


def assert_same(a: dict[str, Any], b: dict[str, Any]) -> None:
    assert a["rows"] == b["rows"]
    assert a.keys() == b.keys()
    for name in a.keys() - {"rows", "metrics"}:
        assert torch.equal(a[name], b[name]), name


def start(
    *command: str, torchrun: str | None = None, log: Path | None = None, prefix: Sequence[str] = (), **env: str
) -> subprocess.Popen[bytes]:
    """`python -m fastvae COMMAND`, in a session of its own; under `torchrun` with the options that are given."""
    launcher = ["-m", "torch.distributed.run", *torchrun.split(), "-m"] if torchrun is not None else ["-m"]
    env = os.environ | {"PYTHONPATH": os.pathsep.join(p for p in sys.path if p), "OMP_NUM_THREADS": "1"} | env
    output: Any = subprocess.DEVNULL if log is None else log.open("ab")
    try:
        return subprocess.Popen(
            [*prefix, sys.executable, *launcher, "fastvae", *command],
            env=env,
            stdout=output,
            stderr=output,
            start_new_session=True,
        )
    finally:
        if log is not None:
            output.close()


def children(process: subprocess.Popen[bytes]) -> list[int]:
    """Process numbers of the workers that a `torchrun` has started."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        # state and parent; a zombie is no worker any more
        if int(fields[1]) == process.pid and fields[0] != "Z":
            found.append(int(stat.parent.name))
    return sorted(found)


def kill(process: subprocess.Popen[bytes]) -> None:
    """Kill -9 a `torchrun` and its workers, or one process."""
    for pid in [process.pid, *children(process)]:
        os.kill(pid, signal.SIGKILL)
    process.wait()


def wait_for(condition: Callable[[], Any], *, seconds: float = 1200.0) -> Any:
    """The first true value of `condition`; only a test that fails waits so long, however busy the machine."""
    end = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.005)
    return value


def logged(run: Path) -> int:
    """The last step in a run's metrics."""
    path = run / "metrics.jsonl"
    lines = path.read_text().split("\n")[:-1] if path.exists() else []
    return int(json.loads(lines[-1])["step"]) if lines else 0


def train_on(run: Path, process: subprocess.Popen[bytes], steps: int) -> None:
    """Returns when a run has logged that many steps more, while its process is still at work."""
    until = logged(run) + steps
    wait_for(lambda: logged(run) >= until or process.poll() is not None)
    assert process.poll() is None, "it ended before it could be disturbed"
