"""Runs a launcher for a GPU that is not there: kernels are compiled and recorded, never executed.

Triton's JIT does its normal work (binding, specialisation on alignment and on 1, compilation), because the active
driver says that its device is the wanted one, and every launch becomes a `warmup`. PyTorch operators run, on the CPU.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
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

__all__ = ["TARGETS", "HostOp", "Launch", "multi_tensor_launches", "recording", "unique_bytes"]

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
    """A PyTorch operator that would launch kernels of its own: one, but for those over lists of tensors."""

    name: str
    bytes: int
    launches: int = 1


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


def _moved(func: Any, args: Any, kwargs: Any, made: list[Tensor]) -> int:
    """Bytes that an operator reads and writes: what it only overwrites is not read, of a table only chosen rows are."""
    name = func._schema.name.removeprefix("aten::")
    read, written = 0, 0
    given: set[int] = set()
    for i, argument in enumerate(func._schema.arguments):
        value = args[i] if i < len(args) else kwargs.get(argument.name)
        tensors = [t for t in tree_leaves(value) if isinstance(t, Tensor)]
        given.update(map(id, tensors))
        size = sum(map(unique_bytes, tensors))
        # the gradients are marked as written for the sake of a scaler, which there is not
        is_written = argument.alias_info is not None and argument.alias_info.is_write and argument.name != "grads"
        written += size if is_written else 0
        read += 0 if is_written and (argument.is_out or name in ("copy_", "fill_", "zero_", "_foreach_copy_")) else size
    # a view of what was written, or the same tensor
    storages = {t.untyped_storage().data_ptr() for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
    written += sum(
        unique_bytes(t) for t in made if id(t) not in given and t.untyped_storage().data_ptr() not in storages
    )
    if name.startswith("new_") or name.endswith("_like"):
        read = 0
    elif name == "index_select":
        read = written + unique_bytes(args[2])
    elif name == "index_copy_":
        read, written = unique_bytes(args[2]) + unique_bytes(args[3]), unique_bytes(args[3])
    return read + written


# torch's multi_tensor_apply: how many tensors one launch takes, by the lists that it walks together; all in chunks
_LISTED, _BLOCKS, _CHUNK = {1: 110, 2: 64, 3: 48, 4: 36, 5: 30}, 320, 65536


def multi_tensor_launches(sizes: Sequence[int], lists: int) -> int:
    """Launches of a `_foreach_` or `_fused_` operator on CUDA, for `lists` lists of tensors of `sizes` elements."""
    launches = tensors = blocks = 0
    for size in sizes:
        tensors += 1 if size else 0
        chunks = -(-size // _CHUNK)
        for chunk in range(1, chunks + 1):
            blocks += 1
            full = tensors == _LISTED[lists] and chunk == chunks
            if full or blocks == _BLOCKS:
                launches, blocks = launches + 1, 0
                # a tensor with chunks left stays in the next launch
                tensors = 0 if chunk == chunks else 1
    return launches + (blocks > 0)


def _launches(func: Any, args: Any) -> int:
    name = func._schema.name.removeprefix("aten::")
    if not name.startswith(("_foreach_", "_fused_")):
        return 1
    lists = [value for value, argument in zip(args, func._schema.arguments) if argument.name != "state_steps"]
    lists = [value for value in lists if isinstance(value, list | tuple) and value and isinstance(value[0], Tensor)]
    return multi_tensor_launches([t.numel() for t in lists[0]], len(lists))


class _HostOps(TorchDispatchMode):
    def __init__(self, record: list[Any]) -> None:
        super().__init__()
        self.record = record

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        given = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        made = [t for t in tree_leaves(result) if isinstance(t, Tensor)]
        storages = {t.untyped_storage().data_ptr() for t in given}
        is_view = all(t.untyped_storage().data_ptr() in storages for t in made) and not func._schema.is_mutable
        if not is_view and "empty" not in func._schema.name:
            moved = _moved(func, args, kwargs or {}, made)
            self.record.append(HostOp(func._schema.name, moved, _launches(func, args)))
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
