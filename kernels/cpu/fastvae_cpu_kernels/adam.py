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
from ._math import ONE
from ._pieces import store_piece
from ._pointers import f32_at, f32_scratch, i64_at
from ._record import launch
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
    table: int,  # int64 [tiles, 6]: where a tile's parameters, their gradients, m, v and t are, and how many they are
    lr: int,  # float32 [1]
    decay: float,
    beta1: float,
    beta2: float,
    eps: float,
) -> None:
    new_p, new_m, new_v = f32_scratch(512), f32_scratch(512), f32_scratch(512)
    for tile in range(first_tile, last_tile):
        row = i64_at(table + 48 * tile)
        t = np.float64(f32_at(row[4])[0])
        constants = (
            np.float32(decay),
            np.float32(1.0 - beta1),
            np.float32(beta2),
            np.float32(1.0 - beta2),
            np.float32(np.float64(f32_at(lr)[0]) / (1.0 - beta1**t)),
            np.float32((1.0 - beta2**t) ** -0.5),
            np.float32(eps),
        )
        for i in range(0, row[5], PIECE):
            count = min(PIECE, row[5] - i)
            p, g, m, v = row[0] + 4 * i, row[1] + 4 * i, row[2] + 4 * i, row[3] + 4 * i
            _adam_piece(f32_at(p), f32_at(g), f32_at(m), f32_at(v), new_p, new_m, new_v, count, constants)
            store_piece(new_p, f32_at(p), count)
            store_piece(new_m, f32_at(m), count)
            store_piece(new_v, f32_at(v), count)


@kernel
def _count_step(
    steps: int,  # int64 [parameters]: where the step counter of each is
    parameters: int,
) -> None:
    for i in range(parameters):
        f32_at(i64_at(steps)[i])[0] += ONE


@functools.lru_cache(64)
def _tables(places: tuple[tuple[int, ...], ...]) -> tuple[Tensor, Tensor]:
    """The tiles of all parameters, and their counters; from step to step mostly nothing of it moves.

    First those at the beginning of each parameter, last those at its end: the share of a thread is then a part of each,
    as its share of a product is, see `_products.py`.
    """
    tiles = [
        (first / elements, [*(address + 4 * first for address in addresses), step, min(_TILE, elements - first)])
        for *addresses, step, elements in places
        for first in range(0, elements, _TILE)
    ]
    rows = [row for _, row in sorted(tiles)]
    return torch.tensor(rows, dtype=torch.int64), torch.tensor([step for *_, step, _ in places], dtype=torch.int64)


def adam_(
    parameters: Sequence[Tensor],
    gradients: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    steps: Sequence[Tensor],
    lr: Tensor,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
) -> None:
    """One step in place; all tensors float32 and dense, the first four of a parameter laid out alike.

    `steps`, one counter `[]` per parameter, go up by one; they and `lr` `[]` are read where they are.
    """
    places = tuple(
        (p.data_ptr(), g.data_ptr(), m.data_ptr(), v.data_ptr(), t.data_ptr(), p.numel())
        for p, g, m, v, t in zip(parameters, gradients, exp_avgs, exp_avg_sqs, steps)
    )
    tables = _tables(places)
    constants = map(float, (weight_decay, *betas, eps))
    launch(_take_step, *tables, gradients, sum(place[-1] for place in places), lr, *constants)


def _take_step(
    table: Tensor, counters: Tensor, _: Sequence[Tensor], elements: int, lr: Tensor, *constants: float
) -> None:
    tiles = len(table)
    _count_step(counters.data_ptr(), len(counters))
    grid = Plan(torch.Size(()), 1, 1, elements, tiles, 1, _TILE, tiles)
    run(_adam_kernel, grid, _NS_PER_ELEMENT * elements, table.data_ptr(), lr.data_ptr(), *constants)
