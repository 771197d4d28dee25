"""What a run was computed with."""

from __future__ import annotations

import functools
import importlib.metadata
import platform

__all__ = ["library_versions"]


# looking them up takes longer than the copies of a checkpoint
@functools.cache
def library_versions() -> dict[str, str]:
    """Versions of Python, of this package and of the libraries that compute; "not installed" for one that is not."""
    packages = ("fastvae-kernels", "torch", "triton", "numba", "numpy")
    return {"python": platform.python_version(), **{package: _version(package) for package in packages}}


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"
