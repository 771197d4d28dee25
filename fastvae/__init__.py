"""fastvae: variational autoencoders at the speed of the hardware.

>>> from fastvae import VAE, functional as F
>>> vae = VAE.from_pretrained("runs/digits")
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from fastvae import functional, reference
from fastvae.errors import FastvaeError
from fastvae.models import VAE

if TYPE_CHECKING:
    from fastvae.config import TrainConfig
    from fastvae.train import resume, train

__all__ = ["VAE", "FastvaeError", "TrainConfig", "functional", "reference", "resume", "train"]
__version__ = "0.1.0"

# what training needs (data, figures, the command line) is imported when it is asked for
_LAZY = {"TrainConfig": "fastvae.config", "train": "fastvae.train", "resume": "fastvae.train"}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'fastvae' has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(_LAZY[name]), name)
