"""The training step as a graph: after a few eager steps, what one step launched is launched again.

A step is a function of device state alone (see `fastvae.step`), so that replaying what it launched once is taking it
again: step counter, seed, learning rate, KL weight and the order of the examples are read from the device. On CUDA one
launch then takes the place of dozens; on the CPU the arithmetic is all that is left of a small step.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from fastvae.config import TrainConfig
from fastvae.cpu_graph import CPUGraph
from fastvae.functional import kernel_package
from fastvae.step import TrainingStep

__all__ = ["CapturedStep", "RecordedStep", "captured"]

WARM_UP = 3
"""Steps taken eagerly first: kernels are compiled, the optimiser's state and the libraries' workspaces are made."""


GROUP = 8
"""Steps of the second, larger graph: between the launches of two graphs the GPU has nothing to do."""


def captured(step: TrainingStep, config: TrainConfig, say: Callable[[str], None]) -> Callable[[int], int]:
    """What takes steps fastest: at least one and at most as many as it is told, and returns how many it took.

    Where that is no CUDA graph though one was asked for, `say` gets a line on why.
    """
    if not config.cuda_graph:
        return step
    if step.data.device.type == "cpu":
        kernels, _ = kernel_package("cpu")
        # what compiled code, other ranks and Triton's interpreter do cannot be recorded
        unseen = config.compile or step.replica is not None or not (kernels is None or hasattr(kernels, "recorded"))
        return step if unseen else RecordedStep(step)
    if config.optimizer == "adagrad":
        say("no CUDA graph: torch's Adagrad keeps its step counter on the host")
        return step
    if step.replica is not None:
        say("no CUDA graph: the ranks' gradients are averaged outside of one")
        return step
    return CapturedStep(step, say)


class RecordedStep:
    """Calling it takes one step on the CPU: eagerly at first, then by replaying one that was recorded, if it can be."""

    def __init__(self, step: TrainingStep) -> None:
        self.step = step
        self.graph: CPUGraph | None = None
        self.taken = 0

    def __call__(self, most: int = 1) -> int:
        if self.graph is not None:
            self.graph.replay()
        elif self.taken == WARM_UP:
            graph = CPUGraph()
            with graph.record():
                self.step()
            self.graph = graph if graph.refused is None else None
        else:
            self.step()
        self.taken += 1
        return 1


class CapturedStep:
    """Calling it takes a step: eagerly at first, then by replaying a graph; eagerly for good if capture fails.

    It takes `GROUP` steps at once, by a graph of their own, where it may take as many.
    """

    def __init__(self, step: TrainingStep, say: Callable[[str], None]) -> None:
        self.step, self.say = step, say
        self.graph: torch.cuda.CUDAGraph | None = None
        self.group: torch.cuda.CUDAGraph | None = None
        self.taken, self.wants_group = 0, False
        self.stream = torch.cuda.Stream(step.data.device)

    def __call__(self, most: int = 1) -> int:
        if self.taken == WARM_UP:
            self.graph = self._capture(1)
            # a stream has no use for the other one, nor have short epochs or intervals
            self.wants_group = self.graph is not None
        if self.wants_group and most >= GROUP:
            self.wants_group = False
            self.group = self._capture(GROUP)
        count = 1
        if self.group is not None and most >= GROUP:
            self.group.replay()
            count = GROUP
        elif self.graph is not None:
            self.graph.replay()
        elif self.taken < WARM_UP:
            self._on_side_stream()
        else:
            self.step()
        self.taken += count
        return count

    def _on_side_stream(self) -> None:
        current = torch.cuda.current_stream(self.step.data.device)
        self.stream.wait_stream(current)
        with torch.cuda.stream(self.stream):
            self.step()
        current.wait_stream(self.stream)

    def _capture(self, steps: int) -> torch.cuda.CUDAGraph | None:
        """Record steps without taking them."""
        graph = torch.cuda.CUDAGraph()
        # the gradients are then allocated from the graph's own memory
        self.step.optimizer.zero_grad(set_to_none=True)
        try:
            with torch.cuda.graph(graph):
                for _ in range(steps):
                    self.step()
        except RuntimeError as error:
            self.say(f"no CUDA graph: the step cannot be captured ({str(error).splitlines()[0]})")
            return None
        return graph
