"""The ops against their rivals, forward, backward and both: `python -m bench.kernels`.

Whoever computes something wrong (`bench.gate`) gets no time. On the CPU the providers take turns, so that ratios hold
on a machine that is not quiet; on CUDA every call finds the cache empty. bench/README.md says how to read the table.
"""

from __future__ import annotations

import itertools
import math
import os
import statistics
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import tyro
from torch import Tensor

from bench import records, timing
from bench.formulas import Function
from bench.gate import upstream, wrong
from bench.ops import OPS, Case, cases, functions
from bench.records import Record
from bench.rivals import OURS
from bench.tables import kernel_tables
from fastvae.functional import choose_backend
from fastvae.process import keep_freed_memory

Mode = Literal["forward", "backward", "both"]

COMPILED, GRAPHED = "compile", "compile+graphs"


@dataclass(frozen=True)
class Arguments:
    """Time every op against its rivals; nobody who is wrong gets a time."""

    op: tuple[str, ...] = ()
    """Only these ops (default: all)."""
    shape: tuple[str, ...] = ()
    """Only these shapes, such as 4096x784 (default: all)."""
    modes: tuple[Mode, ...] = ("forward", "backward", "both")
    """What to time, where the op has it."""
    providers: tuple[str, ...] = (OURS, "reference", "eager", "distributions", "functional", COMPILED, GRAPHED)
    """Who runs."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where."""
    threads: int = 1
    """CPU threads of torch and of the kernels; with 1 the process stays on one core."""
    seconds: float = 0.6
    """Time for one op, shape and mode, all providers together, once they are warm."""
    base: str | None = None
    """Compare with this git revision of the library instead of with rivals."""
    quick: bool = False
    """The smallest shape of each op, a moment each, to see that it works: figures mean nothing."""
    out: Path | None = None
    """Result file (default: a new one in bench/results)."""


def chosen_cases(arguments: Arguments, device: str) -> list[Case]:
    """The cases that the arguments ask for."""
    unknown = set(arguments.op) - OPS.keys()
    if unknown:
        raise SystemExit(f"unknown ops {', '.join(sorted(unknown))}: expected some of {', '.join(OPS)}")
    found = [
        case
        for case in cases(device)
        if (not arguments.op or case.op in arguments.op) and (not arguments.shape or case.shape in arguments.shape)
    ]
    if arguments.quick:
        smallest = {case.op: case for case in sorted(found, key=lambda case: -math.prod(case.dims))}
        found = [case for case in found if case is smallest[case.op]]
    if not found:
        raise SystemExit("no case of these ops has one of these shapes")
    return found


def calls(
    function: Function, sets: Sequence[Sequence[Tensor]], modes: Sequence[str]
) -> dict[str, Callable[[], object]]:
    """One call in each mode, over sets of inputs that rotate.

    The forward runs with gradients wanted, as in training. The backward alone repeats that of graphs made before.
    """
    leaves = [[t for t in inputs if t.requires_grad] for inputs in sets]
    both_at, forward_at = itertools.cycle(zip(sets, leaves)), itertools.cycle(sets)
    gradients = upstream(function(*sets[0]))

    def forward() -> object:
        return function(*next(forward_at))

    def both() -> object:
        inputs, wanted = next(both_at)
        return torch.autograd.grad(function(*inputs), wanted, gradients)

    found: dict[str, Callable[[], object]] = {"forward": forward, "both": both}
    if "backward" in modes:
        graphs = itertools.cycle([(function(*inputs), wanted) for inputs, wanted in zip(sets, leaves)])

        def backward() -> object:
            results, wanted = next(graphs)
            return torch.autograd.grad(results, wanted, gradients, retain_graph=True)

        found["backward"] = backward
    return {mode: found[mode] for mode in modes}


def providers(case: Case, arguments: Arguments, device: str) -> dict[str, Function]:
    """Everyone who can run this case; torch.compile is given the plain formula."""
    found = functions(case)
    if COMPILED in arguments.providers:
        # what was compiled for the case before
        torch._dynamo.reset()
        # on the CPU Inductor's own normals take eight times as long as torch's
        options: dict[str, Any] = {"fallback_random": True} if device == "cpu" else {}
        found[COMPILED] = torch.compile(found["eager"], dynamic=False, options=options)
    if GRAPHED in arguments.providers and device == "cuda":
        found[GRAPHED] = _graphed(found["eager"])
    return {name: found[name] for name in arguments.providers if name in found}


def _graphed(function: Function) -> Function:
    compiled = torch.compile(function, dynamic=False, mode="reduce-overhead")

    def step(*inputs: Tensor) -> tuple[Tensor, ...]:
        torch.compiler.cudagraph_mark_step_begin()
        return compiled(*inputs)

    return step


