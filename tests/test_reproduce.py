"""The papers' experiments at tiny fractions: they run, go on, say what they measured, and refuse what has no sense."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fastvae.cli import main
from fastvae.data import load_dataset
from fastvae.errors import FastvaeError
from fastvae.models import VAE
from fastvae.reproduce import curves, fig2, fig3, pictures, table1
from fastvae.reproduce.curves import Options
from fastvae.reproduce.mcem import MonteCarloEM
from fastvae.train import build_model


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """300 digits to train on, 60 to test with, of 8 x 8."""
    from sklearn.datasets import load_digits

    images = (load_digits().images[:360] / 16.0 * 255).astype(np.uint8)
    np.savez(tmp_path / "data.npz", train=images[:300], test=images[300:])
    return tmp_path / "data.npz"


@pytest.fixture(autouse=True)
def _short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fig2, "PILOT_STEPS", 3)
    monkeypatch.setattr(fig3, "PILOT_STEPS", 10)
    monkeypatch.setattr(fig3, "NUM_TRAIN", (200, 300))
    monkeypatch.setattr(fig3, "CURVES", {f"{m}-200": (m, 200) for m in ("aevb", "wake-sleep", "mcem")})
    monkeypatch.setattr(fig3, "POINTS", (1000, 2000, 4000))
    monkeypatch.setattr(fig3, "NUM_ESTIMATED", 30)
    monkeypatch.setattr(table1, "NUM_SAMPLES", 20)
    # the pictures of each run take longer than its training
    monkeypatch.setattr("fastvae.train._draw", lambda *_: None)


def read(path: Path) -> Any:
    return json.loads(path.read_text())


def test_figure_2_runs_goes_on_and_runs_nothing_twice(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = Options(tmp_path / "out", str(data), fraction=1.5e-5, only=("aevb-5", "wake-sleep-5"))
    fig2.fig2(options)
    found = read(options.out / "fig2.json")
    assert list(found["curves"]) == ["aevb-5", "wake-sleep-5"]
    curve = found["curves"]["aevb-5"]
    assert [point["examples"] for point in curve["points"]] == [300, 600, 900, 1200, 1500]
    assert curve["fraction"] == 1500 / 1e8
    assert curve["unit"] == "nats per example, cross-entropy on grey levels, not a likelihood"
    assert curve["step_size"] in fig2.STEP_SIZES
    assert curve["images_per_s"] > 0
    assert list(found["claims"]) == ["AEVB above wake-sleep at every point, Nz = 5"]
    assert (options.out / "fig2.png").read_bytes()[:4] == b"\x89PNG"
    assert "| 5 | wake-sleep | 1,500 | 1.5e-05 |" in (options.out / "fig2.md").read_text()

    # a larger fraction goes on from there: the same as if it had been asked for at once
    longer = dataclasses.replace(options, fraction=2.1e-5, only=("aevb-5",))
    fig2.fig2(longer)
    at_once = dataclasses.replace(longer, out=tmp_path / "at-once")
    fig2.fig2(at_once)
    pieces, whole = (read(o.out / "fig2.json")["curves"]["aevb-5"]["points"] for o in (longer, at_once))
    assert len(pieces) == 7
    assert pieces == whole

    def refuse(*_: Any) -> None:
        raise AssertionError("trained a curve that was whole")

    monkeypatch.setattr(curves, "resume", refuse)
    monkeypatch.setattr(curves, "train", refuse)
    fig2.fig2(longer)


def test_figure_2_takes_the_best_step_size(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dataset = load_dataset(str(data))
    config = fig2.paper_config(Options(tmp_path, str(data)), method="aevb", latent_dim=3, hidden=16)
    reached = {}
    for lr in fig2.STEP_SIZES:
        run = curves.train_to(dataclasses.replace(config, lr=lr, max_steps=3, log_every=1, out=tmp_path / f"{lr}"))
        reached[lr] = [row["negative_elbo"] for row in run.read_metrics() if row["split"] == "train"][-1]
    assert fig2.best_step_size(config, dataset) == min(reached, key=lambda lr: reached[lr])
    # not-a-number is the worst there is
    monkeypatch.setattr(fig2, "STEP_SIZES", (1e30, 0.02))
    assert fig2.best_step_size(config, dataset) == 0.02


def test_figure_3_estimates_three_methods_on_the_way(data: Path, tmp_path: Path) -> None:
    options = Options(tmp_path / "out", str(data), fraction=2000 / fig3.EXAMPLES)
    fig3.fig3(options)
    found = read(options.out / "fig3.json")["curves"]
    assert list(found) == ["aevb-200", "wake-sleep-200", "mcem-200"]
    for record in found.values():
        assert [point["examples"] for point in record["points"]] == [1000, 2000]
        for split in ("train", "test"):
            first, last = (point[split] for point in record["points"])
            assert first < last < 0
            assert 0 < record["points"][1][f"{split}_stderr"] < 0.5
    before = found["mcem-200"]["points"]
    fig3.fig3(dataclasses.replace(options, fraction=4000 / fig3.EXAMPLES, only=("mcem-200",)))
    after = read(options.out / "fig3.json")["curves"]["mcem-200"]["points"]
    assert after[:2] == before
    assert after[2]["examples"] == 4000


def test_monte_carlo_em_goes_on_bit_for_bit_and_learns(tmp_path: Path) -> None:
    config = fig2.paper_config(Options(tmp_path), method="aevb", latent_dim=3, hidden=16)
    config = dataclasses.replace(config, batch_size=50, lr=0.1)
    x = torch.randint(256, (200, 20), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    x[:, :10] //= 8

    def start() -> MonteCarloEM:
        torch.manual_seed(0)
        return MonteCarloEM(config, build_model(config, (20,)), x)

    whole = start()
    encoder = [parameter.clone() for parameter in whole.model.encoder.parameters()]
    whole()
    first = float(whole.nll)
    for _ in range(9):
        whole()
    assert float(whole.nll) < first - 0.3
    assert all(map(torch.equal, encoder, whole.model.encoder.parameters()))
    parts = start()
    for _ in range(6):
        parts()
    parts.save(tmp_path / "em.safetensors")
    resumed = start()
    resumed.load(tmp_path / "em.safetensors")
    for _ in range(4):
        resumed()
    assert torch.equal(whole.z, resumed.z)
    assert torch.equal(whole.step_size, resumed.step_size)
    assert all(map(torch.equal, whole.model.parameters(), resumed.model.parameters()))


def test_figures_4_and_5_draw_what_was_trained(data: Path, tmp_path: Path) -> None:
    options = Options(tmp_path / "out", str(data), fraction=1e-5, only=("aevb-2",))
    pictures.fig4(options)
    pictures.fig5(options)
    assert (options.out / "fig4.png").is_file()
    assert (options.out / "fig5.png").is_file()
    assert read(options.out / "fig5.json")["curves"]["aevb-2"]["examples"] == 900


def test_table_1_measures_each_row(data: Path, tmp_path: Path) -> None:
    options = Options(tmp_path / "out", str(data), passes_to=1, only=("vae-5", "iwae-5"))
    table1.table1(options)
    found = read(options.out / "table1.json")
    for name in ("vae-5", "iwae-5"):
        row = found["rows"][name]
        assert row["passes"] == 4
        assert row["fraction"] == 4 / 3280
        assert 0 < row["nll"] < row["negative_elbo"] + 4 * row["nll_stderr"]
        assert row["nll_stderr"] > 0
        assert row["test_examples"] == 60
        assert row["importance_samples"] == 20
        assert isinstance(VAE.from_pretrained(options.out / "runs" / name), VAE)
    gain = found["iwae_better_by"]["5"]
    assert gain["nats"] == found["rows"]["vae-5"]["nll"] - found["rows"]["iwae-5"]["nll"]
    text = (options.out / "table1.md").read_text()
    assert "| IWAE | 5 | 4 | 0.00122 |" in text
    assert "| 85.54 |" in text
    assert "At k = 5, after 4 passes each, IWAE is" in text


def test_the_rows_are_of_the_paper() -> None:
    config = table1.paper_config(Options(Path("out")), "iwae-50")
    assert (config.objective, config.num_samples, config.hidden, config.latent_dim) == ("iwae", 50, (200, 200), 50)
    assert (config.epochs, config.batch_size, config.lr, config.lr_schedule) == (3280, 20, 1e-3, "iwae")
    # the mean of 20 gradients against their sum: the same update
    assert config.adam_eps * config.batch_size == pytest.approx(1e-4)
    assert table1.paper_config(Options(Path("out")), "vae-5").kl_estimator == "monte-carlo"


@pytest.mark.parametrize("fraction", [0.0, -1.0, 1.5, float("nan")])
def test_a_fraction_is_a_part(fraction: float, tmp_path: Path) -> None:
    with pytest.raises(FastvaeError, match="expected more than 0 and at most 1"):
        Options(tmp_path, fraction=fraction)


def test_mistakes_end_before_anything_is_written(data: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(FastvaeError, match="--only is 'aevb-7', expected some of aevb-3, wake-sleep-3"):
        fig2.fig2(Options(out, str(data), only=("aevb-7",)))
    with pytest.raises(FastvaeError, match="--passes-to is 8, expected 0 to 7"):
        table1.table1(Options(out, str(data), passes_to=8))
    with pytest.raises(FastvaeError, match="expected --passes-to in place of --fraction"):
        table1.table1(Options(out, str(data), fraction=0.5))
    with pytest.raises(FastvaeError, match="unknown data set 'mnits'"):
        fig2.fig2(Options(out, "mnits"))
    assert not out.exists()


def test_a_run_of_other_settings_is_left_alone(data: Path, tmp_path: Path) -> None:
    config = fig2.paper_config(Options(tmp_path, str(data)), method="aevb", latent_dim=3, hidden=16)
    config = dataclasses.replace(config, epochs=1, out=tmp_path / "run")
    curves.train_to(config)
    with pytest.raises(FastvaeError, match="holds a run with other settings"):
        curves.train_to(dataclasses.replace(config, seed=1))


def test_the_command_line_says_it_in_one_line(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["fastvae", "reproduce", "fig3", "--data", str(data), "--out", str(tmp_path / "out"), "--fraction", "2"]
    monkeypatch.setattr("sys.argv", arguments)
    with pytest.raises(SystemExit) as exit_:
        main()
    assert exit_.value.code == 2
    assert capsys.readouterr().err == "fastvae: error: --fraction is 2.0, expected more than 0 and at most 1\n"
