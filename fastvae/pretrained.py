"""A model on the disk or on the Hugging Face Hub: config.json and model.safetensors in one folder; no pickle."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
from torch import Tensor, nn

from fastvae import __version__
from fastvae.checkpoint import write_atomic
from fastvae.errors import FastvaeError, one_line

__all__ = ["load", "load_weights", "save"]

FORMAT = 1
"""Version of config.json: a newer one is refused."""

_FILES = ("config.json", "model.safetensors")


def save(model: Any, folder: Path) -> None:
    """Write a `VAE` into `folder`, each file atomically."""
    header = {"model_type": "fastvae", "format": FORMAT, "fastvae_version": __version__}
    tensors = {name: t.detach().cpu().contiguous() for name, t in model.state_dict().items()}
    folder.mkdir(parents=True, exist_ok=True)
    write_atomic(folder / "model.safetensors", safetensors.torch.save(tensors, {"format": "pt"}))
    write_atomic(folder / "config.json", json.dumps(header | model.config(), indent=2) + "\n")


def load(path: str | Path, **hub: Any) -> tuple[dict[str, Any], dict[str, Tensor], str]:
    """Config, weights and the folder's name, from a folder or a Hub repository `owner/name`.

    Raises FastvaeError where there is no model, or one that is damaged or of a newer format.
    """
    folder = Path(path)
    if not folder.is_dir():
        if len(folder.parts) != 2 or folder.is_absolute() or str(path).startswith("."):
            raise FastvaeError(f"no model at {path}: expected a folder, or a Hub repository as owner/name")
        folder = _download(str(path), **hub)
    for name in _FILES:
        if not (folder / name).is_file():
            raise FastvaeError(f"{folder} holds no {name}: expected a folder that save_pretrained or a run wrote")
    try:
        config = json.loads((folder / "config.json").read_text())
        tensors = safetensors.torch.load_file(folder / "model.safetensors")
    except (ValueError, safetensors.SafetensorError) as error:
        raise FastvaeError(f"the model in {folder} is damaged: {one_line(error)}") from error
    if config.get("model_type") != "fastvae":
        raise FastvaeError(f"config.json is of model_type {config.get('model_type')!r}, expected 'fastvae'")
    if config["format"] > FORMAT:
        raise FastvaeError(
            f"the model has format {config['format']} (fastvae {config.get('fastvae_version')}), this version reads up "
            f"to {FORMAT}: upgrade fastvae-kernels"
        )
    return config, tensors, str(folder)


def _download(repository: str, **hub: Any) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(repository, allow_patterns=list(_FILES), **hub))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise FastvaeError(
            f"no model at {repository}: there is no such folder, and the Hub says: {one_line(error)}"
        ) from error


def load_weights(vae: nn.Module, tensors: dict[str, Tensor], *, where: str) -> None:
    """`load_state_dict` that says in one line which tensor does not fit."""
    own = vae.state_dict()
    for name in sorted(own.keys() | tensors.keys()):
        got = list(tensors[name].shape) if name in tensors else "nothing"
        expected = list(own[name].shape) if name in own else "nothing"
        if got != expected:
            raise FastvaeError(f"{where} is of another architecture: {name} is {got}, expected {expected}")
    vae.load_state_dict(tensors)
