"""Kingma & Welling 2013, Figures 4 and 5, for MNIST: the latent plane, and samples from latent spaces of 2 to 20-D.

Models and training as for Figure 2; the paper does not say how long these were trained, so that a fraction is one of
Figure 2's 10^8 examples.
"""

from __future__ import annotations

import json

import torch

from fastvae.checkpoint import write_atomic
from fastvae.data import load_dataset
from fastvae.figures import manifold, save
from fastvae.models import VAE
from fastvae.reproduce.curves import Options, choose, read_records
from fastvae.reproduce.fig2 import run_curve
from fastvae.reproduce.plots import samples_figure

__all__ = ["fig4", "fig5"]

LATENT_DIMS = (2, 5, 10, 20)


def fig4(options: Options) -> None:
    """The latent plane through the inverse of the Gaussian distribution function."""
    _train(options, ["aevb-2"], "fig4")
    save(manifold(_model(options, "aevb-2")), options.out / "fig4.png")


def fig5(options: Options) -> None:
    """E[x|z] of 100 draws of the prior for each latent dimension."""
    names = choose([f"aevb-{dim}" for dim in LATENT_DIMS], options.only)
    _train(options, names, "fig5")
    generator = torch.Generator().manual_seed(options.seed)
    whole = read_records(options.out, [f"aevb-{dim}" for dim in LATENT_DIMS])
    panels = {
        f"{record['latent_dim']}-D latent space": _model(options, name).sample(100, generator=generator)
        for name, record in whole.items()
    }
    save(samples_figure(panels), options.out / "fig5.png")


def _train(options: Options, names: list[str], experiment: str) -> None:
    dataset = load_dataset(options.data, data_dir=options.data_dir)
    for name in names:
        run_curve(options, dataset, name, method="aevb", latent_dim=int(name.split("-")[1]))
    records = read_records(options.out, names)
    lines = ["| N_z | examples | epochs | step | test bound | images/s |", "|" + "---|" * 6]
    lines += [
        f"| {r['latent_dim']} | {r['examples']:,} | {len(r['points'])} | {r['step_size']:g} "
        f"| {r['points'][-1]['test']:.2f} | {r['images_per_s']:,} |"
        for r in records.values()
    ]
    write_atomic(options.out / f"{experiment}.md", "\n".join(lines) + "\n")
    write_atomic(options.out / f"{experiment}.json", json.dumps({"curves": records}) + "\n")


def _model(options: Options, name: str) -> VAE:
    return VAE.from_pretrained(options.out / "runs" / name)
