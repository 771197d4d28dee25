"""The command line: every command is a function below, its arguments are its options."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated, Literal

import tyro
from tyro.conf import Positional

from fastvae.config import TrainConfig
from fastvae.errors import FastvaeError, RankLost, Stopped

Run = Annotated[Path, tyro.conf.arg(metavar="RUN")]


def train(config: Annotated[TrainConfig, tyro.conf.arg(name="")]) -> None:
    """Train a variational autoencoder and write a run directory: metrics, checkpoints, model and figures."""
    from fastvae.train import train

    train(config)


def resume(run: Positional[Run], *, epochs: int | None = None, max_steps: int | None = None) -> None:
    """Go on with a run from its newest whole checkpoint, exactly as if it had never stopped.

    Args:
        run: the run directory.
        epochs: a new end, in passes over the data.
        max_steps: a new end, in steps.
    """
    from fastvae.train import resume

    changes = {"epochs": epochs, "max_steps": max_steps}
    resume(run, **{name: value for name, value in changes.items() if value is not None})


def evaluate(
    run: Positional[Run], *, num_samples: int | None = None, max_examples: int | None = None, device: str = "auto"
) -> None:
    """Negative ELBO, NLL and KL on train and test data; with --num-samples the log-likelihood by importance sampling.

    Args:
        run: the run directory.
        num_samples: importance samples per example (5000 is usual in the literature).
        max_examples: evaluate only the first so many of each split.
        device: auto, cpu, cuda or cuda:N.
    """
    from fastvae.commands import evaluate

    evaluate(run, num_samples=num_samples, max_examples=max_examples, device=device)


def sample(run: Positional[Run], *, out: Path | None = None, count: int = 100, seed: int = 0) -> None:
    """Draw E[x|z] for z ~ N(0, I): a picture (.png) or the array (.npy).

    Args:
        run: the run directory, or a folder or Hub repository with a model.
        out: where to write (default: samples.png in the run).
        count: how many.
        seed: of the draws.
    """
    from fastvae.commands import sample

    sample(run, out=out, count=count, seed=seed)


def reconstruct(run: Positional[Run], *, out: Path | None = None, count: int = 20) -> None:
    """Draw test examples above their reconstructions.

    Args:
        run: the run directory.
        out: where to write (default: reconstructions.png in the run).
        count: how many.
    """
    from fastvae.commands import reconstruct

    reconstruct(run, out=out, count=count)


def manifold(run: Positional[Run], *, out: Path | None = None, size: int = 20) -> None:
    """Draw the latent plane of a model with two latent dimensions (the paper's Figure 4).

    Args:
        run: the run directory, or a folder or Hub repository with a model.
        out: where to write (default: manifold.png in the run).
        size: pictures per side.
    """
    from fastvae.commands import manifold

    manifold(run, out=out, size=size)


def encode(
    run: Positional[Run], data: Positional[str | None] = None, *, out: Path = Path("latents.npy"), split: str = "test"
) -> None:
    """Write the posterior of each example, float32 [N, 2, L]: mu, then logvar.

    Args:
        run: the run directory.
        data: data set or file (default: the one of the run).
        out: the .npy file to write.
        split: train or test.
    """
    from fastvae.commands import encode

    encode(run, data=data, out=out, split=split)


def reproduce(
    experiment: Positional[Literal["fig2", "fig3", "fig4", "fig5", "table1"]],
    *,
    data: str = "mnist",
    data_dir: Path | None = None,
    out: Path | None = None,
    fraction: float = 1.0,
    passes_to: int = 7,
    only: tuple[str, ...] = (),
    device: str = "auto",
    seed: int = 0,
) -> None:
    """Run an experiment of Kingma & Welling 2013 or of Burda et al. 2015: figure, data and table; goes on where it was.

    Args:
        experiment: which one.
        data: the data set: any that train takes, but the papers' is MNIST.
        data_dir: folder that already holds the files of a named data set.
        out: where to write (default: runs/reproduce/EXPERIMENT).
        fraction: run only so much of the paper's schedule.
        passes_to: table1: the last stage i of its schedule to run, 3^i passes each.
        only: run only these curves, such as aevb-20.
        device: auto, cpu, cuda or cuda:N.
        seed: of everything random.
    """
    from fastvae.reproduce.curves import Options
    from fastvae.reproduce.fig2 import fig2
    from fastvae.reproduce.fig3 import fig3
    from fastvae.reproduce.pictures import fig4, fig5
    from fastvae.reproduce.table1 import table1

    out = out or Path("runs") / "reproduce" / experiment
    options = Options(out, data, data_dir, fraction, passes_to, only, device, seed)
    {"fig2": fig2, "fig3": fig3, "fig4": fig4, "fig5": fig5, "table1": table1}[experiment](options)


def doctor() -> None:
    """Versions, devices, and which backend would run each op here, and why."""
    from fastvae.commands import doctor

    doctor()


def main() -> None:
    """Entry point: a mistake of the user ends with one line and exit code 2. Of many ranks the first one speaks."""
    from fastvae import __version__

    speaks = os.environ.get("RANK", "0") == "0"

    arguments = sys.argv[1:]
    if arguments == ["--version"]:
        print(f"fastvae {__version__}")
        return
    try:
        tyro.extras.subcommand_cli_from_dict(
            {
                "train": train,
                "resume": resume,
                "eval": evaluate,
                "sample": sample,
                "reconstruct": reconstruct,
                "manifold": manifold,
                "encode": encode,
                "reproduce": reproduce,
                "doctor": doctor,
            },
            prog="fastvae",
            description="Variational autoencoders at the speed of the hardware.",
            args=arguments,
        )
    except FastvaeError as error:
        if speaks or isinstance(error, RankLost):
            print(f"fastvae: error: {error}", file=sys.stderr)
        sys.exit(2)
    except Stopped as stopped:
        if speaks:
            print(f"fastvae: {stopped}", file=sys.stderr)
        sys.exit(128 + stopped.signum)
