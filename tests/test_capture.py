"""The training step as a function of device state: nothing waits for the host, and a graph replays it."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fastvae.capture import GROUP, WARM_UP, CapturedStep, RecordedStep, captured
from fastvae.config import TrainConfig
from fastvae.cpu_graph import LARGEST_BYTES, CPUGraph
from fastvae.step import TrainingStep, make_optimizer
from fastvae.train import build_model

CONFIG = TrainConfig(
    hidden=(16,), latent_dim=3, batch_size=32, lr_schedule="cosine", lr_warmup_steps=4, beta_warmup_steps=50
)
SYNCHRONIZING = {
    "aten::_local_scalar_dense",
    "aten::item",
    "aten::is_nonzero",
    "aten::equal",
    "aten::nonzero",
    "aten::masked_select",
    "aten::_unique2",
    "aten::unique_dim",
    "aten::lift_fresh",
}


def make_step(config: TrainConfig, device: str = "cpu") -> TrainingStep:
    data = torch.randint(0, 256, (320, 12), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)).to(device)
    torch.manual_seed(0)
    model = build_model(config, (3, 4)).to(device)
    step = TrainingStep(config, model, make_optimizer(config, list(model.parameters()), 320), data, 200)
    step.start_epoch(0)
    return step


class NoSynchronization(TorchDispatchMode):
    """Rejects every operator that waits for the device, moves data between host and device, or takes host data in."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name
        assert name not in SYNCHRONIZING, f"{name} waits for the device"
        index = args[1] if name in ("aten::index", "aten::index_put_") else ()
        assert not any(isinstance(i, Tensor) and i.dtype == torch.bool for i in tree_leaves(index)), (
            "a boolean index waits"
        )
        result = func(*args, **(kwargs or {}))
        devices = {t.device for t in tree_leaves((args, kwargs, result)) if isinstance(t, Tensor)}
        assert len(devices) <= 1, f"{name} moves data between {devices}"
        return result


VARIANTS = {
    "binarized": CONFIG,
    "grey levels": dataclasses.replace(CONFIG, binarize="none", activation="tanh"),
    "gaussian": dataclasses.replace(CONFIG, likelihood="gaussian", dequantize=True, clip_grad_norm=1.0),
    "free bits": dataclasses.replace(CONFIG, free_bits=0.1, weight_decay=1.0),
    "bf16": dataclasses.replace(CONFIG, precision="bf16"),
    "samples": dataclasses.replace(CONFIG, num_samples=3, kl_estimator="monte-carlo"),
    "iwae": dataclasses.replace(CONFIG, objective="iwae", num_samples=3, beta_warmup_steps=0),
    "dreg": dataclasses.replace(CONFIG, objective="iwae", num_samples=3, beta_warmup_steps=0, gradient="dreg"),
    "conv": dataclasses.replace(CONFIG, architecture="conv", hidden=(4,), likelihood="gaussian", shared_logvar=True),
}


@pytest.fixture
def triton_path(monkeypatch: pytest.MonkeyPatch) -> None:
    """The step as it runs on a GPU: with the Triton kernels, whose launches are not looked into."""
    monkeypatch.setenv("FASTVAE_BACKEND", "triton")
    from triton.runtime.interpreter import GridExecutor

    call = GridExecutor.__call__

    def hidden(self: Any, *args: Any, **kwargs: Any) -> Any:
        with torch.utils._python_dispatch._disable_current_modes():
            return call(self, *args, **kwargs)

    monkeypatch.setattr(GridExecutor, "__call__", hidden)


@pytest.mark.skipif(torch.cuda.is_available(), reason="on a GPU the capture itself is the test")
@pytest.mark.usefixtures("triton_path")
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_step_never_waits_for_the_host(variant: str) -> None:
    step = make_step(VARIANTS[variant])
    # the first step makes the optimiser's state
    step()
    with NoSynchronization():
        step()
    assert step.step.item() == 2


def test_the_mode_sees_what_it_is_for() -> None:
    x = torch.ones(3)
    for wait in (lambda: x.sum().item(), lambda: x[x > 0], lambda: bool(x.any()), lambda: torch.equal(x, x)):
        with pytest.raises(AssertionError), NoSynchronization():
            wait()
    with pytest.raises(AssertionError, match="moves data"), NoSynchronization():
        x.to("meta")


def test_a_step_on_the_cpu_is_recorded_unless_it_cannot_be_or_must_not() -> None:
    step = make_step(CONFIG)
    assert isinstance(captured(step, CONFIG, print), RecordedStep)
    for config in (dataclasses.replace(CONFIG, cuda_graph=False), dataclasses.replace(CONFIG, compile=True)):
        assert captured(step, config, print) is step


