"""KL(N(mu, exp(logvar)) || N(0, I)) = 1/2 sum_l [mu_l^2 + expm1(logvar_l) - logvar_l], in nats; and its gradient.

    d/dmu = mu,   d/dlogvar = expm1(logvar) / 2

Source: Kingma & Welling 2013, Appendix B.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from torch import Tensor

from ._jit import kernel, loop
from ._layout import PIECE, Rows, deliver, destination, plan, rows_of, scalars_of, walkable
from ._math import HALF, ZERO, expm1, expm1_minus
from ._pieces import row_address
from ._pointers import f32_at
from ._reduce import row_sums, row_totals
from ._threads import run

__all__ = ["kl_standard_normal_bwd", "kl_standard_normal_fwd"]

_NS_PER_ELEMENT = 0.3


@loop
def _kl_piece(mu: Any, logvar: Any, count: int) -> Any:
    total = ZERO
    for d in range(count):
        total += HALF * (mu[d] * mu[d] + expm1_minus(logvar[d]))
    return total


@loop
def _kl_grad_piece(dkl: Any, mu: Any, logvar: Any, dmu: Any, dlogvar: Any, count: int) -> None:
    for d in range(count):
        dmu[d] = dkl * mu[d]
        dlogvar[d] = dkl * (HALF * expm1(logvar[d]))


@kernel
def _kl_fwd_kernel(
    first_tile: int,
    last_tile: int,
    mu: Rows,  # float32 [K, B, L]
    logvar: Rows,
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
            mu_row = row_address(mu, k, b)
            logvar_row = row_address(logvar, k, b)
            total = 0.0
            end = min(L, (part + 1) * width)
            for d in range(part * width, end, PIECE):
                total += _kl_piece(f32_at(mu_row + 4 * d), f32_at(logvar_row + 4 * d), min(PIECE, end - d))
            f32_at(kl)[r * across + part] = np.float32(total)
            b += 1
            if b == B:
                k, b = k + 1, 0


@kernel
def _kl_bwd_kernel(
    first_tile: int,
    last_tile: int,
    dkl: Rows,  # float32 [K, B]
    mu: Rows,  # float32 [K, B, L]
    logvar: Rows,
    dmu: Rows,
    dlogvar: Rows,
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
                    f32_at(row_address(mu, k, b) + 4 * d),
                    f32_at(row_address(logvar, k, b) + 4 * d),
                    f32_at(row_address(dmu, k, b) + 4 * d),
                    f32_at(row_address(dlogvar, k, b) + 4 * d),
                    count,
                )
            b += 1
            if b == B:
                k, b = k + 1, 0


def kl_standard_normal_fwd(mu: Tensor, logvar: Tensor) -> Tensor:
    """kl `[...]` float32 for mu, logvar `[..., L]` float32."""
    grid = plan(mu.shape)
    mu, logvar = walkable(mu), walkable(logvar)
    totals = row_totals(grid.leading, grid)
    run(
        _kl_fwd_kernel,
        grid,
        _NS_PER_ELEMENT * grid.elements,
        rows_of(mu),
        rows_of(logvar),
        totals.data_ptr(),
        *grid.sizes,
    )
    return row_sums(totals, grid.leading, grid)


def kl_standard_normal_bwd(
    dkl: Tensor, mu: Tensor, logvar: Tensor, out: tuple[Tensor, Tensor] | None = None
) -> tuple[Tensor, Tensor]:
    """(dmu, dlogvar) `[..., L]` for dkl `[...]`, written to `out` if given."""
    grid = plan(mu.shape)
    dkl, dkl_rows = scalars_of(dkl)
    mu, logvar = walkable(mu), walkable(logvar)
    out_mu, out_logvar = out or (None, None)
    dmu, dlogvar = destination(out_mu, mu), destination(out_logvar, mu)
    run(
        _kl_bwd_kernel,
        grid,
        _NS_PER_ELEMENT * grid.elements,
        dkl_rows,
        rows_of(mu),
        rows_of(logvar),
        rows_of(dmu),
        rows_of(dlogvar),
        *grid.sizes,
    )
    return deliver(dmu, out_mu), deliver(dlogvar, out_logvar)
