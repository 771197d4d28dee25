"""Kingma & Welling 2013, Figure 2: the lower bound against the number of training examples, AEVB and wake-sleep.

The paper's set-up (Section 5, Appendix C): MNIST; encoder and decoder with one hidden layer of 500 tanh units; N_z = 3,
5, 10, 20, 200; minibatches of 100, one sample per example; all parameters from N(0, 0.01), a variance as in the paper's
other normal distributions; Adagrad, its step the best of 0.01, 0.02, 0.1 over the first iterations (here 300) on the
training set; a prior N(0, I) on the parameters; wake-sleep with the same encoder and decoder; 10^8 examples.

The paper does not say that the digits were binarised: the grey levels are the data, and so the bound is one of a
cross-entropy, not of a likelihood. Its other data set, Frey Face, is not to be had under a name: `--data` takes an .npy
file of it, but trains it as MNIST, where the paper had 200 hidden units and a Gaussian decoder. Train points are means
over the steps since the point before, test points are of the model as it is then.
"""

from __future__ import annotations

import dataclasses
import json
import math
from typing import Any

import torch

from fastvae.checkpoint import write_atomic
from fastvae.config import TrainConfig
from fastvae.data import Dataset, load_dataset
from fastvae.figures import save
from fastvae.initial import initialize
from fastvae.reproduce.curves import (
    Options,
    choose,
    finished,
    points,
    read_records,
    speed,
    train_to,
    write_record,
)
from fastvae.reproduce.plots import bounds_figure
from fastvae.run import Run
from fastvae.step import TrainingStep, make_optimizer
from fastvae.train import build_model, pick_device

__all__ = ["fig2"]

LATENT_DIMS = (3, 5, 10, 20, 200)
METHODS = {"aevb": "elbo", "wake-sleep": "wake-sleep"}
EXAMPLES = 10**8
STEP_SIZES = (0.01, 0.02, 0.1)
PILOT_STEPS = 300
CURVES = {f"{method}-{dim}": (method, dim) for dim in LATENT_DIMS for method in METHODS}


def paper_config(options: Options, *, method: str, latent_dim: int, hidden: int) -> TrainConfig:
    """The paper's training, but for the step of Adagrad, the end and the run directory."""
    return TrainConfig(
        data=options.data,
        data_dir=options.data_dir,
        objective=METHODS[method],  # type: ignore[arg-type]
        hidden=(hidden,),
        activation="tanh",
        latent_dim=latent_dim,
        init="normal",
        binarize="none",
        batch_size=100,
        optimizer="adagrad",
        weight_decay=1.0,
        seed=options.seed,
        device=options.device,
    )


def train_with_best_step_size(config: TrainConfig, dataset: Dataset) -> Run:
    """Train to the end of `config` with the step of Adagrad whose bound is best after the first steps."""
    assert config.out is not None
    # of a run that is there the step has been chosen
    run = Run(config.out)
    lr = run.read_config().lr if run.last.is_file() else best_step_size(config, dataset)
    return train_to(dataclasses.replace(config, lr=lr))


