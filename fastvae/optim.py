"""Adam whose step on the CPU is one pass over the memory of all parameters; on other devices torch's fused one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastvae.functional import kernel_package

__all__ = ["Adam"]


class Adam(torch.optim.Adam):
    """`torch.optim.Adam(..., fused=True)`, with the same state: step, exp_avg and exp_avg_sq of each parameter."""

    def __init__(
        self, parameters: list[torch.nn.Parameter], *, lr: Tensor, eps: float = 1e-8, weight_decay: float = 0.0
    ) -> None:
        on_gpu = lr.device.type == "cuda"
        super().__init__(parameters, lr=lr, eps=eps, weight_decay=weight_decay, fused=True, capturable=on_gpu)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        tensors = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
        package, _ = kernel_package(tensors[0].device.type) if tensors else (None, "")
        plain = all(_is_plain(p) and _is_plain(p.grad) and p.stride() == p.grad.stride() for p in tensors)
        plain = plain and all(isinstance(group["lr"], Tensor) and _is_plain(group["lr"]) for group in self.param_groups)
        if closure is not None or package is None or not plain or not hasattr(package, "adam_"):
            return super().step(closure)
        for group in self.param_groups:
            wanted = [p for p in group["params"] if p.grad is not None]
            states = [self._state_of(p) for p in wanted]
            moments = ([state[name] for state in states] for name in ("exp_avg", "exp_avg_sq", "step"))
            package.adam_(
                wanted,
                [p.grad for p in wanted],
                *moments,
                group["lr"],
                group["betas"],
                group["eps"],
                group["weight_decay"],
            )
            # autograd then still sees a graph of the old values
            torch.autograd.graph.increment_version(wanted)
        return None

    def _state_of(self, p: Tensor) -> dict[str, Tensor]:
        state: dict[str, Tensor] = self.state[p]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32)
            state["exp_avg"] = torch.zeros_like(p, memory_format=torch.preserve_format)
            state["exp_avg_sq"] = torch.zeros_like(p, memory_format=torch.preserve_format)
        return state


def _is_plain(tensor: Tensor | None) -> bool:
    return (
        tensor is not None and tensor.device.type == "cpu" and tensor.dtype == torch.float32 and tensor.is_contiguous()
    )
