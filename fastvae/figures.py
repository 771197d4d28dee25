"""The pictures of a run, each a `matplotlib.figure.Figure` that belongs to nobody else: pyplot is never imported.

Pictures are `[N, H, W]`, or `[N, C, H, W]` with 3 channels as colour and any other number as their mean, floating point
in [0, 1] or uint8. Examples that are no pictures, `[N, D]`, are drawn as strips of D grey levels.
"""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import matplotlib
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import EngFormatter, MaxNLocator
from numpy.typing import NDArray
from torch import Tensor

from fastvae.checkpoint import write_atomic
from fastvae.errors import FastvaeError

if TYPE_CHECKING:
    from fastvae.evaluate import Evaluation
    from fastvae.models import VAE

__all__ = ["curves", "kl_per_dim", "manifold", "reconstructions", "samples", "save"]

# Okabe and Ito's palette: told apart by readers who see red and green alike
BLUE, VERMILION, GREEN, GREY = "#0072B2", "#D55E00", "#009E73", "#999999"

_DPI, _WIDTH = 150, 1240
_STYLE: dict[Any, Any] = {
    "figure.dpi": _DPI,
    "font.family": "DejaVu Sans",
    "font.size": 9.0,
    "axes.titlesize": 9.0,
    "axes.edgecolor": "#444444",
    "axes.linewidth": 0.8,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "grid.color": "#E5E5E5",
    "grid.linewidth": 0.8,
    "legend.frameon": False,
    "text.usetex": False,
}
styled = matplotlib.rc_context(_STYLE)


@styled
def save(figure: Figure, path: Path) -> None:
    """Write `figure` to `path`, whole or not at all, in the format of the suffix and the figure's own size in pixels.

    Raises: FastvaeError if it cannot be written, or not in that format.
    """
    buffer, suffix = io.BytesIO(), path.suffix[1:]
    known = sorted(figure.canvas.get_supported_filetypes())
    if suffix not in known:
        raise FastvaeError(f"cannot write {path}: the suffix is {path.suffix!r}, expected one of {', '.join(known)}")
    figure.savefig(buffer, format=suffix, dpi=figure.dpi)
    write_atomic(path, buffer.getvalue())


# numbers


@styled
def curves(metrics: Sequence[Mapping[str, Any]], label: str) -> Figure:
    """Negative ELBO, NLL and KL against the step, for train and test.

    Args:
        metrics: the rows of metrics.jsonl: `step`, `split` ("train" or "test"), `negative_elbo`, `nll`, `kl`.
        label: what the numbers are, `TrainConfig.nll_label`.
    """
    figure = Figure(figsize=(_WIDTH / _DPI, 2.7), layout="constrained")
    figure.suptitle(label, x=0.01, ha="left", fontsize=9.0)
    panels = figure.subplots(1, 3, sharex=True)
    num_steps = max((row["step"] for row in metrics), default=0)
    for axes, key, title in zip(panels, ("negative_elbo", "nll", "kl"), ("negative ELBO", "NLL", "KL"), strict=True):
        late: list[float] = []
        for split, colour in (("train", BLUE), ("test", VERMILION)):
            rows = [row for row in metrics if row["split"] == split and math.isfinite(row[key])]
            steps, values = (_thinned([row[name] for row in rows]) for name in ("step", key))
            # a line of one row is nothing without its marker, one of many rows hides behind them
            marker = "o" if len(rows) == 1 or (split == "test" and len(rows) <= 40) else None
            axes.plot(steps, values, color=colour, marker=marker, markersize=3.0, linewidth=1.4, label=split)
            late += [value for step, value in zip(steps, values, strict=True) if step > num_steps / 10]
        _limit(axes, late)
        axes.set_title(title)
        axes.set_xlabel("step")
        axes.xaxis.set_major_locator(MaxNLocator(4, integer=True))
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    panels[0].set_ylabel("nats per example")
    figure.legend(handles=panels[0].lines, loc="outside upper right", ncols=2)
    return figure