def best_step_size(config: TrainConfig, dataset: Dataset) -> float:
    """The step of Adagrad with the highest bound over the last third of the first steps, on the training set."""
    data = dataset.train.to(pick_device(config.device))
    reached = {}
    for lr in STEP_SIZES:
        trial = dataclasses.replace(config, lr=lr, log_every=PILOT_STEPS // 3)
        torch.manual_seed(config.seed)
        model = build_model(trial, dataset.shape)
        initialize(model, trial.init, dataset.train)
        model.to(data.device)
        optimizer = make_optimizer(trial, list(model.parameters()), len(data))
        step = TrainingStep(trial, model, optimizer, data, PILOT_STEPS)
        for number in range(PILOT_STEPS):
            if number % step.steps_per_epoch == 0:
                step.start_epoch(number // step.steps_per_epoch)
            step()
        # loss, nll, kl: the bound is of the last two
        negative_bound = float(step.metrics[:, 1:].sum(1).mean())
        reached[lr] = negative_bound if math.isfinite(negative_bound) else math.inf
    return min(reached, key=lambda lr: reached[lr])


def fig2(options: Options) -> None:
    """Run the curves, write the figure and its data."""
    names = choose(list(CURVES), options.only)
    dataset = load_dataset(options.data, data_dir=options.data_dir)
    for name in names:
        method, latent_dim = CURVES[name]
        run_curve(options, dataset, name, method=method, latent_dim=latent_dim)
        write_result(options)


def run_curve(options: Options, dataset: Dataset, name: str, *, method: str, latent_dim: int) -> None:
    """Take one curve to the fraction of `EXAMPLES` that is asked for, unless it is there, and record it."""
    config = paper_config(options, method=method, latent_dim=latent_dim, hidden=500)
    steps_per_epoch = len(dataset.train) // config.batch_size
    epochs = max(1, round(options.fraction * EXAMPLES / len(dataset.train)))
    if finished(options.out, name, epochs * steps_per_epoch * config.batch_size):
        return
    config = dataclasses.replace(
        config,
        out=options.out / "runs" / name,
        epochs=epochs,
        eval_every=max(1, epochs // 50),
        log_every=min(config.log_every, steps_per_epoch),
    )
    write_record(options.out, name, curve_record(train_with_best_step_size(config, dataset), EXAMPLES))


def curve_record(run: Run, full: int) -> dict[str, Any]:
    """What one run of the trainer has to say: how far it went, how fast, and its bound on the way."""
    config, curve = run.read_config(), points(run)
    examples = int(curve[-1]["examples"])
    settings = {"step_size": config.lr, "hidden": list(config.hidden), "latent_dim": config.latent_dim}
    return {
        "examples": examples,
        "fraction": examples / full,
        **settings,
        "unit": f"nats per example, {config.nll_label}",
        **speed(run),
        "points": curve,
    }


def claims(records: dict[str, dict[str, Any]]) -> dict[str, bool]:
    """What the paper says of its figure, and whether it holds here, as far as the curves have been run."""
    held: dict[str, bool] = {}
    final = {name: record["points"][-1]["test"] for name, record in records.items()}
    for dim in LATENT_DIMS:
        a, b = (records.get(f"{method}-{dim}") for method in METHODS)
        if a and b:
            above = [p["test"] > q["test"] for p, q in zip(a["points"], b["points"])]
            held[f"AEVB above wake-sleep at every point, Nz = {dim}"] = all(above)
    for low, high in ((3, 5), (5, 10), (10, 20)):
        if {f"aevb-{low}", f"aevb-{high}"} <= final.keys():
            held[f"Nz = {high} ends above Nz = {low}"] = final[f"aevb-{high}"] > final[f"aevb-{low}"]
    if {"aevb-20", "aevb-200"} <= final.keys():
        # "more latent variables does not result in more overfitting"
        held["Nz = 200 ends no more than 1 nat below Nz = 20"] = final["aevb-200"] > final["aevb-20"] - 1.0
    return held


def write_result(options: Options) -> None:
    """fig2.json, fig2.png and fig2.md from the curves that are whole."""
    records = read_records(options.out, list(CURVES))
    held = claims(records)
    head = "| N_z | method | examples | fraction of the paper's | train bound | test bound | step | images/s |"
    lines = [head, "|" + "---|" * 8]
    for name, record in records.items():
        method, dim = CURVES[name]
        end = record["points"][-1]
        lines.append(
            f"| {dim} | {method} | {record['examples']:,} | {record['fraction']:.3g} | {end['train']:.2f} "
            f"| {end['test']:.2f} | {record['step_size']:g} | {record['images_per_s']:,} |"
        )
    lines += ["", "| claim of the paper | holds |", "|---|---|"]
    lines += [f"| {claim} | {'yes' if holds else 'no'} |" for claim, holds in held.items()]
    write_atomic(options.out / "fig2.md", "\n".join(lines) + "\n")
    write_atomic(options.out / "fig2.json", json.dumps({"curves": records, "claims": held}) + "\n")
    panels = {
        f"$N_z$ = {dim}": {method: records.get(f"{method}-{dim}", {}).get("points", []) for method in METHODS}
        for dim in LATENT_DIMS
    }
    save(bounds_figure(panels, "bound (nats, grey levels)", (-150.0, -95.0)), options.out / "fig2.png")