ON_THE_CPU = VARIANTS | {
    "stl": dataclasses.replace(VARIANTS["iwae"], gradient="stl"),
    "wake-sleep": dataclasses.replace(CONFIG, objective="wake-sleep", beta_warmup_steps=0),
    "adagrad": dataclasses.replace(CONFIG, optimizer="adagrad"),
}


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("variant", ON_THE_CPU)
def test_replayed_steps_on_the_cpu_are_eager_steps_bit_for_bit(
    variant: str, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FASTVAE_BACKEND", backend)
    config = ON_THE_CPU[variant]
    graph = RecordedStep(make_step(config))
    assert_replays_are_eager_steps(graph, make_step(config), 40)


@pytest.mark.cuda
@pytest.mark.parametrize("variant", VARIANTS)
def test_100_replayed_steps_are_100_eager_steps_bit_for_bit(variant: str) -> None:
    config = VARIANTS[variant]
    graph = CapturedStep(make_step(config, "cuda"), print)
    assert_replays_are_eager_steps(graph, make_step(config, "cuda"), 100)


@pytest.mark.cuda
@pytest.mark.parametrize("variant", ["binarized", "bf16", "gaussian"])
def test_groups_of_replayed_steps_are_eager_steps_bit_for_bit(variant: str) -> None:
    config = VARIANTS[variant]
    graph, eager = CapturedStep(make_step(config, "cuda"), print), make_step(config, "cuda")
    done, taken = 0, set()
    while done < 100:
        for step in (graph.step, eager):
            step.prepare(done)
        count = graph(graph.step.ahead(done))
        for _ in range(count):
            eager()
        taken.add(count)
        done += count
    assert taken == {1, GROUP}
    assert torch.equal(graph.step.metrics, eager.metrics)
    for a, b in zip(graph.step.model.parameters(), eager.model.parameters()):
        assert torch.equal(a, b)


def assert_replays_are_eager_steps(graph: CapturedStep | RecordedStep, eager: TrainingStep, steps: int) -> None:
    """Learning rate and KL weight change at every step, the order at every epoch."""
    for number in range(steps):
        if number % 10 == 0:
            eager.start_epoch(number // 10)
            graph.step.start_epoch(number // 10)
        eager()
        graph()
    assert graph.graph is not None
    assert int(graph.step.step) == int(eager.step) == steps
    assert torch.equal(graph.step.metrics, eager.metrics)
    for a, b in zip(graph.step.model.parameters(), eager.model.parameters()):
        assert torch.equal(a, b)


def test_a_step_that_cannot_be_replayed_is_taken_eagerly() -> None:
    step = make_step(dataclasses.replace(CONFIG, free_bits=0.1))
    step.model.encoder.register_forward_hook(lambda *_: step.metrics.sum().item() * 0 or None)
    recorded = RecordedStep(step)
    for _ in range(WARM_UP + 2):
        recorded()
    assert recorded.graph is None
    assert int(step.step) == WARM_UP + 2


def test_what_a_graph_of_the_cpu_refuses() -> None:
    x = torch.ones(3)
    for work, reason in (
        (lambda: x.sum().item(), "_local_scalar_dense reads a value on the host"),
        (lambda: torch.empty(LARGEST_BYTES + 1, dtype=torch.uint8), "empty makes a tensor of more than 4 MiB"),
    ):
        graph = CPUGraph()
        with graph.record():
            work()
        assert reason in str(graph.refused)


def test_a_graph_of_the_cpu_reads_what_is_there_when_it_is_replayed() -> None:
    x, total = torch.ones(3), torch.zeros(())
    graph = CPUGraph()
    with graph.record():
        low, high = torch.aminmax(x * 2)
        total += low + high + x[1:].sum()
    assert total == 6.0
    x.copy_(torch.tensor([1.0, 2.0, 5.0]))
    graph.replay()
    assert total == 6.0 + (2.0 + 10.0 + 7.0)


@pytest.mark.cuda
def test_a_step_that_waits_falls_back_to_eager_and_says_why() -> None:
    step = make_step(CONFIG, "cuda")
    step.model.register_forward_hook(lambda *_: float(step.metrics.sum()) and None)
    said: list[str] = []
    graph = CapturedStep(step, said.append)
    for _ in range(WARM_UP + 2):
        graph()
    assert graph.graph is None
    assert "cannot be captured" in said[0]
    assert int(step.step) == WARM_UP + 2


@pytest.mark.cuda
def test_adagrad_is_not_captured_and_says_why() -> None:
    config = dataclasses.replace(CONFIG, optimizer="adagrad")
    step = make_step(config, "cuda")
    said: list[str] = []
    assert captured(step, config, said.append) is step
    assert "Adagrad" in said[0]


@pytest.mark.cuda
def test_launches_go_to_the_tensors_device_and_the_current_stream() -> None:
    from fastvae import functional as F
    from fastvae import reference

    device = torch.device("cuda", torch.cuda.device_count() - 1)
    mu, logvar = torch.randn(2, 64, 20, device=device).unbind()
    stream = torch.cuda.Stream(device)
    with torch.cuda.device(0):
        torch.cuda.synchronize(device)
        with torch.cuda.stream(stream):
            torch.cuda._sleep(10_000_000)
            mu = mu + 1
            kl = F.kl_standard_normal(mu, logvar)
        stream.synchronize()
    torch.testing.assert_close(kl, reference.kl_standard_normal(mu, logvar))
