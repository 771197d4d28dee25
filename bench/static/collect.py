"""All chosen cases, measured by a pool of processes."""

from __future__ import annotations

import functools
import multiprocessing
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor

import torch

from bench.static.cases import Case, cases
from bench.static.measure import Result, measure

__all__ = ["collect", "is_main"]


@functools.cache
def _by_name() -> dict[str, Case]:
    return {case.name: case for case in cases()}


def is_main(result: Result) -> bool:
    """Whether the result belongs to the gate."""
    return _by_name()[result.case].main


def _measure(name: str, architectures: Sequence[str]) -> list[Result]:
    import fastvae_kernels

    # the processes share the cores, and nothing here is worth a second thread
    torch.set_num_threads(1)
    try:
        return measure(_by_name()[name], fastvae_kernels, architectures)
    except Exception as error:
        raise RuntimeError(f"{name}: {error}") from error


def collect(architectures: Sequence[str], op: str = "", *, all_shapes: bool = False, jobs: int = 1) -> list[Result]:
    """Results by architecture, of the cases whose name contains `op`.

    With `all_shapes` also those that are not part of the gate, for sm_90 alone. One job stays in this process.

    Raises:
        RuntimeError: a kernel that cannot be compiled or counted, with the name of the case.
    """
    chosen = [case for case in cases() if op in case.name]
    work = [(case.name, architectures) for case in chosen if case.main]
    if all_shapes and "sm_90" in architectures:
        work += [(case.name, ["sm_90"]) for case in chosen if not case.main]
    names, targets = [name for name, _ in work], [target for _, target in work]
    if jobs > 1:
        with ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn")) as pool:
            found = list(pool.map(_measure, names, targets))
    else:
        found = list(map(_measure, names, targets))
    flat = [result for results in found for result in results]
    return [result for name in architectures for result in flat if result.architecture == name]
