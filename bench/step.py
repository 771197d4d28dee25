"""Kernels launched and bytes moved by one training step on CUDA, counted without a GPU: `python -m bench.step`.

The trainer's own step runs once on CPU tensors with the Triton backend, its launches recorded as in `bench.static`:

Triton kernels    are compiled for sm_90 and not executed; their bytes are those of the static report, every load and
                  store of every program evaluated, each byte once per instruction that touches it.
PyTorch's own     run on the CPU, seen by a TorchDispatchMode; each is one launch that reads its inputs and writes its
                  outputs once. A matrix product is one launch that reads both operands (and the bias) and writes the
                  result; cuBLAS may split a sum over several blocks and launch a second kernel. `_foreach_` and
                  `_fused_` operators are as many launches as torch's multi_tensor_apply makes for these sizes.

Not counted: copies of a CUDA graph's own, what a cache holds back from memory, and what happens between epochs (the
order of the examples). *least* is each stage's inputs and outputs once, with all elementwise work of hidden layers in
the epilogues of the products. Nothing is timed.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal, NamedTuple
from unittest import mock

import torch
import tyro
from torch import Tensor
from triton import knobs

from bench import records
from bench.static.capture import HostOp, Launch, recording
from bench.static.measure import Traffics
from bench.tables import markdown
from fastvae import functional as F
from fastvae.config import TrainConfig
from fastvae.step import TrainingStep, make_optimizer
from fastvae.train import build_model

__all__ = ["Counted", "count", "least"]

Precision = Literal["float32", "bf16"]
STAGES = ("data", "forward", "loss", "backward", "optimiser", "begin and end", "rest")
INNER = {
    "bernoulli_nll_with_grad": "loss",
    "reparameterize_kl_fwd": "loss",
    "reparameterize_kl_bwd": "backward",
    "linear_bwd": "backward",
    "activation_bwd_": "backward",
    "hidden_bwd": "backward",
    "begin_step": "begin and end",
    "end_step": "begin and end",
}

# launches and MB of Inductor's code for 784-500-20 at batch 4096: from a float32 batch to the gradients, without
# data and optimiser. Source: torch.compile of torch 2.14.1 for a fake sm_90 device, compiled and counted, never run
COMPILED: dict[str, tuple[int, float]] = {"float32": (29, 346.0), "bf16": (42, 215.5)}
COMPILED_STAGES = ("forward", "loss", "backward")


@dataclass(frozen=True)
class Arguments:
    """Count the launches and bytes of a training step on CUDA, without a GPU."""

    precision: tuple[Precision, ...] = ("float32", "bf16")
    """Of the matrix products."""
    hidden: tuple[int, ...] = (500,)
    """Widths of the encoder's hidden layers."""
    latent_dim: int = 20
    """Number of latent dimensions."""
    data_dim: int = 784
    """Pixels of an example."""
    batch_size: int = 4096
    """Examples per step."""
    binarize: Literal["none", "dynamic"] = "none"
    """Grey levels, or pixels drawn at each step."""
    launches: bool = False
    """Also list every launch."""
    out: Path | None = None
    """Also write the counts as JSON lines."""


class Counted(NamedTuple):
    """One launch, or the launches of one operator."""

    stage: str
    name: str
    launches: int
    bytes: int


def _bytes(entry: Launch | HostOp, traffics: Traffics) -> int:
    if isinstance(entry, HostOp):
        return entry.bytes
    names = [name for name, kind in entry.compiled.src.signature.items() if kind != "constexpr"]
    traffic = traffics.of(entry, {name: entry.arguments[name] for name in names})
    return sum(site.unique for site in traffic.sites)


def _mm_out(a: Tensor, b: Tensor, out_dtype: torch.dtype, *, out: Tensor) -> Tensor:
    return out.copy_(a.to(out_dtype) @ b.to(out_dtype))


@contextmanager
def _staged(step: TrainingStep, record: list[Launch | HostOp]) -> Iterator[dict[int, str]]:
    """Stage of each entry of the record by its place there, that of the innermost function that made it."""
    found: dict[int, str] = {}
    kernels, _ = F.kernel_package("cpu")
    stages: list[tuple[Any, str, str]] = [
        (F, "gather_batch", "data"),
        (step.model, "write_gradients", "forward"),
        (torch.Tensor, "backward", "backward"),
        (step.optimizer, "step", "optimiser"),
        (kernels.ColumnSums, "finish", "backward"),
        *((kernels, name, stage) for name, stage in INNER.items()),
    ]

    def staged(function: Callable[..., Any], stage: str) -> Callable[..., Any]:
        def marked(*args: Any, **kwargs: Any) -> Any:
            first = len(record)
            result = function(*args, **kwargs)
            for i in range(first, len(record)):
                found.setdefault(i, stage)
            return result

        return marked

    with ExitStack() as patches:
        for owner, name, stage in stages:
            patches.enter_context(mock.patch.object(owner, name, staged(getattr(owner, name), stage)))
        yield found


