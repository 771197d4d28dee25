"""What a checkpoint of a training run holds: weights, optimiser state, step and logged numbers; nothing random."""

from __future__ import annotations

import dataclasses
from typing import Any

from torch import Tensor

from fastvae.config import TrainConfig
from fastvae.pretrained import load_weights
from fastvae.step import TrainingStep
from fastvae.versions import library_versions

__all__ = ["restore", "snapshot", "version_changes"]


def snapshot(step: TrainingStep, config: TrainConfig, best: float) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and metadata for `save_checkpoint`; the tensors are the live ones."""
    tensors: dict[str, Tensor] = {f"model.{k}": v for k, v in step.model.state_dict().items()}
    for index, state in step.optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer.{index}.{k}": v for k, v in state.items()}
    tensors |= {"step": step.step, "metrics": step.metrics}
    settings = dataclasses.asdict(config) | {"data_dir": None, "out": None}
    return tensors, {"best": best, "config": settings, "versions": library_versions()}


def restore(tensors: dict[str, Tensor], step: TrainingStep, *, where: str) -> None:
    """Put back what `snapshot` took."""
    weights = {k.removeprefix("model."): v for k, v in tensors.items() if k.startswith("model.")}
    load_weights(step.model, weights, where=where)
    state: dict[int, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        if name.startswith("optimizer."):
            _, index, key = name.split(".", 2)
            state.setdefault(int(index), {})[key] = tensor
    groups = step.optimizer.state_dict()["param_groups"]
    step.optimizer.load_state_dict({"state": state, "param_groups": groups})
    step.step.copy_(tensors["step"])
    step.metrics.copy_(tensors["metrics"])


def version_changes(metadata: dict[str, Any]) -> str | None:
    """A line about libraries that are not those of the checkpoint with this metadata, if there are any."""
    now = library_versions()
    saved: dict[str, str] = metadata.get("versions", {})
    changed = [f"{name} {then}, now {now.get(name)}" for name, then in saved.items() if now.get(name) != then]
    return f"the checkpoint is of {'; '.join(changed)}: the same bits are not promised" if changed else None
