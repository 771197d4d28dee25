"""The benchmarks work and cannot be fooled: the gate, the result files, the reports. No figure is asserted."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from bench import gate, records, report, timing
from bench import kernels as bench_kernels
from bench import train as bench_train
from bench.ops import OPS, Case, functions
from bench.rivals import OURS, Work
from bench.rivals.fastvae import timed
from bench.worker import Worker, WorkerError

SMALL = [
    Case("reparameterize", "33x20"),
    Case("kl_standard_normal", "33x20"),
    Case("kl_normal", "33x20"),
    Case("reparameterize_kl", "33x20"),
    Case("reparameterize_log_ratio", "5x33x20"),
    Case("bernoulli_nll", "3x16x40", data="float32"),
    Case("bernoulli_nll_loss", "16x40", data="uint8"),
    Case("gaussian_nll", "3x16x40", data="uint8"),
    Case("gaussian_nll_loss", "16x40", data="float32"),
    Case("linear", "16x8x40"),
    Case("linear_bernoulli_nll_loss", "16x8x40", data="uint8"),
    Case("linear_bernoulli_nll", "3x16x8x40", data="uint8"),
    Case("linear_gaussian_nll", "3x16x8x40", data="float32"),
    Case("linear_gaussian_nll_loss", "16x8x40", data="uint8"),
    Case("gather_batch", "16x40", data="uint8"),
    Case("gather_batch_binarize", "16x40", data="uint8"),
]


# the gate


@pytest.mark.parametrize("case", SMALL, ids=lambda case: case.name)
def test_everybody_is_right(case: Case) -> None:
    complaints = {name: gate.wrong(case, f, case.inputs("cpu")) for name, f in functions(case).items()}
    assert set(complaints.values()) == {None}, complaints


def test_every_op_is_tried() -> None:
    assert {case.op for case in SMALL} == OPS.keys()


class _Scaled(torch.autograd.Function):
    """The identity with a gradient that is 0.1 % too large."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
        return grad * 1.001


def _value_off(f: Callable[..., Any]) -> Callable[..., Any]:
    return lambda *args: tuple(r * 1.001 for r in f(*args))


def _gradient_off(f: Callable[..., Any]) -> Callable[..., Any]:
    return lambda *args: tuple(_Scaled.apply(r) for r in f(*args))


def _one_nan(f: Callable[..., Any]) -> Callable[..., Any]:
    def poisoned(*args: torch.Tensor) -> tuple[torch.Tensor, ...]:
        results = [r.clone() for r in f(*args)]
        results[-1].view(-1)[-1] = torch.nan
        return tuple(results)

    return poisoned


@pytest.mark.parametrize(
    ("error", "complaint"),
    [(_value_off, "result 0"), (_gradient_off, "gradient 0"), (_one_nan, "result 0")],
)
def test_gate_refuses_a_planted_error(error: Callable[..., Any], complaint: str) -> None:
    case = Case("bernoulli_nll", "16x40", data="float32")
    said = gate.wrong(case, error(functions(case)[OURS]), case.inputs("cpu"))
    assert said is not None
    assert said.startswith(complaint)


def test_gate_refuses_wrong_noise() -> None:
    case = Case("reparameterize_kl", "512x20")

    def wide(mu: torch.Tensor, logvar: torch.Tensor) -> tuple[torch.Tensor, ...]:
        z, kl = functions(case)[OURS](mu, logvar)
        return mu + 1.1 * (z - mu), kl

    said = gate.wrong(case, wide, case.inputs("cpu"))
    assert said is not None
    assert "variance" in said


def test_nobody_wrong_gets_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case("kl_standard_normal", "33x20")
    real = functions(case)
    planted = real | {"eager": _gradient_off(real["eager"]), "reference": lambda *_: 1 / 0}
    monkeypatch.setattr(bench_kernels, "functions", lambda case: planted)
    arguments = bench_kernels.Arguments(providers=(OURS, "eager", "reference", "distributions"), quick=True)
    found = list(bench_kernels.measure(case, arguments, "cpu", 1e9))
    assert {r["provider"] for r in found if r["kind"] == "refused"} == {"eager", "reference"}
    assert {r["provider"] for r in found if r["kind"] == "time"} == {OURS, "distributions"}


# clocks


def test_rounds_are_paired() -> None:
    times = timing.interleaved({"a": lambda: None, "b": lambda: None}, 0.0, fewest=3)
    assert {name: len(rounds) for name, rounds in times.items()} == {"a": 3, "b": 3}
    assert all(t > 0 for rounds in times.values() for t in rounds)


def test_stages_do_not_count_each_other() -> None:
    class Step:
        def inner(self) -> None:
            torch.randn(200_000).exp()

        def outer(self) -> None:
            self.inner()

    step = Step()
    with timed([(step, "outer", "outer"), (step, "inner", "inner")]) as seconds:
        step.outer()
    assert seconds["outer"] < seconds["inner"]


# whole commands


def test_kernels_command_and_report(tmp_path: Path) -> None:
    path = tmp_path / "k.jsonl"
    arguments = bench_kernels.Arguments(
        op=("kl_normal", "bernoulli_nll", "gather_batch"), providers=(OURS, "eager", "functional"), quick=True
    )
    bench_kernels.run(arguments, path, "cpu")
    header, found = records.read(path)
    assert header["bench"] == "kernels"
    assert header["copy_bytes_per_s"] > 0
    assert header["machine"]["cpu"]
    assert "torch" in header["versions"]
    # three modes of two ops, forward alone of the gather; and nothing was refused
    assert len([r for r in found if r["provider"] == OURS]) == 7
    assert {r["kind"] for r in found} == {"time"}

    text = report.report(path, tmp_path).read_text()
    assert "| 128x784, float32 + uint8, both" in text
    for name in ("ratio", "bandwidth"):
        assert (tmp_path / f"k-{name}.png").read_bytes().startswith(b"\x89PNG")
        assert f"k-{name}.png" in text
    assert "ratios" in report.spread([path, path])


