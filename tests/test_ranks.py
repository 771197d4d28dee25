"""Many processes that train as one, and what happens to the others when one is lost."""

from __future__ import annotations

import dataclasses
import os
import random
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from fastvae import _mlp_loss
from fastvae.config import TrainConfig
from fastvae.distributed import ALONE, Ranks, Replica, _met, torchrun_job
from fastvae.errors import FastvaeError
from fastvae.run import Run
from fastvae.step import TrainingStep, make_optimizer
from fastvae.train import build_model, check_fits, load_dataset, pick_device
from tests.runs import ARGUMENTS, assert_same, children, final, kill, start, train_on, wait_for

pytestmark = pytest.mark.skipif(not dist.is_available(), reason="torch without torch.distributed")

TWO = "--standalone --nproc-per-node=2"


@pytest.mark.parametrize("settings", ["", "--free-bits 0.05 --clip-grad-norm 1"], ids=["fused loss", "free bits"])
def test_two_ranks_are_one_up_to_rounding(settings: str, tmp_path: Path) -> None:
    """Weights to 1e-6 and logged numbers to 2e-6 of their value, after 112 steps (measured: 1e-7 and 1e-7)."""
    arguments = [*ARGUMENTS, "--epochs", "8", *settings.split()]
    processes = [start("train", *arguments, "--out", str(tmp_path / "one"))]
    processes += [start("train", *arguments, "--out", str(tmp_path / "two"), torchrun=TWO, log=tmp_path / "log")]
    assert [process.wait() for process in processes] == [0, 0], (tmp_path / "log").read_text()
    one, two = final(tmp_path / "one"), final(tmp_path / "two")
    weights = [name for name in one if name.startswith("model.")]
    assert max(float((one[name] - two[name]).abs().max()) for name in weights) < 1e-6
    assert [row.keys() for row in one["rows"]] == [row.keys() for row in two["rows"]]
    for a, b in zip(one["rows"], two["rows"]):
        assert a.pop("split") == b.pop("split")
        assert a == pytest.approx(b, rel=2e-6)
    # what only one process may have written
    assert not (tmp_path / "two" / "job").exists()
    assert sorted(p.name for p in (tmp_path / "one").iterdir()) == sorted(p.name for p in (tmp_path / "two").iterdir())


def run_by_two(program: str, folder: Path, *arguments: str) -> tuple[int, str]:
    """`program`, a script that has `os` and `sys`, run by two ranks with the arguments `train digits ...`."""
    (folder / "program.py").write_text(f"import os, sys\n{program}")
    command = ["-m", "torch.distributed.run", *TWO.split(), str(folder / "program.py"), "train", "digits", *arguments]
    done = subprocess.run(
        [sys.executable, *command],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(p for p in sys.path if p), "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=300,
    )
    return done.returncode, done.stdout


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="threads cannot be counted here")
@pytest.mark.parametrize("end", ["nothing", "a signal", "an error"])
def test_threads_of_gloo_end_before_python_does(end: str, tmp_path: Path) -> None:
    """One that let go of a tensor while Python shut down aborted the process: 3 of 61 runs with all cores busy.

    After an error nobody waits for them: what the error's frames hold may not be the last to hold the group.
    """
    program = """
import atexit, signal
from fastvae import cli, distributed, errors, train

meet, destroy = distributed.Meetings.__call__, distributed.dist.destroy_process_group
make, before = train.TrainingStep.__init__, []

def after_three_steps(self, done, signum):
    if done > 2 and END == "an error":
        raise errors.FastvaeError("planted")
    return meet(self, done, signal.SIGTERM if done > 2 and END == "a signal" else signum)

def made(self, *args):
    make(self, *args)
    # what only the garbage collector frees
    self.itself = self if END != "an error" else None

def threads():
    return len(os.listdir("/proc/self/task"))

def counted():
    before.append(threads())
    destroy()

distributed.dist.destroy_process_group = counted
train.Meetings.__call__, train.TrainingStep.__init__ = after_three_steps, made
# in one write: the ranks share the output
atexit.register(lambda: os.write(1, f"\\nthreads end: {threads() < before[0]}\\n".encode()))
cli.main()
""".replace("END", repr(end))
    code, log = run_by_two(program, tmp_path, *ARGUMENTS[1:], "--max-steps", "5", "--out", str(tmp_path / "run"))
    assert (code == 0) == (end == "nothing"), log
    assert ("go on with: fastvae resume" in log) == (end == "a signal"), log
    assert ("planted" in log) == (end == "an error"), log
    said = [line for line in log.splitlines() if line.startswith("threads")]
    # torchrun may end the second rank before it gets there
    assert set(said) == {f"threads end: {end != 'an error'}"}, log


