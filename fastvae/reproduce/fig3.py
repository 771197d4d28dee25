"""Kingma & Welling 2013, Figure 3: marginal log-likelihood against the number of training examples, for small and large
training sets, by AEVB, wake-sleep and Monte Carlo EM.

The paper's set-up (Section 5, Appendices D and E): MNIST, 100 hidden tanh units, 3 latent dimensions, the first 1000 or
50,000 training images; log p(x) of the first 1000 training and test images by `fastvae.marginal`, 50 draws with 4
leapfrog steps; all else as for Figure 2. The count is of examples in updates of the weights, also for Monte Carlo EM,
which updates 5 times on each minibatch.
"""

from __future__ import annotations

import dataclasses
import io
import json
import math
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fastvae import functional as F
from fastvae.checkpoint import write_atomic
from fastvae.config import TrainConfig
from fastvae.data import Dataset, load_dataset
from fastvae.errors import FastvaeError
from fastvae.figures import save
from fastvae.initial import initialize
from fastvae.marginal import marginal_log_likelihood
from fastvae.models import VAE
from fastvae.reproduce.curves import Options, choose, finished, read_records, write_record
from fastvae.reproduce.fig2 import METHODS, PILOT_STEPS, STEP_SIZES, paper_config, train_with_best_step_size
from fastvae.reproduce.mcem import UPDATES, MonteCarloEM
from fastvae.reproduce.plots import bounds_figure
from fastvae.train import build_model, pick_device

__all__ = ["fig3"]

NUM_TRAIN = (1000, 50_000)
EXAMPLES = 6 * 10**7
POINTS = (*(10**5 * 2**i for i in range(10)), EXAMPLES)
"""Training examples after which the likelihood is estimated."""
NUM_ESTIMATED = 1000
CURVES = {f"{method}-{n}": (method, n) for n in NUM_TRAIN for method in (*METHODS, "mcem")}


def fig3(options: Options) -> None:
    """Run the curves, write the figure and its data."""
    dataset = load_dataset(options.data, data_dir=options.data_dir)
    names = choose(list(CURVES), options.only)
    for name in names:
        if CURVES[name][1] > len(dataset.train):
            needed, there = CURVES[name][1], len(dataset.train)
            raise FastvaeError(f"{name} needs {needed} training examples, {options.data} has {there}")
    end = options.fraction * EXAMPLES
    goals = [point for point in POINTS if point <= end] or [max(100, round(end / 100) * 100)]
    for name in names:
        if not finished(options.out, name, goals[-1]):
            _curve(options, name, dataset, goals)
        write_result(options)


def _curve(options: Options, name: str, dataset: Dataset, goals: list[int]) -> None:
    """Take a curve from where its record ends to the last of `goals`."""
    method, num_train = CURVES[name]
    part = dataclasses.replace(dataset, train=dataset.train[:num_train])
    record = read_records(options.out, [name]).get(name, {"examples": 0, "seconds": 0.0, "points": []})
    for goal in goals:
        if goal <= record["examples"]:
            continue
        began = time.perf_counter()
        model = (_mcem if method == "mcem" else _trained)(options, name, part, goal)
        record["seconds"] += time.perf_counter() - began
        point: dict[str, float] = {"examples": goal}
        for split, data in (("train", part.train), ("test", part.test)):
            value, stderr, acceptance = estimate(model, data[:NUM_ESTIMATED], options.seed)
            point |= {split: value, f"{split}_stderr": stderr, f"{split}_acceptance": acceptance}
        record["points"].append(point)
        record |= {"examples": goal, "fraction": goal / EXAMPLES, "images_per_s": round(goal / record["seconds"])}
        record["unit"] = f"nats per example, {_config(options, name).nll_label}"
        write_record(options.out, name, record)


def estimate(model: VAE, data: Tensor, seed: int) -> tuple[float, float, float]:
    """Mean of log p(x) by the paper's estimator, its standard error, and the share of accepted transitions."""
    device = next(model.parameters()).device
    found = []
    for start in range(0, len(data), 500):
        batch = data[start : start + 500].to(device)
        x = F.gather_batch(batch, torch.arange(len(batch), device=device))
        key = torch.tensor([seed], device=device)
        found.append(marginal_log_likelihood(model, x, seed=key, num_chains=5, num_samples=50, example_offset=start))
    value, stderr, acceptance = (torch.cat(parts) for parts in zip(*found))
    return float(value.mean()), float(stderr.square().sum().sqrt() / len(data)), float(acceptance.mean())


