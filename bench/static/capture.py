"""Runs a launcher for a GPU that is not there: kernels are compiled and recorded, never executed.

Triton's JIT does its normal work (binding, specialisation on alignment and on 1, compilation), because the active
driver says that its device is the wanted one, and every launch becomes a `warmup`. PyTorch operators run, on the CPU.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

__all__ = ["TARGETS", "HostOp", "Launch", "recording", "unique_bytes"]

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "sm_120": GPUTarget("cuda", 120, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}


class Launch(NamedTuple):
    """One kernel launch: what was compiled, for how many programs, and the arguments by name."""

    kernel: str
    compiled: Any
    programs: int
    arguments: dict[str, Any]


class HostOp(NamedTuple):
    """A PyTorch operator that would launch a kernel of its own."""

    name: str
    bytes: int


@dataclass
class _Driver:
    """As much of a driver as Triton's JIT asks for before it launches."""

    target: GPUTarget

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> str:
        # the JIT keeps what it compiled by device
        return str(self.target)

    def get_current_stream(self, device: object = None) -> int:
        return 0


def unique_bytes(tensor: Tensor) -> int:
    """Bytes of the elements, those of an expanded dimension once."""
    return tensor.element_size() * math.prod(n for n, s in zip(tensor.shape, tensor.stride()) if s)


class _HostOps(TorchDispatchMode):
    def __init__(self, record: list[Launch | HostOp]) -> None:
        super().__init__()
        self.record = record

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        given = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        made = [t for t in tree_leaves(result) if isinstance(t, Tensor)]
        storages = {t.untyped_storage().data_ptr() for t in given}
        is_view = all(t.untyped_storage().data_ptr() in storages for t in made) and not func._schema.is_mutable
        if not is_view and "empty" not in func._schema.name:
            self.record.append(HostOp(func._schema.name, sum(map(unique_bytes, given + made))))
        return result


@contextmanager
def recording(architecture: str) -> Iterator[list[Launch | HostOp]]:
    """Launches inside are compiled for the architecture and appended to the list, in order."""
    if knobs.runtime.interpret:
        raise RuntimeError("TRITON_INTERPRET is set: the kernels would be interpreted, not compiled; unset it")
    record: list[Launch | HostOp] = []
    run = JITFunction.run

    def record_run(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        # allocations on the way would be recorded as the launcher's
        with torch.utils._python_dispatch._disable_current_modes():
            compiled = run(self, *args, grid=grid, warmup=True, **kwargs)
        named = {name: value for name, value in kwargs.items() if name in self.signature.parameters}
        bound = self.signature.bind(*args, **named)
        bound.apply_defaults()
        grid = grid(bound.arguments) if callable(grid) else grid
        record.append(Launch(self.fn.__name__, compiled, math.prod(grid), dict(bound.arguments)))
        return compiled

    JITFunction.run = record_run
    driver.set_active(_Driver(TARGETS[architecture]))
    try:
        with _HostOps(record):
            yield record
    finally:
        JITFunction.run = run
        # without a GPU there is no driver to go back to
        with suppress(RuntimeError):
            driver.reset_active()