def _thinned(values: Sequence[float]) -> list[float]:
    """At most 250 values, each the mean of as many neighbours: a longer line is a band of noise."""
    return [float(part.mean()) for part in np.array_split(values, max(1, min(len(values), 250))) if len(part)]


def _limit(axes: Axes, late: list[float]) -> None:
    """The vertical range of all but the first tenth of the steps, whose fall would flatten everything after it."""
    if late and max(late) > min(late):
        margin = 0.05 * (max(late) - min(late))
        axes.set_ylim(min(late) - margin, max(late) + margin)


@styled
def kl_per_dim(evaluation: Evaluation) -> Figure:
    """KL of each latent dimension in nats, largest first, the active units in colour."""
    from fastvae.evaluate import ACTIVE_VARIANCE

    # a diverged model has a picture too
    kl = np.nan_to_num(np.asarray(evaluation.kl_per_dim), posinf=0.0)
    active = np.asarray(evaluation.mu_variance_per_dim) > ACTIVE_VARIANCE
    order = np.argsort(-kl, kind="stable")
    figure = Figure(figsize=(_WIDTH / _DPI, 2.9), layout="constrained")
    axes = figure.subplots()
    colours = np.where(active[order], BLUE, GREY)
    axes.bar(np.arange(len(kl)), kl[order], color=colours.tolist(), width=0.8 if len(kl) <= 100 else 1.0)
    axes.set_xlim(-0.6, len(kl) - 0.4)
    if len(kl) <= 32:
        labels = axes.set_xticks(range(len(kl)), [str(dimension) for dimension in order])
        # an idle dimension's bar is too low to show its colour
        for tick, colour in zip(labels, colours, strict=True):
            tick.label1.set_color(colour)
        axes.set_xlabel("latent dimension, sorted by its KL")
    else:
        axes.set_xlabel("latent dimensions, sorted by their KL")
    axes.grid(False, axis="x")
    axes.set_ylabel("KL (nats)")
    axes.set_title(f"KL {evaluation.kl:.2f} nats, {evaluation.active_units} of {len(kl)} latent dimensions active")
    handles = [Patch(color=BLUE, label="active"), Patch(color=GREY, label="inactive")]
    axes.legend(handles=handles, loc="upper right", ncols=2)
    # headroom for the legend
    axes.set_ylim(0.0, 1.15 * max(float(kl.max()), 1e-3))
    return figure


# pictures


@styled
def reconstructions(x: Tensor, x_hat: Tensor) -> Figure:
    """Data `x` in one row, its reconstructions `x_hat` in the next, ten pairs to a row."""
    if x.shape != x_hat.shape:
        raise FastvaeError(f"got {list(x.shape)} data and {list(x_hat.shape)} reconstructions, expected the same shape")
    columns = min(10, len(x))
    pairs = np.stack([_pictures(x), _pictures(x_hat)])
    # white where the last row runs out
    missing = -len(x) % columns
    pairs = np.pad(pairs, ((0, 0), (0, missing), (0, 0), (0, 0), (0, 0)), constant_values=1.0)
    rows = pairs.reshape(2, -1, columns, *pairs.shape[2:]).swapaxes(0, 1).reshape(-1, *pairs.shape[2:])
    figure, axes = _mosaic(rows, columns, left=165)
    num_rows = len(rows) // columns
    # rows too low for words have none
    if axes.bbox.height / num_rows > 20:
        for row in range(num_rows):
            text, place = ("data", "reconstruction")[row % 2], (0.0, 1.0 - (row + 0.5) / num_rows)
            axes.annotate(text, place, (-6, 0), "axes fraction", "offset points", ha="right", va="center")
    return figure


@styled
def samples(images: Tensor) -> Figure:
    """A grid of pictures, as near to a square as their number allows."""
    return _mosaic(_pictures(images), math.ceil(math.sqrt(len(images))))[0]


