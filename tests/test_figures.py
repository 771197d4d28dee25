"""The figures: files of the size they claim, whole pixels, no warning, whatever the examples look like."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

import matplotlib
import numpy as np
import pytest
import torch
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.image import imread
from torch import Tensor

from fastvae import figures
from fastvae.errors import FastvaeError
from fastvae.evaluate import Evaluation
from fastvae.models import VAE


def saved(figure: Figure, tmp_path: Path) -> np.ndarray:
    """The figure as it is on the disk, `[height, width, 3]` in [0, 1]."""
    path = tmp_path / "figure.png"
    figures.save(figure, path)
    assert [p.name for p in tmp_path.iterdir()] == ["figure.png"]
    pixels = imread(path)
    width, height = (round(float(inches) * figure.dpi) for inches in figure.get_size_inches())
    assert pixels.shape == (height, width, 4)
    assert width <= 1240
    assert (pixels[..., 3] == 1).all()
    return pixels[..., :3]


def evaluation(kl_per_dim: list[float], mu_variance_per_dim: list[float]) -> Evaluation:
    return Evaluation(
        num_examples=10,
        negative_elbo=100.0,
        nll=90.0,
        kl=sum(kl_per_dim),
        bits_per_dim=0.1,
        active_units=sum(v > 0.01 for v in mu_variance_per_dim),
        kl_per_dim=kl_per_dim,
        mu_variance_per_dim=mu_variance_per_dim,
        log_likelihood=None,
        log_likelihood_stderr=None,
        effective_sample_size=None,
        num_samples=None,
    )


def row(step: int, split: str, nll: float) -> dict[str, object]:
    return {"step": step, "epoch": step / 10, "split": split, "negative_elbo": nll + 5.0, "nll": nll, "kl": 5.0}


# numbers


def test_curves(tmp_path: Path) -> None:
    metrics = [row(step, "train", 5000.0 / step + 100.0) for step in range(10, 600, 10)]
    metrics += [row(step, "test", 5000.0 / step + 103.0) for step in range(100, 600, 100)]
    figure = figures.curves(metrics, "likelihood of binarised data")
    saved(figure, tmp_path)
    assert figure.get_suptitle() == "likelihood of binarised data"
    nll = figure.axes[1]
    train, test = nll.lines
    assert train.get_xydata().tolist() == [[r["step"], r["nll"]] for r in metrics[:59]]  # type: ignore[union-attr]
    assert test.get_xydata().tolist() == [[r["step"], r["nll"]] for r in metrics[59:]]  # type: ignore[union-attr]
    # the first fall does not set the scale, the end is in sight
    low, high = nll.get_ylim()
    assert 100 < low < 100 + 5000 / 590
    assert 5000 / 60 + 100 < high < 200


def test_long_curves_are_averaged(tmp_path: Path) -> None:
    metrics = [row(step, "train", 100.0 + (-1) ** step) for step in range(1, 2001)]
    figure = figures.curves(metrics, "")
    saved(figure, tmp_path)
    steps, values = np.asarray(figure.axes[1].lines[0].get_xydata()).T
    assert steps.tolist() == [4.5 + 8 * i for i in range(250)]
    assert values.tolist() == [100.0] * 250


@pytest.mark.parametrize(
    "metrics",
    [
        [],
        [row(100, "train", 120.0)],
        [row(100, "test", 120.0)],
        [row(100, "train", float("nan")), row(200, "train", float("inf")), row(300, "train", 5.0)],
        [row(100, "train", 120.0), row(200, "train", 120.0)],
    ],
    ids=["none", "one", "test only", "not finite", "constant"],
)
def test_curves_of_few_rows(metrics: list[dict[str, object]], tmp_path: Path) -> None:
    saved(figures.curves(metrics, "density of data in [0, 1]"), tmp_path)


def test_kl_per_dim(tmp_path: Path) -> None:
    # the third dimension costs the most and says nothing: a mean far from the prior that does not depend on x
    figure = figures.kl_per_dim(evaluation([1.0, 0.001, 3.0, 2.0], [0.5, 0.002, 0.0, 0.6]))
    saved(figure, tmp_path)
    (axes,) = figure.axes
    assert [bar.get_height() for bar in axes.patches] == [3.0, 2.0, 1.0, 0.001]  # type: ignore[attr-defined]
    colours = [to_hex(bar.get_facecolor()).upper() for bar in axes.patches]
    assert colours == [figures.GREY, figures.BLUE, figures.BLUE, figures.GREY]
    assert [label.get_text() for label in axes.get_xticklabels()] == ["2", "3", "0", "1"]
    assert axes.get_title() == "KL 6.00 nats, 2 of 4 latent dimensions active"


@pytest.mark.parametrize("latent_dim", [1, 33, 200])
def test_kl_per_dim_of_other_sizes(latent_dim: int, tmp_path: Path) -> None:
    saved(figures.kl_per_dim(evaluation([0.0] * latent_dim, [0.0] * latent_dim)), tmp_path)


def test_kl_per_dim_of_a_diverged_model(tmp_path: Path) -> None:
    nan, inf = float("nan"), float("inf")
    saved(figures.kl_per_dim(evaluation([nan, inf, 1.0], [nan, 1.0, 1.0])), tmp_path)


# pictures


def test_samples_are_drawn_pixel_for_pixel(tmp_path: Path) -> None:
    images = torch.randint(256, (7, 9, 6), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    pixels = saved(figures.samples(images), tmp_path)
    # 3 x 3 places for 7 pictures, with a black line of one value between them, every value 17 pixels wide and high:
    # the largest whole number that keeps a picture within 160
    grid = np.ones((3 * 10, 3 * 7), np.float32)
    for i, image in enumerate(images):
        top, left = 10 * (i // 3), 7 * (i % 3)
        grid[top : top + 10, left : left + 7] = 0.0
        grid[top : top + 9, left : left + 6] = (image / 255.0).numpy()
    expected = grid[:-1, :-1].repeat(17, 0).repeat(17, 1)
    assert pixels.shape == (*expected.shape, 3)
    # the file has 8 bits
    assert np.abs(pixels - expected[..., None]).max() < 1.5 / 255


def test_colour(tmp_path: Path) -> None:
    red = torch.tensor([1.0, 0.0, 0.5]).view(1, 3, 1, 1).expand(1, 3, 32, 32)
    pixels = saved(figures.samples(red), tmp_path)
    assert np.abs(pixels - [1.0, 0.0, 0.5]).max() < 1.5 / 255


@pytest.mark.parametrize(
    "shape",
    [
        (1, 28, 28),  # one picture
        (1, 1, 1),
        (5, 1, 28, 28),  # grey, with a channel
        (3, 2, 9, 4),  # two channels: no colour
        (2, 3, 2, 5, 4),  # more axes than a picture
        (40, 13),  # no pictures at all
        (3, 1),
        (2, 1300),
        (40, 3, 100, 250),  # more values than pixels
        (4, 2, 300),  # far from square
    ],
    ids=str,
)
def test_odd_shapes(shape: tuple[int, ...], tmp_path: Path) -> None:
    x = torch.rand(shape, generator=torch.Generator().manual_seed(0))
    saved(figures.samples(x), tmp_path)
    saved(figures.reconstructions(x, 1 - x), tmp_path)


def test_values_out_of_range_are_clipped(tmp_path: Path) -> None:
    x = torch.tensor([[[-3.0, float("nan")], [7.0, float("inf")]]])
    pixels = saved(figures.samples(x), tmp_path)
    assert pixels[:60].max() == 0
    assert pixels[-60:, 0].min() == 1
    assert pixels[-60:, -1].min() == 1


def test_reconstructions(tmp_path: Path) -> None:
    # 12 pairs: a row of ten and a row of two
    x, x_hat = torch.full((12, 8, 8), 0.25), torch.full((12, 8, 8), 0.75)
    figure = figures.reconstructions(x, x_hat)
    pixels = saved(figure, tmp_path)
    height = len(pixels) // 4
    rows = pixels[height // 2 :: height, 170, 0]
    assert rows == pytest.approx([0.25, 0.75, 0.25, 0.75], abs=0.01)
    # where there is no third pair the paper is white
    assert pixels[height * 5 // 2 :: height, -5].min() == 1
    assert [text.get_text() for text in figure.axes[0].texts] == ["data", "reconstruction"] * 2


def test_labels_lie_within_the_figure(tmp_path: Path) -> None:
    figure = figures.reconstructions(torch.rand(3, 28, 28), torch.rand(3, 28, 28))
    pixels = saved(figure, tmp_path)
    assert pixels[:, :4].min() == 1
    assert pixels[:, 4:160].min() < 0.5


class Corner(torch.nn.Module):
    """A decoder whose picture of 1 x 2 pixels is the latent pair, as logits."""

    def forward(self, z: Tensor) -> Tensor:
        return z * 1.0


def test_manifold_is_laid_out_as_the_plane(tmp_path: Path) -> None:
    model = VAE.mlp(data_shape=(1, 2), latent_dim=2, hidden=())
    model.decoder = Corner()
    figure = figures.manifold(model, n=5)
    saved(figure, tmp_path)
    (axes,) = figure.axes
    drawn = np.asarray(axes.images[0].get_array())[::2, :, 0]  # [5 rows, 5 columns of (z_1, z_2, line)]
    z1, z2 = (np.log(p / (1 - p)) for p in (drawn[:, 0::3], drawn[:, 1::3]))
    normal = torch.distributions.Normal(0.0, 1.0)
    quantiles = normal.icdf(torch.tensor([0.1, 0.3, 0.5, 0.7, 0.9])).numpy()
    np.testing.assert_allclose(z1, np.tile(quantiles, (5, 1)), atol=1e-5)
    np.testing.assert_allclose(z2, np.tile(quantiles[::-1, None], (1, 5)), atol=1e-5)
    # the ticks say the same: z = 0 is the middle, 0.5 lies to the right of it and above
    labels = [label.get_text() for label in axes.get_xticklabels()]
    places = axes.transAxes.inverted().transform(
        axes.transData.transform(np.stack([axes.get_xticks(), axes.get_yticks()], -1))
    )
    tick = labels.index("0.5")
    np.testing.assert_allclose(places[labels.index("0")], 0.5, atol=1e-6)
    np.testing.assert_allclose(places[tick], normal.cdf(torch.tensor(0.5)).item(), atol=1e-6)


def test_manifold_of_vectors(tmp_path: Path) -> None:
    saved(figures.manifold(VAE.mlp(data_shape=(9,), latent_dim=2, hidden=()), n=1), tmp_path)


# files and errors


@pytest.mark.parametrize("suffix", ["svg", "pdf"])
def test_other_formats(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"figure.{suffix}"
    figures.save(figures.reconstructions(torch.rand(3, 8, 8), torch.rand(3, 8, 8)), path)
    assert path.stat().st_size > 1000


def test_errors(tmp_path: Path) -> None:
    with pytest.raises(FastvaeError, match="2 latent dimensions, got a model with 3"):
        figures.manifold(VAE.mlp(data_shape=(4,), latent_dim=3, hidden=()))
    with pytest.raises(FastvaeError, match=r"got \[2, 3\] data and \[2, 4\] reconstructions"):
        figures.reconstructions(torch.rand(2, 3), torch.rand(2, 4))
    with pytest.raises(FastvaeError, match=r"got \[0, 8, 8\]"):
        figures.samples(torch.rand(0, 8, 8))
    with pytest.raises(FastvaeError, match=r"got \[0, 8, 8\]"):
        figures.reconstructions(torch.rand(0, 8, 8), torch.rand(0, 8, 8))
    with pytest.raises(FastvaeError, match="cannot write"):
        figures.save(figures.samples(torch.rand(1, 8, 8)), tmp_path / "missing" / "figure.png")
    with pytest.raises(FastvaeError, match=r"figure\.jpag"):
        figures.save(figures.samples(torch.rand(1, 8, 8)), tmp_path / "figure.jpag")
    assert not list(tmp_path.iterdir())


def test_nobody_elses_state_is_touched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = dict(matplotlib.rcParams)
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)
    fresh = runpy.run_path(figures.__file__)
    fresh["save"](fresh["samples"](torch.rand(1, 8, 8)), tmp_path / "figure.png")
    assert dict(matplotlib.rcParams) == before
