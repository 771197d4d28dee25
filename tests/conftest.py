"""Where the kernels run in this test session, decided before triton is imported."""

from __future__ import annotations

import os

import pytest
import torch

# without a GPU the Triton kernels run in Triton's interpreter, unless something else was told to execute them
if not torch.cuda.is_available() and "GPU_EMULATOR" not in os.environ:
    os.environ.setdefault("TRITON_INTERPRET", "1")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA device")
    for item in items:
        if "cuda" in item.keywords:
            item.add_marker(skip)