def test_the_fused_loss_is_taken_by_ranks_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """One rank under DistributedDataParallel: as many fused losses as steps, bit for bit the weights of none."""
    fused, taken = _mlp_loss._nll_kl_gradients, []
    monkeypatch.setattr(_mlp_loss, "_nll_kl_gradients", lambda *args: taken.append(1) or fused(*args))
    config = TrainConfig(hidden=(16,), latent_dim=3, batch_size=32)
    data = torch.randint(0, 256, (320, 64), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))

    def trained(distributed: bool) -> tuple[list[torch.Tensor], torch.Tensor]:
        torch.manual_seed(0)
        model = build_model(config, (8, 8))
        step = TrainingStep(config, model, make_optimizer(config, list(model.parameters()), len(data)), data, 50)
        if distributed:
            step.replica = Replica(model, ALONE)
            step.forward = step.replica.distributed(torch.zeros(32, 64), **step.objective())
        taken.clear()
        for number in range(20):
            step.prepare(number)
            step()
        assert len(taken) == 20
        return list(model.state_dict().values()), step.metrics

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        (weights, metrics), (same_weights, averaged) = trained(False), trained(True)
        assert all(torch.equal(a, b) for a, b in zip(weights, same_weights))
        torch.testing.assert_close(metrics, averaged)
    finally:
        dist.destroy_process_group()


def test_what_does_not_fit_the_ranks_is_said() -> None:
    digits = load_dataset("digits")
    with pytest.raises(FastvaeError, match="--batch-size is 100, expected a multiple of the 3 ranks"):
        check_fits(TrainConfig(batch_size=100), digits, Ranks(0, 3))
    if torch.cuda.is_available():
        with pytest.raises(FastvaeError, match="expected auto, cpu or cuda: the ranks share the devices out"):
            pick_device("cuda:0", Ranks(0, 2))


def test_parts_are_all_and_differ_by_one_at_most() -> None:
    for count in (1, 7, 100):
        parts = [Ranks(rank, 3).part(count) for rank in range(3)]
        assert [start for start, _ in parts] == [0, *(end for _, end in parts[:-1])]
        assert parts[-1][1] == count
        assert max(b - a for a, b in parts) - min(b - a for a, b in parts) <= 1


def test_a_job_finds_the_run_that_it_has_begun(tmp_path: Path) -> None:
    config = TrainConfig(out=tmp_path / "run")
    run = Run.create(config, "job 1")
    assert Run.create(config, "job 1").path == run.path
    other_settings = dataclasses.replace(config, lr=0.5)
    for settings, job in ((config, "job 2"), (config, None), (other_settings, "job 1")):
        with pytest.raises(FastvaeError, match="exists already"):
            Run.create(settings, job)
    run.finish()
    with pytest.raises(FastvaeError, match="exists already"):
        Run.create(config, "job 1")


def test_a_job_finds_its_numbered_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    runs = [Run.create(TrainConfig(), job) for job in ("a", "b", "a", None)]
    assert [run.path.name for run in runs] == ["digits", "digits-2", "digits", "digits-3"]


def test_what_a_job_is_called(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    assert torchrun_job() is None
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "name")
    assert torchrun_job() == "name"
    # the static rendezvous has one name for all jobs
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    assert torchrun_job() not in (None, "none")
    assert torchrun_job() == torchrun_job()


def test_ranks_that_start_again_do_not_meet_those_of_before() -> None:
    """Neither a rank that comes first nor one that comes last takes the words of an earlier start for the others'."""
    store = dist.HashStore()
    for first in (None, 0, 2, 1):
        with ThreadPoolExecutor() as threads:
            early = [threads.submit(_met, store, rank, 3) for rank in range(3) if rank == first]
            time.sleep(0.1)
            assert not any(met.done() for met in early)
            late = [threads.submit(_met, store, rank, 3) for rank in range(3) if rank != first]
            stores = [met.result(timeout=60) for met in early + late]
        # they share what those of before have never had
        assert [mine.add("count", 1) for mine in stores] == [1, 2, 3]


def test_one_rank_needs_no_one() -> None:
    assert ALONE.together(lambda: 3) == ALONE.from_main(lambda: 3) == 3
    assert ALONE.mean(torch.ones(2)).tolist() == [1.0, 1.0]


# whole jobs

