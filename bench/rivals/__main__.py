"""One provider of `bench.train`, warm, taking its turns: `python -m bench.rivals NAME WORK`, WORK as JSON.

Says a line when ready, then answers each line of stdin:

    {"do": "run", "seconds": 0.5}    -> {"steps": 40, "seconds": 0.51}    at least one step
    {"do": "restart"}                -> {}    untrained again, but warm
    {"do": "epoch"}                  -> {"steps": 468, "seconds": 5.2, "negative_elbo": 105.6}    tests not timed
    {"do": "finish"}                 -> {"peak_mb": 512.3, "breakdown": {...} | null}
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bench.records import versions
from bench.rivals import OURS, Work


def _reset_peak_memory() -> None:
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def _peak_memory_mb() -> float:
    """Peak resident memory since `_reset_peak_memory`, or of the process's life where that cannot be told, in MB."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(float(line.split()[1]) for line in lines if line.startswith("VmHWM")) * 1024 / 1e6
    except OSError:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6


class Turns:
    """Runs a provider in slices of a given time."""

    def __init__(self, name: str, work: Work) -> None:
        if work.threads == 1 and work.device == "cpu" and hasattr(os, "sched_setaffinity"):
            # whatever a library's own idea of its threads, one core is what it gets
            os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
        if name == OURS:
            from fastvae.process import prepare_process

            # as the program does, before torch is there
            prepare_process()
        module = importlib.import_module(f"bench.rivals.{name}")
        self.versions = versions(module.REQUIRES)
        self.make_provider = lambda: module.Provider(work)
        self.steps_per_epoch = len(work.load("train")) // work.batch_size
        self.restart()
        _reset_peak_memory()

    def restart(self) -> dict[str, Any]:
        self.provider: Any = self.make_provider()
        # compilation, allocation, the first shapes
        self.provider.run(3)
        _, self.step_s = self._timed(2)
        return {}

    def _timed(self, steps: int) -> tuple[float, float]:
        start = time.perf_counter()
        self.provider.run(steps)
        seconds = time.perf_counter() - start
        return seconds, seconds / steps

    def run(self, seconds: float) -> dict[str, Any]:
        steps = max(1, round(seconds / self.step_s))
        if steps >= 20:
            # the caches are still full of whoever ran before
            self.provider.run(steps // 20)
        taken, self.step_s = self._timed(steps)
        return {"steps": steps, "seconds": taken}

    def epoch(self) -> dict[str, Any]:
        taken, _ = self._timed(self.steps_per_epoch)
        negative_elbo = self.provider.test_negative_elbo()
        return {"steps": self.steps_per_epoch, "seconds": taken, "negative_elbo": negative_elbo}

    def finish(self) -> dict[str, Any]:
        peak_mb = _peak_memory_mb()
        breakdown = self.provider.breakdown() if hasattr(self.provider, "breakdown") else None
        return {"peak_mb": peak_mb, "breakdown": breakdown}


def main() -> None:
    # libraries print: the conversation keeps the real stdout to itself
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def answer(message: dict[str, Any]) -> None:
        answers.write(json.dumps(message) + "\n")
        answers.flush()

    start = time.perf_counter()
    try:
        turns = Turns(sys.argv[1], Work.from_dict(json.loads(sys.argv[2])))
    except ImportError as error:
        answer({"error": str(error)})
        return
    answer({"ready_s": time.perf_counter() - start, "versions": turns.versions})
    commands: dict[str, Callable[..., dict[str, Any]]] = {
        "run": turns.run,
        "restart": turns.restart,
        "epoch": turns.epoch,
        "finish": turns.finish,
    }
    for line in sys.stdin:
        message = json.loads(line)
        answer(commands[message.pop("do")](**message))


main()
