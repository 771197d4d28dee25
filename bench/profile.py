"""Where a training step's time goes: `python -m bench.profile`.

Runs the trainer's own step on synthetic data under torch.profiler and writes a trace for Perfetto or chrome://tracing,
with the stages of the step as ranges (NVTX ranges as well on CUDA). Where the loss of an MLP is fused, its backward
runs inside the forward. Prints the time of the stages, and of the kernels with their GB/s where the bytes are known:
for this package's kernels, each of their tensors once.

`--kernel NAME` prints the ncu command line that takes one launch of a CUDA kernel apart. The step runs as written,
stage by stage: it is not replayed from a CUDA graph.
"""

from __future__ import annotations

import contextlib
import importlib
import pkgutil
import shlex
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from types import ModuleType
from typing import Any, Literal
from unittest import mock

import torch
import tyro
from torch import Tensor
from torch.profiler import ProfilerActivity, profile, record_function
from torch.utils._pytree import tree_leaves

from bench import records
from bench.tables import markdown
from fastvae import functional as F
from fastvae.config import TrainConfig
from fastvae.step import TrainingStep, make_optimizer, matmul_precision
from fastvae.train import build_model, pick_device

STAGES = ("gather", "model", "loss", "backward", "optimiser")
INSIDE = {"model": "forward and backward", "loss": "in model", "backward": "in model"}


@dataclass(frozen=True)
class Arguments:
    """Profile training steps: a trace, the time of stages and kernels, the ncu command line of a kernel."""

    architecture: Literal["mlp", "conv"] = "mlp"
    """Model."""
    hidden: tuple[int, ...] = (400,)
    """Widths of its hidden layers (channels for conv)."""
    latent_dim: int = 20
    """Number of latent dimensions."""
    likelihood: Literal["bernoulli", "gaussian"] = "bernoulli"
    """p(x|z)."""
    shape: tuple[int, ...] = (28, 28)
    """Shape of one example."""
    batch_size: int = 128
    """Examples per step."""
    precision: Literal["float32", "tf32", "bf16"] = "float32"
    """Of the matrix products."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""
    warmup: int = 10
    """Steps before the profile: compilation, caches."""
    steps: int = 20
    """Steps in the profile."""
    top: int = 20
    """Lines of the table of kernels."""
    out: Path = records.ROOT / "bench" / "results" / "profile.trace.json"
    """The trace."""
    kernel: str | None = None
    """Print the ncu command line for this kernel, e.g. _bernoulli_nll_kernel, and stop."""
    plain: bool = False
    """Only run the steps, between cudaProfilerStart and Stop, for ncu and nsys: no torch.profiler, no trace."""


# bytes of all calls, by the name of a kernel on CUDA, of a function of the kernel package on the CPU
Moved = defaultdict[str, int]


@contextlib.contextmanager
def _range(name: str, cuda: bool) -> Iterator[None]:
    with record_function(name), torch.cuda.nvtx.range(name) if cuda else contextlib.nullcontext():
        yield


def _bytes(tensors: object) -> int:
    """Bytes of all tensors in a nest, elements of expanded dimensions once."""
    total = 0
    for tensor in tree_leaves(tensors):
        if isinstance(tensor, Tensor):
            shape = [n for n, stride in zip(tensor.shape, tensor.stride()) if stride]
            total += torch.Size(shape).numel() * tensor.element_size()
    return total


def _ranged(name: str, function: Callable[..., Any], cuda: bool, moved: Moved | None = None) -> Callable[..., Any]:
    """The function in a range of that name; its tensors' bytes are added up in `moved`."""

    def ranged(*args: Any, **kwargs: Any) -> Any:
        with _range(name, cuda):
            results = function(*args, **kwargs)
        if moved is not None:
            moved[name] += _bytes((args, kwargs, results))
        return results

    return ranged