TIMES = 6
UNDISTURBED = [*ARGUMENTS, "--checkpoint-every", "3", "--epochs", "60"]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two ranks that nobody disturbed."""
    out = tmp_path_factory.mktemp("ranks") / "whole"
    assert start("train", *UNDISTURBED, "--out", str(out), torchrun=TWO).wait() == 0
    return out


@pytest.mark.slow
def test_a_rank_that_is_killed_restarts_all(whole: Path, tmp_path: Path) -> None:
    """Rank 0 and rank 1 in turn, after random numbers of steps; torchrun starts all again, and they find their run."""
    random.seed(1)
    out, log = tmp_path / "run", tmp_path / "log"
    process = start("train", *UNDISTURBED, "--out", str(out), torchrun=f"{TWO} --max-restarts={TIMES}", log=log)
    for number in range(TIMES):
        train_on(out, process, random.randint(20, 60))
        os.kill(children(process)[number % 2], signal.SIGKILL)
        wait_for(lambda: log.read_text().count("resumed at step") == number + 1)  # noqa: B023 (called here)
    assert process.wait() == 0, log.read_text()
    assert_same(final(whole), final(out))


@pytest.mark.slow
def test_a_killed_job_is_resumed(whole: Path, tmp_path: Path) -> None:
    random.seed(2)
    out, log = tmp_path / "run", tmp_path / "log"
    process = start("train", *UNDISTURBED, "--out", str(out), torchrun=TWO, log=log)
    for _ in range(TIMES):
        train_on(out, process, random.randint(20, 60))
        kill(process)
        process = start("resume", str(out), torchrun=TWO, log=log)
    assert process.wait() == 0, log.read_text()
    assert_same(final(whole), final(out))


@pytest.mark.slow
@pytest.mark.parametrize("everyone", [True, False], ids=["torchrun", "rank 1 alone"])
def test_a_signal_stops_all_ranks_after_the_same_step(everyone: bool, tmp_path: Path) -> None:
    """SIGTERM to torchrun, which hands it on, and to one rank alone, which tells the others."""
    arguments = [*ARGUMENTS, "--epochs", "100000", "--checkpoint-every", "100000", "--eval-every", "50"]
    out, log = tmp_path / "run", tmp_path / "log"
    process = start("train", *arguments, "--out", str(out), torchrun=TWO, log=log)
    wait_for(lambda: (out / "metrics.jsonl").exists() and len((out / "metrics.jsonl").read_text()) > 1000)
    os.kill(process.pid if everyone else children(process)[1], signal.SIGTERM)
    assert process.wait() != 0
    assert "saved; go on with: fastvae resume" in log.read_text(), log.read_text()
    step = int(final(out)["step"])
    assert start("resume", str(out), "--max-steps", str(step + 5), torchrun=TWO).wait() == 0
    alone = tmp_path / "alone"
    more = ["--max-steps", str(step + 5), "--out", str(alone)]
    assert start("train", *arguments, *more, torchrun=TWO).wait() == 0
    a, b = final(out), final(alone)
    assert all(torch.equal(a[name], b[name]) for name in a if name.startswith(("model.", "optimizer.")))


@pytest.mark.slow
def test_an_error_of_one_rank_ends_all_of_them(tmp_path: Path) -> None:
    """Only rank 1 cannot have the data: all leave at once, with one line."""
    program = (
        "if os.environ['RANK'] == '1': os.environ['HOME'] = '/nowhere'; sys.argv[2] = 'nosuch.npy'\n"
        "from fastvae.cli import main; main()\n"
    )
    code, log = run_by_two(program, tmp_path, "--out", str(tmp_path / "run"))
    assert code != 0
    said = [line for line in log.splitlines() if line.startswith("fastvae: error")]
    assert said == ["fastvae: error: data is digits on rank 0 and nosuch.npy on rank 1"]
    assert not (tmp_path / "run").exists()


@pytest.mark.cuda
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_two_gpus_are_one_up_to_rounding(tmp_path: Path) -> None:
    for name, torchrun in (("one", "--standalone --nproc-per-node=1"), ("two", TWO)):
        arguments = [*ARGUMENTS, "--epochs", "8", "--device", "cuda", "--no-cuda-graph", "--out", str(tmp_path / name)]
        assert start("train", *arguments, torchrun=torchrun).wait() == 0
    one, two = final(tmp_path / "one"), final(tmp_path / "two")
    for name in (name for name in one if name.startswith("model.")):
        torch.testing.assert_close(one[name], two[name], rtol=0, atol=1e-5)
