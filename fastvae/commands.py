"""What the commands that use a trained model do; `fastvae.cli` describes them to the user."""

from __future__ import annotations

import dataclasses
import io
import json
import platform
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from fastvae import functional
from fastvae.checkpoint import write_atomic
from fastvae.data import load_dataset
from fastvae.errors import FastvaeError
from fastvae.models import VAE
from fastvae.placement import fits_on
from fastvae.run import Run
from fastvae.stream import HostRows
from fastvae.train import pick_device
from fastvae.versions import library_versions

__all__ = ["doctor", "encode", "evaluate", "manifold", "reconstruct", "sample"]

_console = Console(highlight=False, soft_wrap=True)


def evaluate(path: Path, *, num_samples: int | None, max_examples: int | None, device: str) -> None:
    """Print a table of the run's numbers on train and test, and write them to evaluation.json in the run."""
    from fastvae.evaluate import advice
    from fastvae.evaluate import evaluate as evaluate_model

    for name, value in (("--num-samples", num_samples), ("--max-examples", max_examples)):
        if value is not None and value < 1:
            raise FastvaeError(f"{name} is {value}, expected 1 or more")
    run = Run.open(path)
    config, model = run.read_config(), VAE.from_pretrained(path).to(pick_device(device))
    dataset = load_dataset(config.data, data_dir=config.data_dir)
    where = next(model.parameters()).device
    fits = fits_on(where, dataset.num_bytes)
    results = {
        split: evaluate_model(
            model,
            data[:max_examples].to(where) if fits else HostRows(data[:max_examples], file),
            transform=config.transform,
            seed=config.seed,
            num_samples=num_samples,
        )
        for split, data, file in (
            ("train", dataset.train, dataset.train_file),
            ("test", dataset.test, dataset.test_file),
        )
    }
    table = Table(title=f"{path}: nats per example ({config.nll_label})", title_justify="left")
    table.add_column("")
    for split, result in results.items():
        table.add_column(f"{split} ({result.num_examples:,})", justify="right")

    def row(name: str, cell: str) -> None:
        table.add_row(name, *(cell.format(r=result) for result in results.values()))

    row("negative ELBO", "{r.negative_elbo:.3f}")
    row("NLL (distortion)", "{r.nll:.3f}")
    row("KL (rate)", "{r.kl:.3f}")
    row("bits/dim", "{r.bits_per_dim:.4f}")
    if num_samples is not None:
        # one sample has no spread to tell its error from
        stderr = " ± {r.log_likelihood_stderr:.3f}" if num_samples > 1 else ""
        row(f"log-likelihood, K={num_samples}", "{r.log_likelihood:.3f}" + stderr)
        row("effective sample size", "{r.effective_sample_size:.1f}")
    row(f"active units of {model.latent_dim}", "{r.active_units}")
    table.add_row(
        "KL per dimension", *(f"{min(r.kl_per_dim):.3f} to {max(r.kl_per_dim):.3f}" for r in results.values())
    )
    _console.print(table)
    if hint := advice(results["test"]):
        _console.print(hint)
    numbers = {split: dataclasses.asdict(result) for split, result in results.items()}
    write_atomic(path / "evaluation.json", json.dumps({"nll_label": config.nll_label, **numbers}, indent=2) + "\n")


def sample(path: Path, *, out: Path | None, count: int, seed: int) -> None:
    """Draw `count` samples as a picture or an array."""
    from fastvae import figures

    if count < 1:
        raise FastvaeError(f"--count is {count}, expected 1 or more")
    model = VAE.from_pretrained(path)
    images = model.sample(count, generator=torch.Generator().manual_seed(seed))
    out = out or path / "samples.png"
    if out.suffix == ".npy":
        _write_npy(out, images)
    else:
        figures.save(figures.samples(images), out)
    _console.print(f"wrote {out}")


def reconstruct(path: Path, *, out: Path | None, count: int) -> None:
    """Draw test examples above their reconstructions."""
    from fastvae import figures

    if count < 1:
        raise FastvaeError(f"--count is {count}, expected 1 or more")
    config, model = Run.open(path).read_config(), VAE.from_pretrained(path)
    test = load_dataset(config.data, data_dir=config.data_dir).test[:count]
    x = functional.gather_batch(test, torch.arange(len(test)))
    out = out or path / "reconstructions.png"
    figures.save(figures.reconstructions(x.unflatten(1, model.data_shape), model.reconstruct(x)), out)
    _console.print(f"wrote {out}")


def manifold(path: Path, *, out: Path | None, size: int) -> None:
    """Draw the latent plane."""
    from fastvae import figures

    if size < 1:
        raise FastvaeError(f"--size is {size}, expected 1 or more")
    model = VAE.from_pretrained(path)
    if model.latent_dim != 2:
        raise FastvaeError(f"the model has {model.latent_dim} latent dimensions, a manifold needs --latent-dim 2")
    out = out or path / "manifold.png"
    figures.save(figures.manifold(model, size), out)
    _console.print(f"wrote {out}")


@torch.no_grad()
def encode(path: Path, *, data: str | None, out: Path, split: str) -> None:
    """Write mu and logvar of each example, float32 `[N, 2, L]`."""
    if split not in ("train", "test"):
        raise FastvaeError(f"--split is {split!r}, expected train or test")
    if out.suffix != ".npy":
        raise FastvaeError(f"--out is {out}, expected a name that ends in .npy")
    config, model = Run.open(path).read_config(), VAE.from_pretrained(path).eval()
    dataset = load_dataset(data or config.data, data_dir=config.data_dir if data is None else None)
    if dataset.shape != model.data_shape:
        raise FastvaeError(f"{data} has examples of {list(dataset.shape)}, the model is for {list(model.data_shape)}")
    examples = dataset.train if split == "train" else dataset.test
    latents = [torch.stack(model.encode(batch), dim=1) for batch in examples.split(1000)]
    _write_npy(out, torch.cat(latents))
    _console.print(f"wrote {out}: {len(examples)} x (mu, logvar) x {model.latent_dim}")


def doctor() -> None:
    """Versions, devices, and the backend of each op on each device here, with the reason."""
    for name, version in library_versions().items():
        _console.print(f"{name:16} {version}")
    _console.print(f"{'platform':16} {platform.platform()}")
    devices = [torch.device("cpu")]
    devices += [torch.device("cuda", i) for i in range(torch.cuda.device_count())]
    for device in devices:
        name = (
            torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()
        )
        _console.print(f"{device!s:16} {name}, {torch.get_num_threads()} threads" if device.type == "cpu" else name)
    ops = ("reparameterize_kl", "reparameterize_log_ratio", "bernoulli_nll", "gaussian_nll")
    by_reason: dict[tuple[str, str, str, str], list[str]] = {}
    for device in devices:
        for dtype in (torch.float32, torch.bfloat16, torch.float64):
            for op in ops:
                given = torch.zeros(2, 2, device=device, dtype=dtype)
                package, why = functional.choose_backend(op, *[given] * (3 if op == "gaussian_nll" else 2))
                backend = "reference" if package is None else package.__name__
                by_reason.setdefault((str(device), str(dtype)[6:], backend, why), []).append(op)
    table = Table("device", "dtype", "backend", "ops", "why", box=None)
    for (where, kind, backend, why), names in by_reason.items():
        table.add_row(where, kind, backend, "all" if len(names) == len(ops) else ", ".join(names), why)
    _console.print(table)


def _write_npy(path: Path, array: Tensor) -> None:
    buffer = io.BytesIO()
    np.save(buffer, array.cpu().numpy())
    write_atomic(path, buffer.getvalue())
