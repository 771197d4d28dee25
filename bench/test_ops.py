"""The same cases for pytest-benchmark: `pytest bench --benchmark-only`, then `pytest-benchmark compare`.

Only our own ops, for comparisons between commits; rivals are `bench.kernels`'s. On CUDA a call ends when the device is
done, so that short kernels show their launch.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from bench.gate import wrong
from bench.kernels import calls
from bench.ops import OPS, Case, cases, functions
from bench.rivals import OURS

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def _synchronised(call: Callable[[], object]) -> Callable[[], object]:
    def wait() -> None:
        call()
        torch.cuda.synchronize()

    return call if DEVICE == "cpu" else wait


@pytest.mark.parametrize("mode", ["forward", "backward", "both"])
@pytest.mark.parametrize("case", list(cases(DEVICE)), ids=lambda case: case.name)
def test_op(benchmark: BenchmarkFixture, case: Case, mode: str) -> None:
    inputs = case.inputs(DEVICE)
    if mode not in OPS[case.op].bytes(case, inputs):
        pytest.skip(f"{case.op} has no {mode} of its own")
    ours = functions(case)[OURS]
    assert wrong(case, ours, inputs) is None
    benchmark.group = f"{case.name}-{mode}"
    benchmark(_synchronised(calls(ours, [inputs], [mode])[mode]))
