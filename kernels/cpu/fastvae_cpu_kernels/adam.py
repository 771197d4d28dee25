"""One step of Adam over all parameters, in one pass over their memory.

    g += decay p,   m += (1 - beta1) (g - m),   v = beta2 v + (1 - beta2) g^2
    p -= lr / (1 - beta1^t) m / (sqrt(v) / sqrt(1 - beta2^t) + eps)

Source: Kingma & Ba 2014, Algorithm 1; the weight decay is an L2 penalty, as in torch.optim.Adam.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ._jit import kernel, loop
from ._layout import PIECE, Plan
from ._pieces import store_piece
from ._pointers import f32_at, f32_scratch, i64_at
from ._threads import run

__all__ = ["adam_"]

_NS_PER_ELEMENT, _TILE = 0.6, 16384


@loop
def _adam_piece(p: Any, g: Any, m: Any, v: Any, new_p: Any, new_m: Any, new_v: Any, count: int, constants: Any) -> None:
    decay, one_minus_beta1, beta2, one_minus_beta2, step_size, root, eps = constants
    for i in range(count):
        gradient = g[i] + decay * p[i]
        new_m[i] = m[i] + one_minus_beta1 * (gradient - m[i])
        new_v[i] = beta2 * v[i] + one_minus_beta2 * (gradient * gradient)
        new_p[i] = p[i] - step_size * new_m[i] / (np.sqrt(new_v[i]) * root + eps)


@kernel
def _adam_kernel(
    first_tile: int,
    last_tile: int,
    table: int,  # int64 [tiles, 5]: where the parameters of a tile, their gradients, m and v are, and how many they are
    decay: float,
    beta1: float,
    beta2: float,
    step_size: float,  # lr / (1 - beta1^t)
    root: float,  # 1 / sqrt(1 - beta2^t)
    eps: float,
) -> None:
    constants = (
        np.float32(decay),
        np.float32(1.0 - beta1),
        np.float32(beta2),
        np.float32(1.0 - beta2),
        np.float32(step_size),
        np.float32(root),
        np.float32(eps),
    )
    new_p, new_m, new_v = f32_scratch(512), f32_scratch(512), f32_scratch(512)
    for tile in range(first_tile, last_tile):
        row = i64_at(table + 40 * tile)
        for i in range(0, row[4], PIECE):
            count = min(PIECE, row[4] - i)
            p, g, m, v = row[0] + 4 * i, row[1] + 4 * i, row[2] + 4 * i, row[3] + 4 * i
            _adam_piece(f32_at(p), f32_at(g), f32_at(m), f32_at(v), new_p, new_m, new_v, count, constants)
            store_piece(new_p, f32_at(p), count)
            store_piece(new_m, f32_at(m), count)
            store_piece(new_v, f32_at(v), count)


@functools.lru_cache(64)
def _table(places: tuple[tuple[int, int, int, int, int], ...]) -> Tensor:
    """The tiles of all parameters; from step to step only the gradients move, and mostly not even they."""
    rows = [
        [*(address + 4 * first for address in addresses), min(_TILE, elements - first)]
        for *addresses, elements in places
        for first in range(0, elements, _TILE)
    ]
    return torch.tensor(rows, dtype=torch.int64)


def adam_(
    parameters: Sequence[Tensor],
    gradients: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    step: int,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
) -> None:
    """Step number `step` (from 1) in place; all tensors float32 and dense, the four of a parameter laid out alike."""
    beta1, beta2 = betas
    table = _table(
        tuple(
            (p.data_ptr(), g.data_ptr(), m.data_ptr(), v.data_ptr(), p.numel())
            for p, g, m, v in zip(parameters, gradients, exp_avgs, exp_avg_sqs)
        )
    )
    tiles = len(table)
    total = sum(p.numel() for p in parameters)
    run(
        _adam_kernel,
        Plan(torch.Size(()), 1, 1, total, tiles, 1, _TILE, tiles),
        _NS_PER_ELEMENT * total,
        table.data_ptr(),
        weight_decay,
        beta1,
        beta2,
        lr / (1.0 - beta1**step),
        (1.0 - beta2**step) ** -0.5,
        eps,
    )
