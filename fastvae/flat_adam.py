"""Adam in one launch on a GPU: parameters, gradients and moments lie in one buffer each.

The parameters become views of their buffer and stay what they are otherwise. Where a backward writes its gradients to
`gradients`, the step reads them where they are; others are copied there first. The steps are counted on the device, by
the caller where it counts them anyway, see `count_with`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from fastvae.functional import kernel_package
from fastvae.optim import Adam

__all__ = ["FlatAdam", "can_be_flat"]

ALIGNMENT = 8
"""Elements: a matrix begins where a 128-bit access may, in bfloat16 as well. Vectors follow each other closely."""


def can_be_flat(parameters: list[nn.Parameter]) -> bool:
    """Whether there is a kernel for these parameters."""
    device = parameters[0].device
    package, _ = kernel_package(device.type)
    return hasattr(package, "adam_flat_") and all(
        p.dtype == torch.float32 and p.device == device and p.requires_grad and p.is_contiguous() for p in parameters
    )


class FlatAdam(Adam):
    """`Adam` with the same state, for all parameters of a model.

    Attributes:
        parameters: all of them, float32 `[P]`: first those of two or more dimensions, then the vectors.
        gradients: where in the buffer of the gradients that of each parameter belongs; a backward may write there.
    """

    def __init__(self, parameters: list[nn.Parameter], *, lr: Tensor, eps: float, weight_decay: float) -> None:
        super().__init__(parameters, lr=lr, eps=eps, weight_decay=weight_decay)
        self.starts: dict[Tensor, int] = {}
        size = 0
        for parameter in sorted(parameters, key=lambda p: p.ndim < 2):
            self.starts[parameter] = size
            size += parameter.numel() if parameter.ndim < 2 else -(-parameter.numel() // ALIGNMENT) * ALIGNMENT
        # so that each of the four begins where a matrix may; what nothing lies in is 0 and stays 0
        size = -(-size // ALIGNMENT) * ALIGNMENT
        self.parameters, self.gradient, self.exp_avg, self.exp_avg_sq = torch.zeros(4, size, device=lr.device).unbind()
        with torch.no_grad():
            for p, place in self.views(self.parameters).items():
                p.data = place.copy_(p)
        self.gradients = self.views(self.gradient)
        self.taken = torch.zeros(1, dtype=torch.int64, device=lr.device)
        self.counts, self.in_step = True, True
        self._link()

    def views(self, buffer: Tensor) -> dict[Tensor, Tensor]:
        """A buffer `[P]` as tensors of the shapes of the parameters, by parameter."""
        first = buffer.storage_offset()
        return {p: buffer.as_strided(p.shape, p.stride(), first + at) for p, at in self.starts.items()}

    def count_with(self, taken: Tensor) -> None:
        """From now on somebody else counts the steps, in `taken` int64 `[1]` on the device."""
        self.taken, self.counts = taken, False

    def lend_gradients(self) -> None:
        """Make `.grad` of each parameter its place in the buffer, to be overwritten."""
        for p, gradient in self.gradients.items():
            p.grad = gradient

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        package, _ = kernel_package(self.parameters.device.type)
        if closure is not None or any(p.grad is None for p in self.starts) or not hasattr(package, "adam_flat_"):
            # from now on each parameter has taken its own number of steps
            self._publish_steps()
            self.in_step = False
        if not self.in_step:
            return super().step(closure)
        given = [(place, p.grad) for p, place in self.gradients.items()]
        away = [(place, grad) for place, grad in given if grad is not None and grad.data_ptr() != place.data_ptr()]
        if away:
            torch._foreach_copy_([place for place, _ in away], [grad for _, grad in away])
        (group,) = self.param_groups
        package.adam_flat_(
            self.parameters,
            self.gradient,
            self.exp_avg,
            self.exp_avg_sq,
            self.taken,
            group["lr"],
            group["betas"],
            group["eps"],
            group["weight_decay"],
        )
        if self.counts:
            self.taken += 1
        # autograd then still sees a graph of the old values
        torch.autograd.graph.increment_version(list(self.starts))
        return None

    def state_dict(self) -> dict[str, Any]:
        self._publish_steps()
        return super().state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        taken = torch.stack([self.state[p]["step"] for p in self.starts])
        for name, buffer in (("exp_avg", self.exp_avg), ("exp_avg_sq", self.exp_avg_sq)):
            for p, place in self.views(buffer).items():
                place.copy_(self.state[p][name])
        self.in_step = bool((taken == taken[0]).all())
        self.taken.copy_(taken[0])
        self._link()
        self.steps.copy_(taken)

    def _link(self) -> None:
        """Make the state that others see a view of the buffers."""
        self.steps = torch.zeros(len(self.starts), device=self.parameters.device)
        exp_avg, exp_avg_sq = self.views(self.exp_avg), self.views(self.exp_avg_sq)
        for p, step in zip(self.starts, self.steps):
            self.state[p] = {"step": step, "exp_avg": exp_avg[p], "exp_avg_sq": exp_avg_sq[p]}

    def _publish_steps(self) -> None:
        if self.in_step:
            self.steps.copy_(self.taken.expand(len(self.starts)))
