"""Where the kernels run in this test session, decided before triton is imported."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator
from typing import Any

import pytest
import torch

# without a GPU the Triton kernels run in Triton's interpreter, unless something else was told to execute them
if not torch.cuda.is_available() and "GPU_EMULATOR" not in os.environ:
    os.environ.setdefault("TRITON_INTERPRET", "1")


def mend_interpreter() -> None:
    """Until Triton 3.7 it makes integers of arrays `[1]` in a way that NumPy 2.4 refuses; later as is done here."""
    import triton
    from triton.runtime import interpreter

    if triton.__version__.startswith(("3.5.", "3.6.")):
        patch = interpreter._patch_lang_tensor

        def patched(tensor: Any, *scope: Any) -> None:
            patch(tensor, *scope)
            tensor.__index__ = lambda self: int(self.handle.data.squeeze())

        interpreter._patch_lang_tensor = patched


if os.environ.get("TRITON_INTERPRET") == "1" and importlib.util.find_spec("triton") is not None:
    mend_interpreter()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA device")
    for item in items:
        if "cuda" in item.keywords:
            item.add_marker(skip)


@pytest.fixture
def always_share(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The Numba kernels use all threads, whatever the work and whether or not it pays."""
    from fastvae_cpu_kernels import _threads

    before = torch.get_num_threads()
    monkeypatch.setattr(_threads, "_WORTH_SHARING_NS", -1)
    monkeypatch.setattr(_threads._Patience, "share", lambda self: True)
    yield
    torch.set_num_threads(before)
