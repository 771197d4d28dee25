"""Clocks: on the CPU providers take turns, and a figure is a median over rounds; on CUDA `triton.testing.do_bench`."""

from __future__ import annotations

import gc
import itertools
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

__all__ = ["copy_bandwidth", "cuda_times", "interleaved", "quartiles", "rotation"]

Call = Callable[[], object]

SLICE_S = 0.01
FEWEST_ROUNDS = 5


def quartiles(values: Sequence[float]) -> list[float]:
    """Lower quartile, median, upper quartile."""
    return statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else [values[0]] * 3


@contextmanager
def _no_garbage_collection() -> Iterator[None]:
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def _seconds(call: Call, times: int) -> float:
    start = time.perf_counter()
    for _ in range(times):
        call()
    return (time.perf_counter() - start) / times


def interleaved(calls: dict[str, Call], budget: float, fewest: int = FEWEST_ROUNDS) -> dict[str, list[float]]:
    """Seconds of one call of each provider, per round, for about `budget` seconds in all.

    In a round each provider is called for a slice of time, in an order that rotates. Before a slice of several calls
    comes one that is not counted: data and code are in the cache again, as in a loop that calls nothing else. What
    takes longer than a slice finds its cache cold in any loop.
    """
    names = list(calls)
    times: dict[str, int] = {}
    for name in names:
        calls[name]()
        times[name] = max(1, round(SLICE_S / _seconds(calls[name], 1)))
    rounds: dict[str, list[float]] = {name: [] for name in names}
    start = time.perf_counter()
    with _no_garbage_collection():
        for number in itertools.count():
            if number >= fewest and time.perf_counter() - start > budget:
                return rounds
            first = number % len(names)
            for name in names[first:] + names[:first]:
                if times[name] > 1:
                    calls[name]()
                rounds[name].append(_seconds(calls[name], times[name]))
    raise AssertionError("the loop ends by returning")


def cuda_times(call: Call, budget: float) -> list[float]:
    """Seconds of each of many calls on the GPU, with the cache emptied between them."""
    from triton.testing import do_bench

    milliseconds: list[float] = do_bench(call, warmup=25, rep=round(1e3 * budget), return_mode="all")
    return [1e-3 * ms for ms in milliseconds]


def rotation(inputs: Callable[[], list[Tensor]], size: int, device: str) -> list[list[Tensor]]:
    """Sets of inputs of `size` bytes each: on CUDA together larger than twice the cache, else one."""
    if device != "cuda":
        return [inputs()]
    cache = torch.cuda.get_device_properties(0).L2_cache_size
    return [inputs() for _ in range(min(32, 1 + 2 * cache // max(1, size)))]


def copy_bandwidth(device: str, *, quick: bool = False) -> float:
    """Bytes per second, read and written, of a large copy: the median of several."""
    source = torch.ones((8 if quick else 256) * 2**20, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    if device == "cuda":
        times = cuda_times(lambda: target.copy_(source), 0.2)
    else:
        times = interleaved({"copy": lambda: target.copy_(source)}, 0.1 if quick else 1.0)["copy"]
    return 2 * source.numel() / statistics.median(times)
