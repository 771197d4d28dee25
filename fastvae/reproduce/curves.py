"""A curve of a reproduction: a run of the trainer, taken as far as asked, and the record of what it measured."""

from __future__ import annotations

import dataclasses
import json
import shutil
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import fastvae
from fastvae.checkpoint import write_atomic
from fastvae.config import TrainConfig
from fastvae.errors import FastvaeError
from fastvae.run import Run
from fastvae.train import resume, train

__all__ = ["Options", "choose", "finished", "points", "read_records", "speed", "train_to", "write_record"]

FREE = ("epochs", "max_steps", "eval_every", "device", "data_dir", "out")
"""What may change when a run goes on."""


@dataclass(frozen=True)
class Options:
    """What the command line says of an experiment."""

    out: Path
    data: str = "mnist"
    data_dir: Path | None = None
    fraction: float = 1.0
    passes_to: int = 7
    only: tuple[str, ...] = ()
    device: str = "auto"
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0.0 < self.fraction <= 1.0:
            raise FastvaeError(f"--fraction is {self.fraction}, expected more than 0 and at most 1")


def choose(names: Sequence[str], only: Sequence[str]) -> list[str]:
    """The curves to run: all, or those that `only` names, in its order."""
    if unknown := [name for name in only if name not in names]:
        raise FastvaeError(f"--only is {unknown[0]!r}, expected some of {', '.join(names)}")
    return list(only or names)


def train_to(config: TrainConfig) -> Run:
    """Train as `config` says in `config.out`, or go on with the run that is there to the end that `config` sets."""
    assert config.out is not None
    run = Run(config.out)
    if not run.last.is_file():
        # it ended before its first checkpoint
        if run.config_file.is_file():
            shutil.rmtree(run.path)
        train(config)
        return run
    changes = {name: getattr(config, name) for name in FREE}
    if dataclasses.replace(run.read_config(), **changes) != config:
        raise FastvaeError(f"{run.path} holds a run with other settings: expected another --out, or the same settings")
    resume(run.path, **changes)
    return run


def points(run: Run) -> list[dict[str, float]]:
    """The bound after so many training examples: on the test set, and the mean over the steps since the last point."""
    config, found, train = run.read_config(), [], []
    for row in run.read_metrics():
        if row["split"] == "train":
            train.append(-row["negative_elbo"])
        elif train:
            examples = row["step"] * config.batch_size
            found.append({"examples": examples, "train": sum(train) / len(train), "test": -row["negative_elbo"]})
            train = []
    return found


def speed(run: Run) -> dict[str, float]:
    """Seconds of training (evaluation and saving apart), and examples per second, the median over the rows logged."""
    config = run.read_config()
    rows = [row for row in run.read_metrics() if row["split"] == "train"]
    steps = [row["step"] for row in rows]
    examples = [config.batch_size * (step - before) for step, before in zip(steps, [0, *steps])]
    seconds = sum(count / row["images_per_s"] for count, row in zip(examples, rows))
    # of a machine that had other work in between, the sum says more than the run
    return {"seconds": round(seconds, 1), "images_per_s": round(statistics.median(row["images_per_s"] for row in rows))}


def _record_file(out: Path, name: str) -> Path:
    return out / "curves" / f"{name}.json"


def finished(out: Path, name: str, examples: int) -> bool:
    """Whether the curve is recorded to `examples` training examples or more."""
    path = _record_file(out, name)
    return path.is_file() and json.loads(path.read_text())["examples"] >= examples


def write_record(out: Path, name: str, record: Mapping[str, Any]) -> None:
    """Keep a curve that is whole."""
    path = _record_file(out, name)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, json.dumps({"fastvae_version": fastvae.__version__, **record}, indent=1) + "\n")


def read_records(out: Path, names: Sequence[str]) -> dict[str, dict[str, Any]]:
    """The records there are, in the order of `names`."""
    files = {name: _record_file(out, name) for name in names}
    return {name: json.loads(path.read_text()) for name, path in files.items() if path.is_file()}