@styled
def manifold(model: VAE, n: int = 20) -> Figure:
    """E[x|z] on a grid of a 2-D latent space, n x n, equal in probability under the prior: the paper's Figure 4.

    The grid is regular in the unit square and goes through the inverse of the Gaussian distribution function.

    Raises: FastvaeError for a latent space that is not 2-D.
    """
    if model.latent_dim != 2:
        raise FastvaeError(f"the manifold is drawn for 2 latent dimensions, got a model with {model.latent_dim}")
    centre = torch.special.ndtri((torch.arange(n, dtype=torch.float64) + 0.5) / n)
    # the first row of pictures is the top: z_2 falls from row to row
    z2, z1 = torch.meshgrid(centre.flip(0), centre, indexing="ij")
    z = torch.stack([z1, z2], dim=-1).flatten(0, 1).to(next(model.parameters()))
    with torch.no_grad():
        images = model.likelihood.mean(model.decode(z)).unflatten(-1, model.data_shape)
    figure, axes = _mosaic(_pictures(images), n, left=81, bottom=62)
    ticks = torch.tensor([-1.5, -1.0, -0.5, 0.0, 0.5, 1.0, 1.5])
    labels = [f"{tick:g}".replace("-", "\N{MINUS SIGN}") for tick in ticks.tolist()]
    (left, right), (bottom, top) = axes.get_xlim(), axes.get_ylim()
    quantiles = torch.special.ndtr(ticks)
    axes.set_axis_on()
    axes.spines[:].set_visible(False)
    axes.set_xticks((left + (right - left) * quantiles).tolist(), labels)
    axes.set_yticks((bottom + (top - bottom) * quantiles).tolist(), labels)
    axes.set_xlabel("$z_1$", labelpad=1.0)
    axes.set_ylabel("$z_2$", labelpad=0.0)
    return figure


def _pictures(x: Tensor) -> NDArray[np.float32]:
    """`[N, H, W, 3]` in [0, 1], whatever the examples are, with a black line of one value at the right and below.

    The line keeps neighbours apart: the digits of 8 x 8 fill their frames.
    """
    if x.ndim < 2 or x.numel() == 0:
        raise FastvaeError(f"got {list(x.shape)}, expected one picture or more: [N, H, W], [N, C, H, W] or [N, D]")
    x = x.detach().cpu()
    x = (x.float() / 255.0 if x.dtype == torch.uint8 else x.float()).nan_to_num().clamp(0.0, 1.0)
    if x.ndim == 2:
        x = x.unsqueeze(1).expand(-1, max(1, x.shape[1] // 4), -1)
    x = x.unsqueeze(1) if x.ndim == 3 else x.flatten(1, -3)
    x = x if x.shape[1] == 3 else x.mean(1, keepdim=True).expand(-1, 3, -1, -1)
    x = torch.nn.functional.pad(x, (0, 1, 0, 1))
    pictures: NDArray[np.float32] = x.permute(0, 2, 3, 1).numpy()
    return pictures


def _mosaic(pictures: NDArray[np.float32], columns: int, *, left: int = 0, bottom: int = 0) -> tuple[Figure, Axes]:
    """Rows of `_pictures`, white where they run out, with margins in pixels; 1240 pixels at most each way.

    Each value takes a whole number of pixels, unless there are more values than pixels: nothing is blurred.
    """
    N, H, W, _ = pictures.shape
    rows = math.ceil(N / columns)
    grid = np.ones((rows * columns, H, W, 3), np.float32)
    grid[:N] = pictures
    grid = grid.reshape(rows, columns, H, W, 3).swapaxes(1, 2).reshape(rows * H, columns * W, 3)[:-1, :-1]
    scale = min((_WIDTH - bottom) / grid.shape[0], (_WIDTH - left) / grid.shape[1])
    # nor is a single digit drawn as large as the page
    scale = math.floor(min(scale, max(1.0, 160 / (max(H, W) - 1)))) if scale >= 1 else scale
    height, width = (max(1, round(size * scale)) for size in grid.shape[:2])
    total_width, total_height = left + width, bottom + height
    figure = Figure(figsize=(total_width / _DPI, total_height / _DPI))
    axes = figure.add_axes((left / total_width, bottom / total_height, width / total_width, height / total_height))
    axes.imshow(grid, interpolation="nearest" if scale >= 1 else "antialiased", aspect="auto")
    axes.grid(False)
    axes.set_axis_off()
    return figure, axes