def measure(case: Case, arguments: Arguments, device: str, bandwidth: float) -> Iterator[Record]:
    """A record for each mode and provider of a case, after the providers that are wrong."""
    about = {"op": case.op, "shape": case.shape, "dtype": case.dtype, "data": case.data}
    inputs = case.inputs(device)
    least = OPS[case.op].bytes(case, inputs)
    modes = [mode for mode in arguments.modes if mode in least]
    right: dict[str, Function] = {}
    for name, function in providers(case, arguments, device).items():
        complaint = _complaint(case, function, inputs)
        if complaint is None:
            right[name] = function
        else:
            yield {"kind": "refused", **about, "provider": name, "reason": complaint}

    size = sum(t.numel() * t.element_size() for t in inputs)
    sets = timing.rotation(lambda: case.inputs(device), size, device)
    # the graph of a step that was captured is gone when the next one runs
    own_modes = {name: [m for m in modes if not (name == GRAPHED and m == "backward")] for name in right}
    ready = {name: calls(function, sets, own_modes[name]) for name, function in right.items()}
    for mode in modes:
        racing = {name: by_mode[mode] for name, by_mode in ready.items() if mode in by_mode}
        if not racing:
            continue
        times = _times(racing, arguments, device)
        for name in racing:
            yield {
                "kind": "time",
                **about,
                "mode": mode,
                "provider": name,
                "threads": arguments.threads,
                "seconds": timing.quartiles(times[name]),
                "times_ours": _ratio(times, name) if OURS in times else None,
                "calls": len(times[name]),
                **_against_memory(least[mode], statistics.median(times[name]), bandwidth),
                **(_cuda_counts(racing[name]) if device == "cuda" else {"peak_extra_bytes": None, "launches": None}),
            }


def _complaint(case: Case, function: Function, inputs: Sequence[Tensor]) -> str | None:
    try:
        return wrong(case, function, inputs)
    except Exception as error:
        # a rival that cannot run this is no reason to lose the others
        return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"


def _times(racing: dict[str, Callable[[], object]], arguments: Arguments, device: str) -> dict[str, list[float]]:
    if device == "cuda":
        budget = arguments.seconds / len(racing)
        return {name: timing.cuda_times(call, budget) for name, call in racing.items()}
    fewest = 2 if arguments.quick else timing.FEWEST_ROUNDS
    return timing.interleaved(racing, 0.0 if arguments.quick else arguments.seconds, fewest)


def _ratio(times: dict[str, list[float]], name: str) -> list[float]:
    """How many times our time: within each round where there are rounds, of medians where there are none."""
    own, ours = times[name], times[OURS]
    if len(own) != len(ours):
        return [statistics.median(own) / statistics.median(ours)] * 3
    return timing.quartiles([t / u for t, u in zip(own, ours)])


def _against_memory(least: int | None, seconds: float, bandwidth: float) -> Record:
    speed = None if least is None else least / seconds
    share = None if speed is None else speed / bandwidth
    return {"least_bytes": least, "bytes_per_s": speed, "of_copy": share}


def _cuda_counts(call: Callable[[], object]) -> Record:
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        call()
        torch.cuda.synchronize()
    events = [e for e in profile.events() if e.device_type.name == "CUDA"]
    return {"peak_extra_bytes": torch.cuda.max_memory_allocated() - before, "launches": len(events)}


@contextmanager
def settled(threads: int) -> Iterator[None]:
    """The thread count, and one core when it is 1; graphs may be differentiated again. Restored afterwards."""
    from torch._functorch import config

    before, cores = torch.get_num_threads(), None
    torch.set_num_threads(threads)
    if threads == 1 and hasattr(os, "sched_setaffinity"):
        cores = os.sched_getaffinity(0)
        os.sched_setaffinity(0, {max(cores)})
    try:
        with config.patch(donated_buffer=False):
            yield
    finally:
        torch.set_num_threads(before)
        if cores is not None:
            os.sched_setaffinity(0, cores)


def run(arguments: Arguments, path: Path, device: str) -> None:
    """Measure all cases; print each and add it to the result file when it is done."""
    chosen = chosen_cases(arguments, device)
    with settled(arguments.threads):
        bandwidth = timing.copy_bandwidth(device, quick=arguments.quick)
        package, reason = choose_backend("bernoulli_nll", torch.zeros(1, 1, device=device))
        backend = f"the reference ({reason})" if package is None else package.__name__
        start = records.header("kernels", asdict(arguments), gpu=records.gpu_name(device))
        out = [start | {"copy_bytes_per_s": bandwidth, "backend": backend}]
        for case in chosen:
            found = [*measure(case, arguments, device, bandwidth)]
            print(kernel_tables(found), flush=True)
            out += found
            records.write(path, out)
    print(f"{OURS}: {backend}; copy bandwidth {bandwidth / 1e9:.1f} GB/s; wrote {path}")


def main() -> None:
    """Entry point of `python -m bench.kernels`."""
    arguments = tyro.cli(Arguments)
    # for everybody alike: page faults would hide what is measured
    keep_freed_memory()
    device = arguments.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    path = arguments.out or records.default_path("kernels" if arguments.base is None else "base", device)
    if arguments.base is None:
        run(arguments, path, device)
    else:
        from bench.revisions import compare

        compare(arguments, path, device)


if __name__ == "__main__":
    main()
