"""Images per second of training, side by side: `python -m bench.train`.

Every provider of `bench.rivals` does the same work in a process of its own. They are started, warmed up, and then take
turns in rounds, so that whatever else the machine does falls on all of them; each figure is a median over rounds, and
the share of the floor is the median of the ratios within a round. bench/README.md says how to read the table.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import tyro

from bench import records
from bench.records import Record
from bench.rivals import FLOOR, PROVIDERS, Work
from bench.tables import throughput_tables
from bench.worker import Worker, WorkerError, busy_core

MODELS = {"784-400-20": ((400,), 20), "784-1024-1024-64": ((1024, 1024), 64)}
Condition = Literal["one", "two", "two+busy", "gpu"]


@dataclass(frozen=True)
class Arguments:
    """Images per second of training against rivals, each in its own process, interleaved."""

    models: tuple[Literal["784-400-20", "784-1024-1024-64"], ...] = ("784-400-20", "784-1024-1024-64")
    """Data, hidden and latent widths; other data has its own width."""
    batch_sizes: tuple[int, ...] = (128, 4096)
    """Examples per step."""
    conditions: tuple[Condition, ...] = ("one", "two", "two+busy")
    """Threads: one; two; two while another process keeps one core busy. On CUDA there is one condition, gpu."""
    device: Literal["cpu", "cuda"] = "cpu"
    """Where."""
    providers: tuple[str, ...] = tuple(PROVIDERS)
    """Who runs; the ones that are not installed are skipped by name."""
    rivals_python: Path | None = None
    """Python of another environment, tried for providers that are not installed in this one."""
    binarize: Literal["none", "dynamic"] = "none"
    """none: grey levels, as the torch example; dynamic: Bernoulli draws at each step."""
    data: str = "synthetic"
    """synthetic (throughput does not depend on the values), or a data set as `fastvae train` takes it."""
    data_dir: Path | None = None
    """Folder that holds the files of a named data set; implies --data mnist."""
    seconds: float = 30.0
    """Time for the rounds of one setting, all providers together."""
    slice_seconds: float = 0.5
    """Length of a provider's turn (at least one step)."""
    target: float | None = None
    """Also: time until the test negative ELBO is at most this, in nats (real data; turns of one epoch)."""
    max_epochs: int = 30
    """With --target: give up after so many."""
    quick: bool = False
    """A few seconds in all, to see that it works: small, one setting, figures mean nothing."""
    out: Path | None = None
    """Result file (default: a new one in bench/results)."""


def _prepare_data(arguments: Arguments, folder: Path) -> None:
    if arguments.data == "synthetic" and arguments.data_dir is None:
        rng = np.random.default_rng(0)
        sizes = {"train": 2_000, "test": 1_000} if arguments.quick else {"train": 60_000, "test": 10_000}
        splits = {name: rng.integers(0, 256, (n, 784), dtype=np.uint8) for name, n in sizes.items()}
    else:
        from fastvae.data import load_dataset

        name = "mnist" if arguments.data == "synthetic" else arguments.data
        dataset = load_dataset(name, data_dir=arguments.data_dir)
        splits = {"train": dataset.train.numpy(), "test": dataset.test.numpy()}
    for name, examples in splits.items():
        np.save(folder / f"{name}.npy", examples)


@dataclass
class Started:
    """A provider that is warm."""

    name: str
    worker: Worker
    ready: dict[str, Any]


def _start(arguments: Arguments, work: Work) -> tuple[list[Started], list[Record]]:
    """Start all providers, warm; and a record for each that cannot run."""
    started: dict[str, Started] = {}
    reasons: dict[str, str] = {}
    for python in (sys.executable, arguments.rivals_python):
        if python is None:
            continue
        # all at once: what takes long, compilation, then has company that does not
        workers = {
            name: Worker(
                ["-m", "bench.rivals", name, json.dumps(asdict(work))], threads=work.threads, python=str(python)
            )
            for name in arguments.providers
            if name not in started
        }
        for name, worker in workers.items():
            ready = worker.wait_ready()
            if isinstance(ready, WorkerError):
                worker.close()
                # the rivals' own environment has the last word
                reasons[name] = str(ready)
            else:
                started[name] = Started(name, worker, ready)
    in_order = [started[name] for name in arguments.providers if name in started]
    return in_order, [_skipped(name, reason) for name, reason in reasons.items() if name not in started]


def _skipped(name: str, reason: str) -> Record:
    return {"kind": "skipped", "provider": name, "reason": reason}


def _rounds(started: list[Started], arguments: Arguments, lost: list[Record]) -> list[dict[str, float]]:
    """Steps per second of every provider in each round; whoever dies moves from `started` to `lost`."""
    rounds: list[dict[str, float]] = []
    deadline = time.perf_counter() + arguments.seconds
    fewest = 2 if arguments.quick else 3
    while started and (len(rounds) < fewest or time.perf_counter() < deadline):
        # a different one goes first each time: nobody always runs after the same neighbour
        first = len(rounds) % len(started)
        rates = {}
        for provider in started[first:] + started[:first]:
            rate = _turn(provider, arguments.slice_seconds)
            if isinstance(rate, WorkerError):
                provider.worker.close()
                started.remove(provider)
                lost.append(_skipped(provider.name, f"died: {rate}"))
            else:
                rates[provider.name] = rate
        rounds.append(rates)
    return rounds


