"""KL(N(mu_q, exp(logvar_q)) || N(mu_p, exp(logvar_p))) of diagonal Gaussians, in nats, and its gradient.

r = logvar_q - logvar_p
KL = 1/2 sum_l [(mu_q - mu_p)^2 exp(-logvar_p) + expm1(r) - r]
dmu_q = -dmu_p = (mu_q - mu_p) exp(-logvar_p),   dlogvar_q = expm1(r) / 2,
dlogvar_p = -[(mu_q - mu_p)^2 exp(-logvar_p) + expm1(r)] / 2
"""

from __future__ import annotations

from typing import Any

import numpy as np
from torch import Tensor

from ._jit import kernel, loop
from ._layout import PIECE, Rows, destination, plan, rows_of, scalars_of, walkable
from ._math import HALF, ZERO, exp, expm1, expm1_minus
from ._pieces import row_address
from ._pointers import f32_at
from ._reduce import row_sums, row_totals
from ._threads import run

__all__ = ["kl_normal_bwd", "kl_normal_fwd"]

_NS_PER_ELEMENT = 0.55


@loop
def _kl_piece(mu_q: Any, logvar_q: Any, mu_p: Any, logvar_p: Any, count: int) -> Any:
    total = ZERO
    for d in range(count):
        distance = mu_q[d] - mu_p[d]
        squared = distance * distance * exp(-logvar_p[d])
        total += HALF * (squared + expm1_minus(logvar_q[d] - logvar_p[d]))
    return total


@loop
def _kl_grad_piece(
    dkl: Any,
    mu_q: Any,
    logvar_q: Any,
    mu_p: Any,
    logvar_p: Any,
    dmu_q: Any,
    dlogvar_q: Any,
    dmu_p: Any,
    dlogvar_p: Any,
    count: int,
) -> None:
    for d in range(count):
        distance = mu_q[d] - mu_p[d]
        scaled = distance * exp(-logvar_p[d])
        growth = expm1(logvar_q[d] - logvar_p[d])
        dmu_q[d] = dkl * scaled
        dmu_p[d] = -(dkl * scaled)
        dlogvar_q[d] = dkl * (HALF * growth)
        dlogvar_p[d] = -(dkl * (HALF * (distance * scaled + growth)))


@kernel
def _kl_fwd_kernel(
    first_tile: int,
    last_tile: int,
    mu_q: Rows,  # float32 [K, B, L]
    logvar_q: Rows,
    mu_p: Rows,
    logvar_p: Rows,
    kl: int,  # float32 [K * B, tiles across]
    K: int,
    B: int,
    L: int,
    across: int,
    height: int,
    width: int,
) -> None:
    for tile in range(first_tile, last_tile):
        block, part = tile // across, tile % across
        k, b = block * height // B, block * height % B
        for r in range(block * height, min(K * B, (block + 1) * height)):
            total = 0.0
            end = min(L, (part + 1) * width)
            for d in range(part * width, end, PIECE):
                total += _kl_piece(
                    f32_at(row_address(mu_q, k, b) + 4 * d),
                    f32_at(row_address(logvar_q, k, b) + 4 * d),
                    f32_at(row_address(mu_p, k, b) + 4 * d),
                    f32_at(row_address(logvar_p, k, b) + 4 * d),
                    min(PIECE, end - d),
                )
            f32_at(kl)[r * across + part] = np.float32(total)
            b += 1
            if b == B:
                k, b = k + 1, 0


@kernel
def _kl_bwd_kernel(
    first_tile: int,
    last_tile: int,
    dkl: Rows,  # float32 [K, B]
    mu_q: Rows,  # float32 [K, B, L]
    logvar_q: Rows,
    mu_p: Rows,
    logvar_p: Rows,
    dmu_q: Rows,
    dlogvar_q: Rows,
    dmu_p: Rows,
    dlogvar_p: Rows,
    K: int,
    B: int,
    L: int,
    across: int,
    height: int,
    width: int,
) -> None:
    for tile in range(first_tile, last_tile):
        block, part = tile // across, tile % across
        k, b = block * height // B, block * height % B
        for _ in range(block * height, min(K * B, (block + 1) * height)):
            end = min(L, (part + 1) * width)
            for d in range(part * width, end, PIECE):
                count = min(PIECE, end - d)
                _kl_grad_piece(
                    f32_at(row_address(dkl, k, b))[0],
                    f32_at(row_address(mu_q, k, b) + 4 * d),
                    f32_at(row_address(logvar_q, k, b) + 4 * d),
                    f32_at(row_address(mu_p, k, b) + 4 * d),
                    f32_at(row_address(logvar_p, k, b) + 4 * d),
                    f32_at(row_address(dmu_q, k, b) + 4 * d),
                    f32_at(row_address(dlogvar_q, k, b) + 4 * d),
                    f32_at(row_address(dmu_p, k, b) + 4 * d),
                    f32_at(row_address(dlogvar_p, k, b) + 4 * d),
                    count,
                )
            b += 1
            if b == B:
                k, b = k + 1, 0


def kl_normal_fwd(mu_q: Tensor, logvar_q: Tensor, mu_p: Tensor, logvar_p: Tensor) -> Tensor:
    """kl `[...]` float32 for four tensors `[..., L]` float32."""
    grid = plan(mu_q.shape)
    inputs = [walkable(t) for t in (mu_q, logvar_q, mu_p, logvar_p)]
    totals = row_totals(grid.leading, grid)
    run(
        _kl_fwd_kernel,
        grid,
        _NS_PER_ELEMENT * grid.elements,
        *map(rows_of, inputs),
        totals.data_ptr(),
        *grid.sizes,
    )
    return row_sums(totals, grid.leading, grid)


def kl_normal_bwd(
    dkl: Tensor, mu_q: Tensor, logvar_q: Tensor, mu_p: Tensor, logvar_p: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(dmu_q, dlogvar_q, dmu_p, dlogvar_p) `[..., L]` for dkl `[...]`."""
    grid = plan(mu_q.shape)
    dkl, dkl_rows = scalars_of(dkl)
    inputs = [walkable(t) for t in (mu_q, logvar_q, mu_p, logvar_p)]
    grads = [destination(None, mu_q) for _ in range(4)]
    run(
        _kl_bwd_kernel,
        grid,
        _NS_PER_ELEMENT * grid.elements,
        dkl_rows,
        *map(rows_of, inputs),
        *map(rows_of, grads),
        *grid.sizes,
    )
    dmu_q, dlogvar_q, dmu_p, dlogvar_p = grads
    return dmu_q, dlogvar_q, dmu_p, dlogvar_p
