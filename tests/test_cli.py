"""The command line: what works, and what a mistake looks like (one line, exit code 2, nothing changed on the disk)."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from fastvae import cli

TRAIN = ["train", "digits", "--hidden", "16", "--latent-dim", "2", "--epochs", "2", "--log-every", "5"]


def fastvae(*arguments: str | Path) -> int:
    """The exit code of a command, run in this process."""
    before = sys.argv
    sys.argv = ["fastvae", *map(str, arguments)]
    try:
        cli.main()
        return 0
    except SystemExit as exit_:
        return int(exit_.code or 0)
    finally:
        sys.argv = before


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("cli") / "run"
    assert fastvae(*TRAIN, "--out", out) == 0
    return out


def test_a_run_directory_holds_everything(run: Path) -> None:
    names = {str(p.relative_to(run)) for p in run.rglob("*") if p.is_file()}
    assert names >= {
        "train_config.json",
        "metrics.jsonl",
        "config.json",
        "model.safetensors",
        "checkpoints/last.safetensors",
        "checkpoints/best.safetensors",
        "figures/curves.png",
        "figures/reconstructions.png",
        "figures/samples.png",
        "figures/manifold.png",
        "figures/kl_per_dim.png",
    }
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert {row["split"] for row in rows} == {"train", "test"}
    test = [row["negative_elbo"] for row in rows if row["split"] == "test"]
    assert test[-1] < test[0]


def test_the_commands_for_a_trained_model(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert fastvae("eval", run, "--num-samples", "8", "--max-examples", "50") == 0
    table = capsys.readouterr().out
    assert "negative ELBO" in table
    assert "log-likelihood, K=8" in table
    numbers = json.loads((run / "evaluation.json").read_text())
    assert numbers["test"]["num_examples"] == 50
    assert fastvae("sample", run, "--out", tmp_path / "s.npy", "--count", "7") == 0
    assert np.load(tmp_path / "s.npy").shape == (7, 8, 8)
    assert fastvae("sample", run, "--out", tmp_path / "s.png") == 0
    assert fastvae("reconstruct", run, "--out", tmp_path / "r.png") == 0
    assert fastvae("manifold", run, "--out", tmp_path / "m.png", "--size", "5") == 0
    for name in ("s.png", "r.png", "m.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")
    assert fastvae("encode", run, "--out", tmp_path / "z.npy") == 0
    assert np.load(tmp_path / "z.npy").shape == (300, 2, 2)
    assert fastvae("doctor") == 0
    assert "fastvae_cpu_kernels" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "digit"], "unknown data set 'digit'"),
        (["train", "digits", "--latent-dim", "0"], "--latent-dim is 0, expected more than 0"),
        (["train", "digits", "--lr", "-1"], "--lr is -1.0, expected more than 0"),
        (["train", "digits", "--lr", "nan"], "--lr is nan"),
        (["train", "digits", "--batch-size", "2000"], "--batch-size is 2000, expected at most the 1497"),
        (["train", "digits", "--hidden", "0"], "--hidden is [0]"),
        (["train", "digits", "--device", "tpu:x"], "--device is 'tpu:x'"),
        (["train", "digits", "--device", "cuda:99"], "CUDA devices here"),
        (["train", "digits", "--dequantize"], "--dequantize belongs to --likelihood gaussian"),
        (["train", "digits", "--beta", "-0.5"], "--beta is -0.5, expected 0 or more"),
        (["train", "digits", "--latent-dim", "two"], "--latent-dim"),
        (["train", "digits", "--lattent-dim", "2"], "--lattent-dim"),
        (["eval", "nowhere"], "nowhere is no run directory"),
        (["resume", "nowhere"], "nowhere is no run directory"),
        (["sample", "./nowhere"], "no model at"),
        ([], "subcommand"),
    ],
)
def test_mistakes(
    arguments: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert fastvae(*arguments) == 2
    captured = capsys.readouterr()
    said = " ".join((captured.err + captured.out).split())
    assert message in said
    assert "Traceback" not in said
    assert not list(tmp_path.iterdir())


def test_an_existing_run_directory_is_not_touched(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = {p: p.stat().st_mtime_ns for p in run.rglob("*")}
    assert fastvae(*TRAIN, "--out", run) == 2
    assert "exists already" in capsys.readouterr().err
    assert {p: p.stat().st_mtime_ns for p in run.rglob("*")} == before


def test_a_damaged_checkpoint_is_skipped_or_refused(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    for name in ("last", "best"):
        file = copy / "checkpoints" / f"{name}.safetensors"
        file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
        code = fastvae("resume", copy, "--epochs", "3")
        said = capsys.readouterr()
        if name == "last":
            assert code == 0
            assert "skipped a checkpoint" in said.out
            shutil.copy(run / "checkpoints" / "best.safetensors", copy / "checkpoints" / "best.safetensors")
            file.write_bytes(b"")
        else:
            assert code == 2
            assert "no whole checkpoint" in said.err


def test_a_checkpoint_of_another_architecture_is_refused(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    config = json.loads((copy / "train_config.json").read_text())
    (copy / "train_config.json").write_text(json.dumps(config | {"latent_dim": 3}))
    assert fastvae("resume", copy, "--epochs", "3") == 2
    assert "another architecture" in capsys.readouterr().err


def test_a_second_run_gets_a_directory_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for _ in range(2):
        assert fastvae(*TRAIN, "--max-steps", "2") == 0
    assert sorted(p.name for p in (tmp_path / "runs").iterdir()) == ["digits", "digits-2"]


def test_the_module_is_the_command() -> None:
    command = [sys.executable, "-m", "fastvae", "--version"]
    path = os.pathsep.join(p for p in sys.path if p)
    result = subprocess.run(command, capture_output=True, text=True, check=True, env=os.environ | {"PYTHONPATH": path})
    assert result.stdout.startswith("fastvae ")