def _counted_launches(moved: Moved) -> contextlib.AbstractContextManager[object]:
    """Adds up the bytes of the tensors that each Triton kernel is launched with."""
    from triton.runtime.jit import JITFunction

    run = JITFunction.run

    def counted(self: Any, *args: Any, **kwargs: Any) -> Any:
        moved[self.fn.__name__] += _bytes((args, kwargs))
        return run(self, *args, **kwargs)

    return mock.patch.object(JITFunction, "run", counted)


@contextlib.contextmanager
def instrumented(step: TrainingStep) -> Iterator[Moved]:
    """Ranges around the stages of the step and around this package's functions, put on from outside."""
    cuda = step.data.device.type == "cuda"
    moved: Moved = defaultdict(int)
    package, _ = F.choose_backend("bernoulli_nll", torch.empty(1, 1, device=step.data.device))
    inner = {
        "bernoulli_nll_with_grad": "loss",
        "gaussian_nll_with_grad": "loss",
        "linear_bwd": "backward",
        "hidden_bwd": "backward",
        "activation_bwd_": "backward",
    }
    stages: list[tuple[Any, str, str]] = [
        (F, "gather_batch", "gather"),
        (step.model, "write_gradients", "model"),
        *((package, name, stage) for name, stage in inner.items() if package is not None),
        (torch.autograd, "backward", "backward"),
        (step.optimizer, "step", "optimiser"),
    ]
    with contextlib.ExitStack() as patches:
        for owner, attribute, name in stages:
            wrapped = _ranged(name, getattr(owner, attribute), cuda)
            patches.enter_context(mock.patch.object(owner, attribute, wrapped))
        for name in getattr(package, "__all__", ()):
            if name not in ("supports", "philox_words"):
                wrapped = _ranged(f"fastvae::{name}", getattr(package, name), cuda, None if cuda else moved)
                patches.enter_context(mock.patch.object(package, name, wrapped))
        if cuda:
            patches.enter_context(_counted_launches(moved))
        yield moved


def make_step(arguments: Arguments) -> TrainingStep:
    """The trainer's step on random bytes."""
    device = pick_device(arguments.device)
    config = TrainConfig(
        architecture=arguments.architecture,
        hidden=arguments.hidden,
        latent_dim=arguments.latent_dim,
        likelihood=arguments.likelihood,
        batch_size=arguments.batch_size,
        precision=arguments.precision,
    )
    torch.manual_seed(config.seed)
    data = torch.randint(0, 256, (4 * arguments.batch_size, torch.Size(arguments.shape).numel()), dtype=torch.uint8)
    model = build_model(config, arguments.shape).to(device)
    optimizer = make_optimizer(config, list(model.parameters()), len(data))
    step = TrainingStep(config, model, optimizer, data.to(device), arguments.warmup + arguments.steps)
    step.start_epoch(0)
    return step


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def stage_table(events: Any, steps: int, cuda: bool) -> str:
    """Microseconds per step of each stage, the stages inside it included."""
    times = {event.key: event for event in events if event.key in STAGES}
    head = ["stage", "CPU µs per step", *(["device µs per step"] if cuda else [])]
    rows = []
    for name in STAGES:
        event = times.get(name)
        if event is not None:
            own = [event.cpu_time_total, *([event.device_time_total] if cuda else [])]
            what = f"{name} ({INSIDE[name]})" if name in INSIDE else name
            rows.append([what, *(f"{t / steps:,.1f}" for t in own)])
    return markdown(head, rows)


