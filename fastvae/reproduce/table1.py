"""Burda, Grosse & Salakhutdinov 2015, Table 1, one stochastic layer: test NLL and active units of VAE and IWAE.

The paper's set-up (Section 5): MNIST, binarised afresh whenever an example is seen; 784-200-200-50 and back, tanh;
minibatches of 20; Adam with beta_1 = 0.9, beta_2 = 0.999, epsilon = 1e-4; 3^i passes at 1e-3 * 10^(-i/7) for i = 0..7,
3280 in all; NLL by 5000 importance samples. Of its published code: Glorot's uniform weights, the output bias at the
mean image, the VAE's KL from the samples, and gradients that are summed over the minibatch where ours are averaged, so
that epsilon becomes 1e-4 / 20.

Not of the paper: the order of the examples is shuffled, all 60,000 are trained on (its code kept 400 back), and the
active units are counted over the test images (its code: 500 of the training images).
"""

from __future__ import annotations

import json
import time
from typing import Any

from fastvae.checkpoint import write_atomic
from fastvae.config import TrainConfig
from fastvae.data import load_dataset
from fastvae.errors import FastvaeError
from fastvae.evaluate import evaluate
from fastvae.models import VAE
from fastvae.reproduce.curves import Options, choose, finished, points, read_records, speed, train_to, write_record
from fastvae.run import Run
from fastvae.step import IWAE_STAGE_ENDS
from fastvae.train import pick_device

__all__ = ["table1"]

PUBLISHED = {
    "vae-1": {"nll": 86.76, "active_units": 19},
    "vae-5": {"nll": 86.47},
    "vae-50": {"nll": 86.35},
    "iwae-5": {"nll": 85.54},
    "iwae-50": {"nll": 84.78, "active_units": 25},
}
"""After the whole schedule. For k = 1 the two objectives are one."""
BAND = 0.5
"""Nats about the published NLL in which a run of the whole schedule is to end: another seed, order and split."""
STAGES = len(IWAE_STAGE_ENDS)
BATCH_SIZE = 20
NUM_SAMPLES = 5000


def paper_config(options: Options, name: str) -> TrainConfig:
    """The paper's training of one row, to the end of the stage that the options name."""
    objective, k = name.split("-")
    how = {"objective": "iwae"} if objective == "iwae" else {"objective": "elbo", "kl_estimator": "monte-carlo"}
    epochs = int(IWAE_STAGE_ENDS[options.passes_to])
    return TrainConfig(
        data=options.data,
        data_dir=options.data_dir,
        out=options.out / "runs" / name,
        hidden=(200, 200),
        activation="tanh",
        latent_dim=50,
        init="glorot",
        num_samples=int(k),
        batch_size=BATCH_SIZE,
        adam_eps=1e-4 / BATCH_SIZE,
        lr_schedule="iwae",
        epochs=epochs,
        eval_every=max(1, epochs // 40),
        checkpoint_every=1000,
        seed=options.seed,
        device=options.device,
        **how,  # type: ignore[arg-type]
    )


def table1(options: Options) -> None:
    """Run the rows, write the table and its data."""
    if options.fraction != 1.0:
        raise FastvaeError("table1 has a schedule of stages: expected --passes-to in place of --fraction")
    if not 0 <= options.passes_to < STAGES:
        raise FastvaeError(f"--passes-to is {options.passes_to}, expected 0 to {STAGES - 1}")
    rows = choose(list(PUBLISHED), options.only)
    num_train = len(load_dataset(options.data, data_dir=options.data_dir).train)
    for name in rows:
        config = paper_config(options, name)
        if not finished(options.out, name, config.epochs * (num_train // BATCH_SIZE * BATCH_SIZE)):
            write_record(options.out, name, row_record(train_to(config)))
        write_result(options)


def row_record(run: Run) -> dict[str, Any]:
    """One row of the table: the model of the run, measured on the whole test set."""
    config = run.read_config()
    dataset = load_dataset(config.data, data_dir=config.data_dir)
    device = pick_device(config.device)
    model = VAE.from_pretrained(run.path).to(device)
    began = time.perf_counter()
    found = evaluate(
        model, dataset.test.to(device), transform=config.transform, seed=config.seed, num_samples=NUM_SAMPLES
    )
    seconds = time.perf_counter() - began
    assert found.log_likelihood is not None
    return {
        "examples": config.epochs * (len(dataset.train) // BATCH_SIZE * BATCH_SIZE),
        "passes": config.epochs,
        "fraction": config.epochs / int(IWAE_STAGE_ENDS[-1]),
        "unit": f"nats per example, {config.nll_label}",
        "nll": -found.log_likelihood,
        "nll_stderr": found.log_likelihood_stderr,
        "effective_sample_size": found.effective_sample_size,
        "importance_samples": NUM_SAMPLES,
        "test_examples": found.num_examples,
        "negative_elbo": found.negative_elbo,
        "kl": found.kl,
        "active_units": found.active_units,
        **speed(run),
        "evaluation_seconds": round(seconds, 1),
        "points": points(run),
    }


def write_result(options: Options) -> None:
    """table1.json and table1.md from the rows that are whole."""
    records = read_records(options.out, list(PUBLISHED))
    lines = [
        "| objective | k | passes | of the schedule | NLL (L5000) | active units | published after all 3280 passes "
        f"| within {BAND} nat of it | test -ELBO | images/s |",
        "|" + "---|" * 10,
    ]
    for name, record in records.items():
        objective, k = name.split("-")
        published = PUBLISHED[name]
        units = f", {published['active_units']} active" if "active_units" in published else ""
        band = "yes" if abs(record["nll"] - published["nll"]) <= BAND else "no"
        lines.append(
            f"| {objective.upper()} | {k} | {record['passes']} | {record['fraction']:.3g} "
            f"| {record['nll']:.2f} ± {record['nll_stderr']:.3f} | {record['active_units']} "
            f"| {published['nll']}{units} | {band} | {record['negative_elbo']:.2f} | {record['images_per_s']:,} |"
        )
    gains = {}
    for k in ("5", "50"):
        a, b = records.get(f"vae-{k}"), records.get(f"iwae-{k}")
        if a and b and a["passes"] == b["passes"]:
            gains[k] = {"passes": a["passes"], "nats": a["nll"] - b["nll"]}
            gains[k]["stderr"] = (a["nll_stderr"] ** 2 + b["nll_stderr"] ** 2) ** 0.5
    lines += [""] if gains else []
    lines += [
        f"At k = {k}, after {gain['passes']} passes each, IWAE is {gain['nats']:.2f} ± "
        f"{gain['stderr']:.3f} nats better than VAE.\n"
        for k, gain in gains.items()
    ]
    write_atomic(options.out / "table1.md", "\n".join(lines) + "\n")
    data = {"rows": records, "published": PUBLISHED, "band": BAND, "iwae_better_by": gains}
    write_atomic(options.out / "table1.json", json.dumps(data) + "\n")
