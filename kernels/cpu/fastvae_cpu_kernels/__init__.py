"""Numba kernels of fastvae for the CPU: tensors in, tensors out; no autograd, no validation.

Importing this package compiles nothing and imports no Numba: an operation is loaded when it is first asked for, and its
kernel compiled, or read from Numba's cache on disk, when it is first called.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from ._supports import supports

if TYPE_CHECKING:
    from ._philox import philox_words
    from ._record import recorded
    from ._reduce import ColumnSums
    from .adam import adam_
    from .bernoulli_nll import bernoulli_nll_bwd, bernoulli_nll_fwd, bernoulli_nll_with_grad
    from .gather import gather_batch
    from .gaussian_nll import gaussian_nll_bwd, gaussian_nll_fwd, gaussian_nll_with_grad
    from .kl_normal import kl_normal_bwd, kl_normal_fwd
    from .kl_standard_normal import kl_standard_normal_bwd, kl_standard_normal_fwd
    from .linear import activation_bwd_, hidden_bwd, linear_bwd, linear_fwd
    from .reparameterize import reparameterize_bwd, reparameterize_fwd
    from .reparameterize_kl import reparameterize_kl_bwd, reparameterize_kl_fwd
    from .reparameterize_log_ratio import reparameterize_log_ratio_bwd, reparameterize_log_ratio_fwd
    from .scale import scale_
    from .step import begin_step, end_step

__all__ = [
    "ColumnSums",
    "activation_bwd_",
    "adam_",
    "begin_step",
    "bernoulli_nll_bwd",
    "bernoulli_nll_fwd",
    "bernoulli_nll_with_grad",
    "end_step",
    "gather_batch",
    "gaussian_nll_bwd",
    "gaussian_nll_fwd",
    "gaussian_nll_with_grad",
    "hidden_bwd",
    "kl_normal_bwd",
    "kl_normal_fwd",
    "kl_standard_normal_bwd",
    "kl_standard_normal_fwd",
    "linear_bwd",
    "linear_fwd",
    "philox_words",
    "recorded",
    "reparameterize_bwd",
    "reparameterize_fwd",
    "reparameterize_kl_bwd",
    "reparameterize_kl_fwd",
    "reparameterize_log_ratio_bwd",
    "reparameterize_log_ratio_fwd",
    "scale_",
    "supports",
]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = {
        "ColumnSums": "_reduce",
        "philox_words": "_philox",
        "recorded": "_record",
        "gather_batch": "gather",
        "scale_": "scale",
        "adam_": "adam",
        "activation_bwd_": "linear",
        "hidden_bwd": "linear",
        "begin_step": "step",
        "end_step": "step",
    }.get(name, name)
    for suffix in ("_fwd", "_bwd", "_with_grad"):
        module = module.removesuffix(suffix)
    value = getattr(importlib.import_module(f".{module}", __name__), name)
    globals()[name] = value
    return value
