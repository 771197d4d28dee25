"""The kernels of two revisions against each other: `python -m bench.kernels --base REF`.

REF is checked out in a temporary worktree. One process imports the library from there and one from here, both use this
revision's benchmarks, and they take turns; a result is the ratio of their times within a round.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from bench import records, timing
from bench.ops import OPS, Case, functions
from bench.records import ROOT, Record
from bench.rivals import OURS
from bench.tables import revision_table
from bench.worker import Worker

if TYPE_CHECKING:
    from bench.kernels import Arguments

# seconds of one turn, and turns of each revision
SLICE_S, ROUNDS = 0.05, 15


def compare(arguments: Arguments, path: Path, device: str) -> None:
    """Measure all cases in both revisions; print the table and write the result file."""
    from bench.kernels import chosen_cases

    chosen = chosen_cases(arguments, device)
    assert arguments.base is not None
    out = [records.header("base", asdict(arguments), gpu=records.gpu_name(device))]
    with _library_paths(arguments.base) as paths:
        workers = {
            name: Worker(["-m", "bench.revisions", device], threads=arguments.threads, path=path)
            for name, path in paths.items()
        }
        try:
            for case in chosen:
                modes = [mode for mode in OPS[case.op].bytes(case, case.inputs("cpu")) if mode in arguments.modes]
                out += [_turns(workers, case, mode, arguments.quick) for mode in modes]
                print(revision_table(out[-len(modes) :]), flush=True)
                records.write(path, out)
        finally:
            for worker in workers.values():
                worker.close()
    print(f"wrote {path}")


@contextmanager
def _library_paths(base: str) -> Iterator[dict[str, list[str]]]:
    """Where each revision's process looks for modules: these benchmarks first, then its own library."""

    def git(*arguments: str) -> None:
        subprocess.run(["git", *arguments], cwd=ROOT, check=True, capture_output=True)

    with tempfile.TemporaryDirectory() as folder:
        only_bench, tree = Path(folder) / "bench_only", Path(folder) / "base"
        only_bench.mkdir()
        (only_bench / "bench").symlink_to(ROOT / "bench")
        try:
            git("worktree", "add", "--detach", str(tree), base)
        except subprocess.CalledProcessError as error:
            raise SystemExit(f"--base {base}: {error.stderr.decode().strip()}") from error
        try:
            roots = {"base": tree, "here": ROOT}
            library = (".", "kernels/torch-ext", "kernels/cpu")
            yield {name: [str(only_bench), *(str(root / part) for part in library)] for name, root in roots.items()}
        finally:
            git("worktree", "remove", "--force", str(tree))


def _turns(workers: dict[str, Worker], case: Case, mode: str, quick: bool) -> Record:
    for worker in workers.values():
        worker.call(do="open", case=asdict(case), mode=mode)
    seconds: dict[str, list[float]] = {name: [] for name in workers}
    for number in range(3 if quick else ROUNDS):
        # first one goes first, then the other
        for name in sorted(workers, reverse=number % 2 == 1):
            seconds[name].append(workers[name].call(do="run")["seconds"])
    ratios = [b / h for b, h in zip(seconds["base"], seconds["here"])]
    about = {"op": case.op, "shape": case.shape, "dtype": case.dtype, "data": case.data, "mode": mode}
    times = {f"{name}_seconds": timing.quartiles(values) for name, values in seconds.items()}
    return {"kind": "revision", **about, **times, "speedup": timing.quartiles(ratios)}


class _Bench:
    """The child: one case and mode at a time."""

    def __init__(self, device: str) -> None:
        self.device = device

    def open(self, case: dict[str, Any], mode: str) -> dict[str, Any]:
        from bench.kernels import calls

        chosen = Case(**case)
        sets = timing.rotation(lambda: chosen.inputs(self.device), 1, self.device)
        self.call = calls(functions(chosen)[OURS], sets, [mode])[mode]
        for _ in range(3):
            self.call()
        self.per_call = self._seconds(1)
        return {}

    def _seconds(self, times: int) -> float:
        start = time.perf_counter()
        for _ in range(times):
            self.call()
        if self.device == "cuda":
            torch.cuda.synchronize()
        return (time.perf_counter() - start) / times

    def run(self) -> dict[str, Any]:
        self.per_call = self._seconds(max(1, round(SLICE_S / self.per_call)))
        return {"seconds": self.per_call}


def _main() -> None:
    bench = _Bench(sys.argv[1])
    for line in sys.stdin:
        message = json.loads(line)
        commands: dict[str, Callable[..., dict[str, Any]]] = {"open": bench.open, "run": bench.run}
        print(json.dumps(commands[message.pop("do")](**message)), flush=True)


if __name__ == "__main__":
    _main()