def _quartiles(values: list[float]) -> list[float]:
    return statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else [values[0]] * 3


def _turn(provider: Started, seconds: float) -> float | WorkerError:
    try:
        answer = provider.worker.call(do="run", seconds=seconds)
    except WorkerError as error:
        return error
    return float(answer["steps"] / answer["seconds"])


def _summary(setting: Record, provider: Started, rounds: list[dict[str, float]]) -> Record:
    rates = [r[provider.name] * setting["batch_size"] for r in rounds]
    # paired: what slowed a round slowed its floor as well
    shares = [r[provider.name] / r[FLOOR] for r in rounds] if all(FLOOR in r for r in rounds) else None
    return {
        "kind": "throughput",
        **setting,
        "provider": provider.name,
        "images_per_s": _quartiles(rates),
        "of_floor": None if shares is None else _quartiles(shares),
        "rounds": len(rounds),
        "versions": provider.ready["versions"],
        "ready_s": provider.ready["ready_s"],
    }


def _race(started: list[Started], setting: Record, arguments: Arguments) -> list[Record]:
    """Epoch by epoch in turns, until each has reached the target; the time of the tests does not count."""
    assert arguments.target is not None
    racing = {p.name: p for p in started if p.name != FLOOR}
    for provider in racing.values():
        provider.worker.call(do="restart")
    seconds = dict.fromkeys(racing, 0.0)
    out: list[Record] = []
    for epoch in range(1, arguments.max_epochs + 1):
        for name, provider in [*racing.items()]:
            try:
                answer = provider.worker.call(do="epoch")
            except WorkerError as error:
                out.append(_skipped(name, f"--target: {error}") | setting)
                del racing[name]
                continue
            seconds[name] += answer["seconds"]
            reached = answer["negative_elbo"] <= arguments.target
            if reached or epoch == arguments.max_epochs:
                result = {"reached": reached, "seconds": seconds[name], "epochs": epoch}
                result |= {"target": arguments.target, "negative_elbo": answer["negative_elbo"]}
                out.append({"kind": "target", **setting, "provider": name, **result})
                del racing[name]
    return out


def measure(arguments: Arguments, work: Work, conditions: Sequence[Condition]) -> list[Record]:
    """All conditions of one model, batch size and number of threads, with the same processes."""
    widths = (work.load("test").shape[1], *work.hidden, work.latent_dim)
    setting = {
        "model": "-".join(map(str, widths)),
        "batch_size": work.batch_size,
        "binarize": work.binarize,
        "threads": work.threads,
    }
    started, lost = _start(arguments, work)
    try:
        if not started:
            return [record | setting for record in lost]
        throughput = []
        for condition in conditions:
            # the last core: the one a lone thread would have been given
            busy = busy_core((os.cpu_count() or 1) - 1) if condition == "two+busy" else contextlib.nullcontext()
            with busy:
                rounds = _rounds(started, arguments, lost)
            throughput += [_summary(setting | {"condition": condition}, p, rounds) for p in started]
        finished = {p.name: p.worker.call(do="finish") for p in started}
        for record in throughput:
            # nothing of one that died in a later condition
            record |= finished.get(record["provider"], {"peak_mb": None, "breakdown": None})
            if record["condition"] != conditions[0]:
                # it was taken once, with nobody else on the machine
                record["breakdown"] = None
        if arguments.target is not None:
            throughput += _race(started, setting | {"condition": conditions[0]}, arguments)
    finally:
        for provider in started:
            provider.worker.close()
    return throughput + [record | setting for record in lost]


def run(arguments: Arguments, path: Path) -> None:
    """Measure all settings; print each and add it to the result file when it is done."""
    gpu = records.gpu_name(arguments.device)
    out = [records.header("train", asdict(arguments), gpu=gpu)]
    with tempfile.TemporaryDirectory() as folder:
        _prepare_data(arguments, Path(folder))
        for model, batch_size, threads in itertools.product(arguments.models, arguments.batch_sizes, (1, 2)):
            conditions = [c for c in arguments.conditions if c.startswith("two") == (threads == 2)]
            if conditions:
                hidden, latent_dim = MODELS[model]
                work = Work(hidden, latent_dim, batch_size, arguments.binarize, threads, arguments.device, folder)
                found = measure(arguments, work, conditions)
                print(throughput_tables(found), flush=True)
                out += found
                records.write(path, out)
    print(f"wrote {path}")


def check(arguments: Arguments) -> None:
    unknown = set(arguments.providers) - PROVIDERS.keys()
    if unknown:
        raise SystemExit(f"unknown providers {', '.join(sorted(unknown))}: expected some of {', '.join(PROVIDERS)}")
    if arguments.target is not None and arguments.data == "synthetic" and arguments.data_dir is None:
        raise SystemExit("--target needs real data: --data or --data-dir")


def main() -> None:
    """Entry point of `python -m bench.train`."""
    arguments = tyro.cli(Arguments)
    check(arguments)
    if arguments.device == "cuda":
        arguments = replace(arguments, conditions=("gpu",))
    if arguments.quick:
        arguments = replace(
            arguments,
            models=("784-400-20",),
            batch_sizes=(128,),
            conditions=arguments.conditions[:1],
            seconds=0.5,
            slice_seconds=0.1,
        )
    run(arguments, arguments.out or records.default_path("train", arguments.device))


if __name__ == "__main__":
    main()
