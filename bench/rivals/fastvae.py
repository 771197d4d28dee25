"""This trainer's step, built and called as `fastvae train` does, metrics read every `log_every` steps."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch

from bench.rivals import Work
from bench.rivals._torch_model import wait
from fastvae import functional as F
from fastvae.capture import captured
from fastvae.config import TrainConfig
from fastvae.evaluate import evaluate
from fastvae.step import TrainingStep, make_optimizer
from fastvae.train import build_model

REQUIRES = ("torch",)

# more steps than any run of the benchmark: the schedules are tables of this length
MOST_STEPS = 1_000_000

# what the forward calls, the gradients of a fused loss among it
INNER = {
    "bernoulli_nll_with_grad": "loss",
    "reparameterize_kl_fwd": "loss",
    "reparameterize_kl_bwd": "loss",
    "linear_bwd": "backward",
    "hidden_bwd": "backward",
    "activation_bwd_": "backward",
}


class Provider:
    def __init__(self, work: Work) -> None:
        torch.set_num_threads(work.threads)
        torch.manual_seed(0)
        self.train, self.test = (torch.from_numpy(work.load(split)).to(work.device) for split in ("train", "test"))
        self.config = TrainConfig(
            hidden=work.hidden,
            latent_dim=work.latent_dim,
            batch_size=work.batch_size,
            binarize="dynamic" if work.binarize == "dynamic" else "none",
            lr=work.lr,
            device=work.device,
        )
        self.model = build_model(self.config, (self.train.shape[1],)).to(work.device)
        optimizer = make_optimizer(self.config, list(self.model.parameters()), len(self.train))
        self.step = TrainingStep(self.config, self.model, optimizer, self.train, MOST_STEPS)
        self.take_step = captured(self.step, self.config, print)
        self.done = 0

    def run(self, steps: int) -> None:
        for _ in range(steps):
            if self.done % self.step.steps_per_epoch == 0:
                self.step.start_epoch(self.done // self.step.steps_per_epoch)
            self.take_step(1)
            self.done += 1
            if self.done % self.config.log_every == 0:
                self.step.metrics.double().mean(0).tolist()
        wait(self.config.device)

    def test_negative_elbo(self) -> float:
        return evaluate(self.model, self.test, transform=self.config.transform, seed=0).negative_elbo

    def breakdown(self) -> dict[str, float]:
        """Seconds of one eager step by stage, each without the stages inside it; what is left over is `rest`."""
        self.take_step = self.step
        kernels, _ = F.choose_backend("bernoulli_nll", torch.zeros(1, 1))
        stages = [
            (F, "gather_batch", "data"),
            (self.model, "write_gradients", "forward"),
            (torch.Tensor, "backward", "backward"),
            (self.step.optimizer, "step", "optimiser"),
            *((kernels, name, stage) for name, stage in INNER.items() if kernels is not None),
        ]
        steps = 200 if self.config.batch_size < 1000 else 5
        with timed(stages) as seconds:
            start = time.perf_counter()
            self.run(steps)
            total = time.perf_counter() - start
        names = ("data", "forward", "loss", "backward", "optimiser")
        per_step = {name: seconds[name] / steps for name in names}
        return per_step | {"rest": total / steps - sum(per_step.values())}


@contextmanager
def timed(stages: list[tuple[Any, str, str]]) -> Iterator[dict[str, float]]:
    """Own time of these functions, given as (object, attribute, stage), while the block runs."""
    seconds: defaultdict[str, float] = defaultdict(float)
    inside: list[float] = []

    def wrap(function: Callable[..., Any], stage: str) -> Callable[..., Any]:
        def measured(*args: Any, **kwargs: Any) -> Any:
            inside.append(0.0)
            start = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                taken = time.perf_counter() - start
                seconds[stage] += taken - inside.pop()
                if inside:
                    inside[-1] += taken

        return measured

    with ExitStack() as patches:
        for owner, name, stage in stages:
            patches.enter_context(mock.patch.object(owner, name, wrap(getattr(owner, name), stage)))
        yield seconds