def test_train_command_and_report(tmp_path: Path) -> None:
    path = tmp_path / "t.jsonl"
    arguments = ["--quick", "--providers", "gemm_floor", OURS, "torch_example", "--out", str(path)]
    subprocess.run([sys.executable, "-m", "bench.train", *arguments], cwd=records.ROOT, check=True, capture_output=True)
    header, found = records.read(path)
    assert header["arguments"]["quick"] is True
    by_name = {r["provider"]: r for r in found}
    assert {r["kind"] for r in found} == {"throughput"}, found
    assert by_name["gemm_floor"]["of_floor"] == [1.0, 1.0, 1.0]
    assert all(r["images_per_s"][1] > 0 and r["peak_mb"] > 10 for r in found)
    assert by_name[OURS]["breakdown"].keys() == {"data", "forward", "loss", "backward", "optimiser", "rest"}

    text = report.report(path, tmp_path).read_text()
    assert "of the floor" in text
    assert (tmp_path / "t-throughput.png").read_bytes().startswith(b"\x89PNG")


def test_losses_are_listed() -> None:
    about = {"kind": "time", "op": "kl_normal", "shape": "8x4", "dtype": "float32", "data": "", "mode": "both"}
    ours = about | {"provider": OURS, "seconds": [2.0, 2.0, 2.0], "times_ours": [1.0, 1.0, 1.0]}
    rival = about | {"provider": "eager", "seconds": [1.0, 1.0, 1.0], "times_ours": [0.5, 0.5, 0.5]}
    assert len(report.lost([ours, rival])) == 1
    assert report.lost([ours, rival | {"seconds": [3.0, 3.0, 3.0], "times_ours": [1.5, 1.5, 1.5]}]) == []


def test_what_is_no_result_file_is_said_so(tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_text('{"kind": "time"}\n')
    with pytest.raises(ValueError, match="no result file"):
        records.read(tmp_path / "x.jsonl")


# processes


def test_a_rival_that_is_not_installed_is_skipped_by_name(tmp_path: Path) -> None:
    work = Work((8,), 2, 4, "none", 1, "cpu", str(tmp_path))
    worker = Worker(["-m", "bench.rivals", "no_such_rival", json.dumps(work.__dict__)], threads=1)
    ready = worker.wait_ready()
    worker.close()
    assert isinstance(ready, WorkerError)
    assert "no_such_rival" in str(ready)


def test_the_rivals_own_environment_says_why(tmp_path: Path) -> None:
    """Not ours, in which nobody expects them."""
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\necho 'no jax here either' >&2\nexit 1\n")
    python.chmod(0o755)
    arguments = bench_train.Arguments(providers=("no_such_rival",), rivals_python=python)
    started, skipped = bench_train._start(arguments, Work((8,), 2, 4, "none", 1, "cpu", str(tmp_path)))
    assert started == []
    assert [record["reason"] for record in skipped] == ["no jax here either"]


def test_a_worker_needs_nothing_of_fastvae() -> None:
    """The rivals have an environment of their own."""
    program = (
        "import sys, bench.records, bench.rivals; print([name for name in sys.modules if name.startswith('fastvae')])"
    )
    command = [sys.executable, "-c", program]
    found = subprocess.run(command, cwd=records.ROOT, check=True, capture_output=True, text=True).stdout
    assert found.strip() == "[]"


def test_generations_of_a_processor_are_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    said = "processor\t: 0\ncpu family\t: 26\nmodel\t\t: 2\nmodel name\t: AMD EPYC\n\n"
    monkeypatch.setattr(Path, "read_text", lambda self: said)
    assert records.cpu_name() == "AMD EPYC (family 26, model 2)"
    monkeypatch.setattr(Path, "read_text", lambda self: "processor\t: 0\nBogoMIPS\t: 50\n")
    assert records.cpu_name() == records.platform.machine()


class _Stub:
    """A worker that answers some times and then is gone."""

    def __init__(self, answers: int) -> None:
        self.answers = answers

    def call(self, **message: Any) -> dict[str, Any]:
        self.answers -= 1
        if self.answers < 0:
            raise WorkerError("gone")
        return {"steps": 1, "seconds": 1.0}

    def close(self) -> None:
        self.closed = True


def test_a_rival_that_dies_does_not_stop_the_others() -> None:
    dying, living = _Stub(1), _Stub(99)
    started = [bench_train.Started("dying", dying, {}), bench_train.Started("living", living, {})]
    lost: list[dict[str, Any]] = []
    rounds = bench_train._rounds(started, bench_train.Arguments(quick=True, seconds=0.0), lost)
    assert [sorted(r) for r in rounds] == [["dying", "living"], ["living"]]
    assert [p.name for p in started] == ["living"]
    assert dying.closed
    assert lost[0]["reason"] == "died: gone"


def test_target_needs_real_data() -> None:
    with pytest.raises(SystemExit, match="real data"):
        bench_train.check(bench_train.Arguments(target=100.0))