def kernel_table(events: Any, moved: Moved, steps: int, top: int, cuda: bool) -> str:
    """Most time first: kernels on the device if there is one, else operators and this package's functions."""
    if cuda:
        kernels = [e for e in events if e.device_type.name != "CPU" and not e.is_user_annotation]
        times = {e.key: (e, float(e.self_device_time_total)) for e in kernels}
    else:
        # a range of ours stands for all that runs inside it
        times = {e.key: (e, float(e.self_cpu_time_total)) for e in events if e.key not in STAGES}
        times |= {e.key: (e, float(e.cpu_time_total)) for e in events if e.key in moved}
    total = sum(microseconds for _, microseconds in times.values())
    rows = []
    for name, (event, microseconds) in sorted(times.items(), key=lambda item: -item[1][1])[:top]:
        if microseconds:
            speed = f"{moved[name] / microseconds / 1e3:,.1f}" if name in moved else ""
            per_step = f"{microseconds / steps:,.1f}"
            rows.append([name, f"{event.count / steps:.1f}", per_step, f"{microseconds / total:.1%}", speed])
    return markdown(["kernel" if cuda else "operator", "calls per step", "µs per step", "share", "GB/s"], rows)


def kernel_names(package: ModuleType) -> list[str]:
    """The launchable kernels of the Triton package."""
    modules = [importlib.import_module(f"{package.__name__}.{m.name}") for m in pkgutil.iter_modules(package.__path__)]
    return sorted({name for module in modules for name in vars(module) if name.endswith("_kernel")})


def ncu_command(arguments: Arguments) -> str:
    """The command that takes one launch of `arguments.kernel` in a measured step apart.

    Raises:
        ValueError: no such kernel; the message lists those there are.
    """
    import fastvae_kernels

    names = kernel_names(fastvae_kernels)
    if arguments.kernel not in names:
        raise ValueError(f"no kernel {arguments.kernel!r}, expected one of {', '.join(names)}")
    given = ["python", "-m", "bench.profile", "--plain"]
    for option in fields(arguments):
        value = getattr(arguments, option.name)
        if option.name not in ("kernel", "plain", "out", "top") and value != option.default:
            values = value if isinstance(value, tuple) else (value,)
            given += [f"--{option.name.replace('_', '-')}", *map(str, values)]
    ncu = ["ncu", "--set", "full", "--import-source", "yes", "--profile-from-start", "off"]
    ncu += ["--kernel-name-base", "function", "--kernel-name", arguments.kernel, "--launch-count", "1"]
    return shlex.join([*ncu, "--export", f"{arguments.kernel.strip('_')}.ncu-rep", "--force-overwrite", *given])


def run(arguments: Arguments) -> str:
    """Profile as told; returns the report, and writes the trace."""
    step = make_step(arguments)
    device = step.data.device
    cuda = device.type == "cuda"
    with matmul_precision(arguments.precision), instrumented(step) as moved:
        for _ in range(arguments.warmup):
            step()
        _wait(device)
        moved.clear()
        if arguments.plain:
            with torch.cuda.profiler.profile() if cuda else contextlib.nullcontext():
                for _ in range(arguments.steps):
                    step()
                _wait(device)
            return f"{arguments.steps} steps on {device}"
        activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]
        with profile(activities=activities, acc_events=True) as profiler:
            start = time.perf_counter()
            for _ in range(arguments.steps):
                with _range("step", cuda):
                    step()
            _wait(device)
            seconds = time.perf_counter() - start
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    profiler.export_chrome_trace(str(arguments.out))
    events = [event for event in profiler.key_averages() if event.key != "step"]
    _, reason = F.choose_backend("bernoulli_nll", torch.empty(1, 1, device=device))
    per_step = 1e6 * seconds / arguments.steps
    return "\n\n".join(
        [
            f"{torch.cuda.get_device_name(device) if cuda else records.cpu_name()}; {reason}; {per_step:,.0f} µs per "
            f"step of {arguments.batch_size} images, the profiler's own work included",
            stage_table(events, arguments.steps, cuda),
            kernel_table(events, moved, arguments.steps, arguments.top, cuda),
            f"trace: {arguments.out} (open it at https://ui.perfetto.dev or chrome://tracing)",
        ]
    )


def main() -> None:
    """Entry point of `python -m bench.profile`."""
    arguments = tyro.cli(Arguments)
    try:
        print(ncu_command(arguments) if arguments.kernel else run(arguments))
    except ValueError as error:
        raise SystemExit(str(error)) from error


if __name__ == "__main__":
    main()
