"""The curves of the papers, drawn as the papers draw them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, NullFormatter
from torch import Tensor

from fastvae.figures import BLUE, GREEN, VERMILION, styled

__all__ = ["bounds_figure", "samples_figure"]

COLOURS = {"aevb": BLUE, "wake-sleep": VERMILION, "mcem": GREEN}
NAMES = {"aevb": "AEVB", "wake-sleep": "Wake-Sleep", "mcem": "MCEM"}

Points = Sequence[Mapping[str, float]]


@styled
def bounds_figure(panels: Mapping[str, Mapping[str, Points]], label: str, limits: tuple[float, float]) -> Figure:
    """Train and test values against the number of training examples, on a logarithmic axis, a panel per setting.

    Args:
        panels: by title, then by method: `examples`, `train` and `test` of each point. One without any is left out.
        label: of the vertical axis.
        limits: of the vertical axis, as the paper has them; a curve that lies wholly outside moves them.
    """
    panels = {title: methods for title, methods in panels.items() if any(methods.values())} or panels
    figure = Figure(figsize=(1240 / 150, 3.3), layout="constrained")
    axes = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    values = []
    for panel, (title, methods) in zip(axes, panels.items()):
        panel.set_title(title)
        panel.set_xscale("log")
        panel.xaxis.set_minor_formatter(NullFormatter())
        for method, points in methods.items():
            examples = [point["examples"] for point in points]
            for split, dashes in (("train", "--"), ("test", "-")):
                curve = [point[split] for point in points]
                values += curve[-1:]
                name = f"{NAMES[method]} ({split})"
                panel.plot(examples, curve, dashes, color=COLOURS[method], linewidth=1.2, label=name)
    low, high = (min([limits[0], *values]) - 1.0, max([limits[1], *values]))
    axes[0].set_ylim(low, high)
    axes[0].set_ylabel(label)
    axes[0].yaxis.set_major_locator(MaxNLocator(6))
    figure.supxlabel("training examples", fontsize=9.0)
    curves = axes[0].lines
    figure.legend(handles=curves, loc="outside upper center", ncols=len(curves) if len(curves) <= 4 else 3)
    return figure


@styled
def samples_figure(panels: Mapping[str, Tensor]) -> Figure:
    """A square of pictures `[N, H, W]` under each title, side by side."""
    figure = Figure(figsize=(1240 / 150, 1240 / 150 / len(panels) + 0.3), layout="constrained")
    for axes, (title, images) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels.items()):
        side = math.isqrt(len(images))
        H, W = images.shape[-2:]
        grid = images[: side * side].reshape(side, side, H, W).transpose(1, 2).reshape(side * H, side * W)
        axes.imshow(grid.cpu().numpy(), cmap="gray", vmin=0.0, vmax=1.0)
        axes.set_title(title)
        axes.grid(False)
        axes.set_axis_off()
    return figure