def _config(options: Options, name: str) -> TrainConfig:
    method, _ = CURVES[name]
    config = paper_config(options, method="aevb" if method == "mcem" else method, latent_dim=3, hidden=100)
    # an epoch of 1000 examples is 10 steps
    return dataclasses.replace(config, eval_every=10**6, checkpoint_every=2000)


def _trained(options: Options, name: str, part: Dataset, goal: int) -> VAE:
    """The model after `goal` training examples by the trainer."""
    file = options.out / "data" / f"{Path(part.name).stem}-{len(part.train)}.npz"
    if not file.is_file():
        file.parent.mkdir(parents=True, exist_ok=True)
        train, test = (x.reshape(-1, *part.shape).numpy() for x in (part.train, part.test))
        buffer = io.BytesIO()
        np.savez(buffer, train=train, test=test)
        write_atomic(file, buffer.getvalue())
    config = dataclasses.replace(_config(options, name), data=str(file.resolve()), data_dir=None)
    steps = goal // config.batch_size
    epochs = math.ceil(steps / (len(part.train) // config.batch_size))
    config = dataclasses.replace(config, out=options.out / "runs" / name, epochs=epochs, max_steps=steps)
    return VAE.from_pretrained(train_with_best_step_size(config, part).path)


def _mcem(options: Options, name: str, part: Dataset, goal: int) -> VAE:
    """The model after `goal` training examples by Monte Carlo EM, its step of Adagrad the best over the first steps."""
    device = pick_device(options.device)
    data = part.train.to(device)

    def start(lr: float) -> MonteCarloEM:
        torch.manual_seed(options.seed)
        config = dataclasses.replace(_config(options, name), lr=lr)
        model = build_model(config, part.shape)
        initialize(model, config.init, part.train)
        return MonteCarloEM(config, model.to(device), data)

    folder = options.out / "runs" / name
    folder.mkdir(parents=True, exist_ok=True)
    choice = folder / "step.json"
    if not choice.is_file():
        reached = {}
        for lr in STEP_SIZES:
            em = start(lr)
            _advance(em, PILOT_STEPS // UPDATES, lambda: None)
            reached[lr] = float(em.nll.nan_to_num(nan=math.inf))
        write_atomic(choice, json.dumps(min(reached, key=lambda lr: reached[lr])) + "\n")
    em = start(float(json.loads(choice.read_text())))
    checkpoint = folder / "last.safetensors"
    if checkpoint.is_file():
        em.load(checkpoint)
    _advance(em, goal // (em.config.batch_size * UPDATES), lambda: em.save(checkpoint))
    em.save(checkpoint)
    return em.model


def _advance(em: MonteCarloEM, batches: int, checkpoint: Callable[[], None]) -> None:
    while em.batches < batches:
        em()
        if em.batches % 2000 == 0:
            checkpoint()


def write_result(options: Options) -> None:
    """fig3.json, fig3.png and fig3.md from the curves there are."""
    records = read_records(options.out, list(CURVES))
    lines = ["| N_train | method | examples | fraction of the paper's | train | test | images/s |", "|" + "---|" * 7]
    for name, record in records.items():
        method, num_train = CURVES[name]
        end = record["points"][-1]
        train, test = (f"{end[s]:.2f} \N{PLUS-MINUS SIGN} {end[f'{s}_stderr']:.2f}" for s in ("train", "test"))
        lines.append(
            f"| {num_train:,} | {method} | {record['examples']:,} | {record['fraction']:.3g} | {train} | {test} "
            f"| {record['images_per_s']:,} |"
        )
    write_atomic(options.out / "fig3.md", "\n".join(lines) + "\n")
    write_atomic(options.out / "fig3.json", json.dumps({"curves": records}) + "\n")
    panels = {
        f"$N_{{train}}$ = {n:,}": {
            method: records.get(f"{method}-{n}", {}).get("points", []) for method in (*METHODS, "mcem")
        }
        for n in NUM_TRAIN
    }
    save(
        bounds_figure(panels, "marginal log-likelihood (nats, grey levels)", (-160.0, -100.0)), options.out / "fig3.png"
    )
