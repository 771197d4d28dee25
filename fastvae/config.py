"""Everything that decides a training run, in one frozen dataclass: the command line and the run directory share it."""

from __future__ import annotations

import dataclasses
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from fastvae.errors import FastvaeError
from fastvae.objectives import check_objective

__all__ = ["TrainConfig"]


@dataclass(frozen=True)
class TrainConfig:
    """Train a variational autoencoder and write a run directory: metrics, checkpoints, model and figures."""

    data: Annotated[str, tyro.conf.Positional] = "digits"
    """digits, mnist, fashion-mnist, kmnist, a folder of IDX files, or an .npy / .npz file."""
    data_dir: Path | None = None
    """Folder that already holds the files of a named data set (default: download into a cache)."""
    out: Path | None = None
    """Run directory to create (default: runs/DATA, numbered when taken)."""

    architecture: Literal["mlp", "conv"] = "mlp"
    """mlp: the paper's; conv: convolutions that halve the image."""
    hidden: tuple[int, ...] = (400,)
    """Widths of the hidden layers (channels for conv), from the data to the latent space."""
    activation: Literal["relu", "tanh"] = "relu"
    """Non-linearity of the hidden layers."""
    latent_dim: int = 20
    """Number of latent dimensions."""
    init: Literal["torch", "normal", "glorot"] = "torch"
    """torch: its default; normal: all parameters from N(0, 0.01), a variance (Kingma & Welling 2013);
    glorot: uniform weights, biases 0 but for the output's, which gives the mean image (Burda et al. 2015)."""
    likelihood: Literal["bernoulli", "gaussian"] = "bernoulli"
    """p(x|z)."""
    binarize: Literal["dynamic", "none"] = "dynamic"
    """Bernoulli only. dynamic: binarised afresh at each step; none: cross-entropy on grey levels, not a likelihood."""
    dequantize: bool = False
    """Gaussian only: add uniform noise below the 8-bit step, so that the density bounds the likelihood."""
    shared_logvar: bool = False
    """Gaussian only: one learned log-variance in place of one per element from the network."""
    logvar_floor: float = -7.0
    """Gaussian only: smooth lower bound of the log-variance; -7 is a standard deviation of 0.03 of the data range."""

    epochs: int = 50
    """Passes over the training data."""
    max_steps: int | None = None
    """Stop after this many steps, whatever the epochs."""
    batch_size: int = 128
    """Examples per step (over all ranks)."""
    optimizer: Literal["adam", "adagrad"] = "adam"
    """Adam, or the paper's Adagrad."""
    adam_eps: float = 1e-8
    """Adam's epsilon, for gradients that are means over the batch."""
    lr: float = 1e-3
    """Learning rate at its peak."""
    lr_schedule: Literal["constant", "cosine", "linear", "iwae"] = "constant"
    """How the learning rate goes from its peak to the end (cosine, linear: to 0; iwae: 3^i epochs at lr 10^(-i/7), i =
    0..7, as in Burda et al. 2015)."""
    lr_warmup_steps: int = 0
    """Steps over which the learning rate rises from 0."""
    objective: Literal["elbo", "iwae", "wake-sleep"] = "elbo"
    """elbo: the paper's; iwae: the importance-weighted bound of --num-samples samples (Burda et al. 2015); wake-sleep:
    the paper's baseline (Hinton et al. 1995)."""
    num_samples: int = 1
    """Samples of z for each example: L of the ELBO, K of IWAE."""
    gradient: Literal["plain", "stl", "dreg"] = "plain"
    """IWAE only. stl: sticking the landing (biased for K > 1); dreg: doubly reparameterized (unbiased, less noise)."""
    kl_estimator: Literal["analytic", "monte-carlo"] = "analytic"
    """ELBO only. The KL in closed form (SGVB estimator B), or from the samples (A)."""
    beta: float = 1.0
    """Weight of the KL (1: the ELBO)."""
    beta_warmup_steps: int = 0
    """Steps over which the KL weight rises from 0 to beta."""
    free_bits: float = 0.0
    """Nats per latent dimension below which the KL is not penalised."""
    weight_decay: float = 0.0
    """Precision of a Gaussian prior on the parameters (1: the paper's N(0, I)); its gradient is divided by N_train."""
    clip_grad_norm: float | None = None
    """Largest 2-norm of the gradient (default: no clipping)."""

    seed: int = 0
    """Decides the initial weights, the order of the examples and all noise."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N (under torchrun each process takes a CUDA device of its own)."""
    data_on: Literal["auto", "device", "host"] = "auto"
    """Where the data is: on the device; on the host, in batches from there; auto: on the device if it takes half."""
    precision: Literal["float32", "tf32", "bf16"] = "float32"
    """Matrix products: float32; float32 through TF32 tensor cores; bfloat16 autocast with float32 weights."""
    cuda_graph: bool = True
    """Record the step once and replay it: as a CUDA graph, or on the CPU as a list of launches."""
    compile: bool = False
    """Run the model through torch.compile inside the step."""
    log_every: int = 100
    """Steps between lines of metrics.jsonl (and reads of the device)."""
    eval_every: int = 1
    """Epochs between evaluations on the test set."""
    checkpoint_every: int | None = None
    """Steps between checkpoints (default: each epoch)."""
    checkpoint_minutes: float | None = None
    """Minutes between checkpoints; with --checkpoint-every whichever comes first, without it instead of each epoch."""
    tensorboard: bool = False
    """Also write TensorBoard event files into the run directory (extra: tensorboard)."""

    def __post_init__(self) -> None:
        positive = ("latent_dim", "epochs", "batch_size", "num_samples", "lr", "adam_eps", "log_every", "eval_every")
        optional = ("max_steps", "clip_grad_norm", "checkpoint_every", "checkpoint_minutes")
        not_negative = ("lr_warmup_steps", "beta", "beta_warmup_steps", "free_bits", "weight_decay", "seed")
        for name in (*positive, *(name for name in optional if getattr(self, name) is not None)):
            if not (math.isfinite(getattr(self, name)) and getattr(self, name) > 0):
                raise FastvaeError(f"{_flag(name)} is {getattr(self, name)}, expected more than 0")
        for name in not_negative:
            if not (math.isfinite(getattr(self, name)) and getattr(self, name) >= 0):
                raise FastvaeError(f"{_flag(name)} is {getattr(self, name)}, expected 0 or more")
        if not all(width > 0 for width in self.hidden):
            raise FastvaeError(f"--hidden is {list(self.hidden)}, expected widths of 1 or more")
        for name in ("dequantize", "shared_logvar"):
            if getattr(self, name) and self.likelihood != "gaussian":
                raise FastvaeError(
                    f"{_flag(name)} belongs to --likelihood gaussian, got --likelihood {self.likelihood}"
                )
        check_objective(**self.objective_settings, beta=self.beta, free_bits=self.free_bits, spell=_flag)
        if self.objective != "elbo" and self.beta_warmup_steps:
            raise FastvaeError(f"--beta-warmup-steps belongs to --objective elbo: {self.objective} has no KL term")
        if self.architecture == "conv" and not self.hidden:
            raise FastvaeError("--hidden is empty, expected at least one number of channels for --architecture conv")

    @property
    def objective_settings(self) -> dict[str, Any]:
        """Those of the loss, as `VAE.forward` takes them; beta and free bits, which only the ELBO has, aside."""
        return {name: getattr(self, name) for name in ("objective", "num_samples", "gradient", "kl_estimator")}

    @property
    def transform(self) -> Literal["scale", "binarize", "dequantize"]:
        """What happens to a batch of data before the model sees it (see `functional.gather_batch`)."""
        if self.likelihood == "bernoulli":
            return "binarize" if self.binarize == "dynamic" else "scale"
        return "dequantize" if self.dequantize else "scale"

    @property
    def nll_label(self) -> str:
        """What the numbers of this run are: only a normalised density of the data is a likelihood."""
        if self.likelihood == "bernoulli" and self.binarize == "none":
            return "cross-entropy on grey levels, not a likelihood"
        return "likelihood of binarised data" if self.likelihood == "bernoulli" else "density of data in [0, 1]"

    def to_json(self) -> str:
        """As a JSON object, a line per field."""
        fields = dataclasses.asdict(self)
        return json.dumps({k: str(v) if isinstance(v, Path) else v for k, v in fields.items()}, indent=2) + "\n"

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> TrainConfig:
        """The inverse of `to_json`; an unknown field is an error, not ignored."""
        unknown = fields.keys() - {field.name for field in dataclasses.fields(cls)}
        if unknown:
            raise FastvaeError(f"unknown settings {', '.join(sorted(unknown))}: written by a newer version?")
        paths = {k: Path(v) for k, v in fields.items() if k in ("data_dir", "out") and v is not None}
        return cls(**{**fields, "hidden": tuple(fields["hidden"]), **paths})


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")
