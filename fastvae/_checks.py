"""What the public ops check, at the edge and once: `ValueError` with what was got and what was expected."""

from __future__ import annotations

import functools
from collections.abc import Iterable

import torch
from torch import Tensor


def shapes(**tensors: Tensor) -> str:
    return ", ".join(f"{name} {list(t.shape)} {str(t.dtype)[6:]} on {t.device}" for name, t in tensors.items())


def predictions(**tensors: Tensor) -> list[Tensor]:
    """Floating-point tensors of one device, with at least the event dimension, in their common dtype."""
    values = list(tensors.values())
    first, *others = values
    fits, mixed = first.is_floating_point() and first.ndim > 0, False
    # loops, here and below, as generators cost a microsecond of each call
    for t in others:
        fits = fits and t.device == first.device
        if t.dtype != first.dtype:
            fits, mixed = fits and t.is_floating_point(), True
    if not fits:
        raise ValueError(
            f"expected floating-point tensors on one device with the event as last dimension, got {shapes(**tensors)}"
        )
    if not mixed:
        return values
    dtype = functools.reduce(torch.promote_types, (t.dtype for t in values))
    return [t.to(dtype) for t in values]


def parameters(**tensors: Tensor) -> list[Tensor]:
    """`predictions` broadcast to one shape."""
    values = predictions(**tensors)
    shape = values[0].shape
    for t in values[1:]:
        if t.shape != shape:
            try:
                return list(torch.broadcast_tensors(*values))
            except RuntimeError:
                raise ValueError(f"these shapes do not broadcast: {shapes(**tensors)}") from None
    return values


def data_like(x: Tensor, prediction: Tensor) -> Tensor:
    """`x` as a view of the prediction's shape."""
    if not (x.is_floating_point() or x.dtype in (torch.uint8, torch.bool)) or x.device != prediction.device:
        raise ValueError(
            "expected data x as floating point, bool or uint8 on the prediction's device, got "
            + shapes(x=x, prediction=prediction)
        )
    if x.shape == prediction.shape:
        return x
    try:
        return x.expand(prediction.shape)
    except RuntimeError:
        raise ValueError(f"data x must broadcast to the prediction, got {shapes(x=x, prediction=prediction)}") from None


def draw_seed(seed: Tensor | None, generator: torch.Generator | None, device: torch.device) -> Tensor:
    if seed is None:
        return torch.randint(-(2**63), 2**63 - 1, (1,), dtype=torch.int64, device=device, generator=generator)
    if generator is not None:
        raise ValueError("expected a seed or a generator, got both")
    return check_seed(seed, device)


def check_seed(seed: Tensor, device: torch.device) -> Tensor:
    if seed.dtype != torch.int64 or seed.numel() != 1 or seed.device != device:
        raise ValueError(f"expected a seed int64 [1] on {device}, got {shapes(seed=seed)}")
    return seed


def check_num_samples(num_samples: int) -> int:
    if num_samples < 1:
        raise ValueError(f"expected num_samples >= 1, got {num_samples}")
    return num_samples


def row_weights(weight: Tensor | None, rows: Iterable[int], prediction: Tensor) -> Tensor | None:
    """The weight of each row's nll in a loss, float32 of the shape of the rows; None stays None: 1 / rows, the mean."""
    if weight is None:
        return None
    shape = torch.Size(rows)
    if weight.requires_grad:
        raise ValueError("row weights are constants of the loss: expected a weight that needs no gradient (detach it)")
    try:
        if weight.device == prediction.device:
            return weight.to(torch.float32).expand(shape)
        raise ValueError(f"expected row weights on {prediction.device}, got {shapes(weight=weight)}")
    except RuntimeError:
        raise ValueError(f"row weights must broadcast to {list(shape)}, got {shapes(weight=weight)}") from None
