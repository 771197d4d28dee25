"""bench.step: launches and bytes of the training step on CUDA never grow unseen."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

from bench import records
from bench.static.capture import HostOp, _HostOps, multi_tensor_launches

# launches, MB: of the whole step at 784-500-20, batch 4096
LIMITS = {"float32": (20, 270.5), "bf16": (20, 157.5)}


@pytest.fixture(scope="module")
def counted(tmp_path_factory: pytest.TempPathFactory) -> list[records.Record]:
    out = tmp_path_factory.mktemp("step") / "step.jsonl"
    # a process in which Triton compiles: this one may have it interpret
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    env["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
    result = subprocess.run(
        [sys.executable, "-m", "bench.step", "--out", str(out)],
        cwd=Path(__file__).parent.parent,
        env=env,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    assert "| whole step" in result.stdout
    return records.read(out)[1]


@pytest.mark.parametrize("precision", LIMITS)
def test_the_step_launches_and_moves_no_more_than_it_did(precision: str, counted: list[records.Record]) -> None:
    own = [r for r in counted if r["precision"] == precision]
    launches, megabytes = LIMITS[precision]
    assert sum(r["launches"] for r in own) <= launches, [r["name"] for r in own]
    assert sum(r["bytes"] for r in own) <= 1e6 * megabytes
    # all that could be taken for a stage's own work is
    assert {r["stage"] for r in own} >= {"data", "forward", "loss", "backward", "optimiser"}


def test_an_operator_reads_its_inputs_and_writes_its_outputs_once() -> None:
    a, b, out, table = torch.ones(10, 5), torch.ones(5, 4), torch.ones(10, 4), torch.ones(100, 7)
    index = torch.arange(3)
    cases: list[tuple[Callable[[], object], int]] = [
        (lambda: torch.mm(a, b), 4 * (50 + 20 + 40)),
        (lambda: torch.mm(a, b, out=out), 4 * (50 + 20 + 40)),
        (lambda: torch.addmm(torch.ones(()).expand(4), a, b), 4 + 4 * (1 + 50 + 20 + 40)),
        (lambda: out.copy_(a[:, :4]), 4 * (40 + 40)),
        (lambda: out.add_(1), 4 * (40 + 40)),
        (lambda: out.zero_(), 4 * 40),
        (lambda: out.new_full((), 1.0), 4),
        (lambda: torch.ones_like(out), 4 * 40),
        (lambda: table.index_select(0, index), 8 * 3 + 4 * (21 + 21)),
        (lambda: a.t().expand(2, 5, 10), 0),
    ]
    for work, expected in cases:
        record: list[HostOp] = []
        with _HostOps(record):
            work()
        assert sum(op.bytes for op in record) == expected


@pytest.mark.parametrize(
    ("sizes", "lists", "launches"),
    [
        ([10, 0, 10], 4, 1),
        ([], 1, 0),
        ([1] * 36, 4, 1),
        ([1] * 37, 4, 2),
        # 320 blocks of 65,536 elements
        ([320 * 65536], 4, 1),
        ([320 * 65536 + 1], 4, 2),
        ([160 * 65536, 160 * 65536, 1], 2, 2),
        ([784 * 500, 500, 40 * 500, 40, 20 * 500, 500, 784 * 500, 784], 4, 1),
    ],
)
def test_operators_on_lists_launch_as_often_as_torch_does(sizes: list[int], lists: int, launches: int) -> None:
    assert multi_tensor_launches(sizes, lists) == launches
