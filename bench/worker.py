"""A provider in a process of its own, kept warm and told when it may run: the parent's side.

One line of JSON each way per command. Python, thread counts and core are the child's own; what it writes to stderr is
kept for the day it dies. The child's side of training is `bench.rivals.__main__`, of kernels `bench.revisions`.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

from bench.records import ROOT

__all__ = ["Worker", "WorkerError", "busy_core"]

THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMBA_NUM_THREADS")
# what `fastvae.process` does to our own programs, for everybody alike
MALLOC = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(2**40)}


class WorkerError(RuntimeError):
    """The process ended, or said that it cannot do this."""


class Worker:
    """Starts at once, so that several can warm up together."""

    def __init__(
        self, command: Sequence[str], *, threads: int, python: str = sys.executable, path: Sequence[str] = ()
    ) -> None:
        path = path or [str(ROOT), str(ROOT / "kernels/torch-ext"), str(ROOT / "kernels/cpu")]
        own = MALLOC | {"PYTHONPATH": os.pathsep.join(path)} | dict.fromkeys(THREAD_VARIABLES, str(threads))
        self._stderr = tempfile.TemporaryFile("w+")  # noqa: SIM115 (closed by `close`)
        self._process = subprocess.Popen(
            [python, *command],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._stderr,
            env=os.environ | own,
            # python -m looks here before it looks at the path
            cwd=path[0],
            text=True,
        )

    def wait_ready(self) -> dict[str, Any] | WorkerError:
        """What the child says about itself when it is warm, or why it cannot run."""
        try:
            return self._answer()
        except WorkerError as error:
            return error

    def call(self, **message: Any) -> dict[str, Any]:
        """Send one command and wait for its answer."""
        assert self._process.stdin is not None
        # a child that has ended says why when its answer is missed
        with suppress(BrokenPipeError):
            self._process.stdin.write(json.dumps(message) + "\n")
            self._process.stdin.flush()
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            self._process.wait()
            self._stderr.seek(0)
            said = self._stderr.read().strip().splitlines()
            raise WorkerError(said[-1] if said else f"exit code {self._process.returncode}")
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise WorkerError(answer["error"])
        return answer

    def close(self) -> None:
        """End the process."""
        self._process.kill()
        # waits, and closes both pipes
        self._process.communicate()
        self._stderr.close()


@contextmanager
def busy_core(core: int) -> Iterator[None]:
    """Another process keeps this core busy meanwhile."""
    pin = f"import os\nif hasattr(os, 'sched_setaffinity'): os.sched_setaffinity(0, {{{core}}})\n"
    process = subprocess.Popen([sys.executable, "-c", pin + "while True: pass"])
    try:
        yield
    finally:
        process.kill()
        process.wait()