def count(arguments: Arguments, precision: Precision) -> list[Counted]:
    """What one step launches, in order."""
    if knobs.runtime.interpret:
        raise SystemExit("TRITON_INTERPRET is set, and an interpreted kernel cannot be compiled: unset it")
    config = TrainConfig(
        hidden=arguments.hidden,
        latent_dim=arguments.latent_dim,
        batch_size=arguments.batch_size,
        binarize=arguments.binarize,
        precision=precision,
    )
    data = torch.zeros(arguments.batch_size, arguments.data_dim, dtype=torch.uint8)
    # of bfloat16 into float32, which CUDA has and the CPU has not
    library = torch.library.Library("aten", "IMPL")
    if not torch._C._dispatch_has_kernel_for_dispatch_key("aten::mm.dtype_out", "CPU"):
        library.impl("mm.dtype_out", _mm_out, "CPU")
    with mock.patch.dict(os.environ, FASTVAE_BACKEND="triton"):
        model = build_model(config, (arguments.data_dim,))
        step = TrainingStep(config, model, make_optimizer(config, list(model.parameters()), len(data)), data, 10)
        step.prepare(0)
        with recording("sm_90"):
            # the first step makes the optimiser's state
            step()
        with recording("sm_90") as record, _staged(step, record) as stages:
            step()
    traffics = Traffics()
    counted = []
    for i, entry in enumerate(record):
        name = entry.kernel if isinstance(entry, Launch) else entry.name
        launches = 1 if isinstance(entry, Launch) else entry.launches
        counted.append(Counted(stages.get(i, "rest"), name, launches, _bytes(entry, traffics)))
    return counted


def least(arguments: Arguments, precision: Precision) -> dict[str, tuple[int, int]]:
    """Launches and bytes by stage that nothing with these matrix products can go below."""
    B, D, L = arguments.batch_size, arguments.data_dim, arguments.latent_dim
    size = 4 if precision == "float32" else 2
    widths = [D, *arguments.hidden, 2 * L], [L, *reversed(arguments.hidden), D]
    layers = [layer for stack in widths for layer in pairwise(stack)]
    weights, biases = sum(i * o for i, o in layers), sum(o for _, o in layers)
    parameters = weights + biases
    forward = sum(B * (i + o) for i, o in layers) + parameters
    # float32 weights are read, and written as what the products take
    cast = 0 if precision == "float32" else (4 + 2) * parameters
    backward = 0
    for stack in widths:
        for number, (i, o) in enumerate(pairwise(stack)):
            # the weight's gradient, in float32; the input's, with the activation at its side unless it is z
            backward += size * B * (i + o) + 4 * (i * o + o)
            if number > 0 or stack[0] == L:
                backward += size * (B * (o + i) + i * o) + (size * B * i if number > 0 else 0)
    latents = size * B * (L + 2 * L + 2 * L)
    loss = size * B * (2 * L + L) + 4 * B + size * B * 3 * D + 4 * B
    return {
        "data": (1, B * D + size * B * D),
        "forward": (len(layers), size * forward),
        "loss": (2, loss),
        "backward": (2 * len(layers) - 1 + 1, backward + latents),
        "optimiser": (1, 7 * 4 * parameters),
        "begin and end": (2, cast),
        "rest": (0, 0),
    }


def _sum(counted: Sequence[Counted], stages: Sequence[str]) -> tuple[int, float]:
    own = [c for c in counted if c.stage in stages]
    return sum(c.launches for c in own), sum(c.bytes for c in own) / 1e6


def _total(floor: dict[str, tuple[int, int]], stages: Sequence[str]) -> tuple[int, float]:
    return sum(floor[s][0] for s in stages), sum(floor[s][1] for s in stages) / 1e6


def table(arguments: Arguments, precision: Precision, counted: Sequence[Counted]) -> str:
    """Launches and MB by stage."""
    floor = least(arguments, precision)
    paper = (arguments.data_dim, arguments.hidden, arguments.latent_dim, arguments.batch_size) == (
        784,
        (500,),
        20,
        4096,
    )
    head = ["stage", "launches", "least", "MB", "least", *(["torch.compile: launches", "MB"] if paper else [])]

    def row(name: str, stages: Sequence[str]) -> list[str]:
        (launches, moved), (few, little) = _sum(counted, stages), _total(floor, stages)
        cells = [name, str(launches), str(few), f"{moved:.1f}", f"{little:.1f}"]
        theirs = COMPILED[precision] if tuple(stages) == COMPILED_STAGES else None
        return cells + ([] if not paper else ["", ""] if theirs is None else [str(theirs[0]), f"{theirs[1]:.1f}"])

    rows = [row(stage, (stage,)) for stage in STAGES]
    rows += [row("forward + loss + backward", COMPILED_STAGES), row("whole step", STAGES)]
    model = "-".join(map(str, (arguments.data_dim, *arguments.hidden, arguments.latent_dim)))
    return f"**{precision}, {model}, batch {arguments.batch_size}**\n\n{markdown(head, rows)}\n"


def run(arguments: Arguments) -> str:
    """Count as told; returns the report."""
    parts, found = [], [records.header("step", asdict(arguments))]
    for precision in arguments.precision:
        counted = count(arguments, precision)
        parts.append(table(arguments, precision, counted))
        if arguments.launches:
            rows = [[c.name, c.stage, str(c.launches), f"{c.bytes / 1e6:.3f}"] for c in counted]
            parts.append(markdown(["kernel or operator", "stage", "launches", "MB"], rows) + "\n")
        found += [{"kind": "launch", "precision": precision, **c._asdict()} for c in counted]
    if arguments.out is not None:
        records.write(arguments.out, found)
    parts.append(
        "Counted, not run. torch.compile's figures: torch 2.14.1 for a fake sm_90 device, compiled and counted;"
    )
    parts.append("they begin with a float32 batch and end with the gradients.")
    return "\n".join(parts)


if __name__ == "__main__":
    print(run(tyro.cli(Arguments)))
