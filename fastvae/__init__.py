"""fastvae: variational autoencoders at the speed of the hardware.

>>> from fastvae import VAE, functional as F
>>> vae = VAE.from_pretrained("runs/digits")
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fastvae import functional, reference
    from fastvae.config import TrainConfig
    from fastvae.errors import FastvaeError
    from fastvae.models import VAE

__all__ = ["VAE", "FastvaeError", "TrainConfig", "functional", "reference"]
__version__ = "0.1.0"

# imported when they are asked for: a program has things to say before torch is
_MODULES = {
    "VAE": "models",
    "FastvaeError": "errors",
    "TrainConfig": "config",
    "functional": "functional",
    "reference": "reference",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module 'fastvae' has no attribute {name!r}")
    import importlib

    module = importlib.import_module(f"fastvae.{_MODULES[name]}")
    return getattr(module, name, module)
