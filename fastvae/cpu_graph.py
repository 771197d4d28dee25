"""What a function did on the CPU, to be done again on the same memory: a CUDA graph's twin.

A small step passes a good part of its time in Python, autograd and the allocator. It is a function of device state
alone (see `fastvae.step`), so that repeating the operators and kernels that it ran once, on the tensors that it ran
them on, is taking it again.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fastvae.functional import kernel_package

__all__ = ["CPUGraph"]

LARGEST_BYTES = 4 * 2**20
"""A step that makes a larger tensor is not recorded: its arithmetic takes far longer than its bookkeeping."""

READ_BY_THE_HOST = {"aten::_local_scalar_dense", "aten::equal", "aten::is_nonzero", "aten::nonzero"}
"""What follows may depend on the value, and would be repeated for another."""

UNINITIALIZED = {"aten::empty", "aten::empty_like", "aten::empty_strided", "aten::new_empty", "aten::new_empty_strided"}


class CPUGraph:
    """`with graph.record():` around a call, then `graph.replay()` for each further one.

    Attributes:
        refused: why what was recorded cannot be replayed, None if it can.
    """

    def __init__(self) -> None:
        self.refused: str | None = None
        self._launches: list[tuple[Callable[..., Any], tuple[Any, ...]]] = []
        # what is made on the way keeps its place
        self._made: list[Tensor] = []

    @contextlib.contextmanager
    def record(self) -> Iterator[None]:
        """Everything that this thread does with torch and with our kernels, while it is done."""
        package, _ = kernel_package("cpu")
        with contextlib.ExitStack() as stack:
            if hasattr(package, "recorded"):
                stack.enter_context(package.recorded(lambda *launch: self._launches.append(launch)))
            stack.enter_context(_Operators(self))
            yield

    def replay(self) -> None:
        """All of it once more."""
        with torch.no_grad():
            for function, args in self._launches:
                function(*args)

    def note(self, operator: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> None:
        """`operator` was called, and `result` is what it returned."""
        name = operator._schema.name
        if name in READ_BY_THE_HOST:
            self.refused = f"{name} reads a value on the host"
        memory = {t.untyped_storage().data_ptr() for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        results = [t for t in tree_leaves(result) if isinstance(t, Tensor)]
        made = [t for t in results if t.untyped_storage().data_ptr() not in memory]
        self._made += made
        if any(t.untyped_storage().nbytes() > LARGEST_BYTES for t in made):
            self.refused = f"{name} makes a tensor of more than {LARGEST_BYTES // 2**20} MiB"
        if operator._schema.is_mutable:
            if made:
                self.refused = f"{name} writes to its arguments and returns new tensors"
            self._add(operator, *args, **kwargs)
        elif made and name not in UNINITIALIZED:
            into = _writing(operator)
            if not isinstance(result, Tensor):
                self._add(_copy_results, operator, args, kwargs, results)
            elif into is None:
                self._add(_copy_result, result, operator, *args, **kwargs)
            else:
                self._add(into, *args, **kwargs, out=result)

    def _add(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
        self._launches.append((functools.partial(function, **kwargs) if kwargs else function, args))


@functools.cache
def _writing(operator: Any) -> Any:
    """The form of an operator that writes to `out`, or None."""
    given = [(a.name, str(a.type)) for a in operator._schema.arguments]
    for overload in operator.overloadpacket.overloads():
        form = getattr(operator.overloadpacket, overload)
        arguments = form._schema.arguments
        is_out = bool(arguments) and arguments[-1].name == "out" and arguments[-1].is_out
        if is_out and [(a.name, str(a.type)) for a in arguments[:-1]] == given:
            return form
    return None


def _copy_result(result: Tensor, operator: Any, *args: Any, **kwargs: Any) -> None:
    result.copy_(operator(*args, **kwargs))


def _copy_results(operator: Any, args: tuple[Any, ...], kwargs: dict[str, Any], results: list[Tensor]) -> None:
    new = [t for t in tree_leaves(operator(*args, **kwargs)) if isinstance(t, Tensor)]
    for old, value in zip(results, new, strict=True):
        old.copy_(value)


class _Operators(TorchDispatchMode):
    def __init__(self, graph: CPUGraph) -> None:
        super().__init__()
        self.graph = graph

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        self.graph.note(func, args, kwargs, result)
        return result
