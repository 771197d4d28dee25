"""z = mu + sigma eps and KL(N(mu, sigma^2) || N(0, I)) from one read of mu and logvar: SGVB estimator B's latent half.

    dmu = dz + dkl mu,   dlogvar = dz sigma eps / 2 + dkl expm1(logvar) / 2,   sigma = exp(logvar / 2)

The noise is drawn again in the backward, never stored. Source: Kingma & Welling 2013, Section 2.3, equation 7.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from torch import Tensor

from ._jit import kernel, loop
from ._layout import PIECE, Rows, deliver, destination, plan, rows_of, scalars_of, walkable
from ._math import HALF, ZERO, exp_and_square
from ._philox import MAX_NORMALS, draw_rows, slots_per_draw
from ._pieces import add_piece, row_address, store_piece
from ._pointers import f32_at, f32_scratch, f64_at, i64_at, shifted
from ._reduce import PartialSums, row_sums, row_totals
from ._samples import samples_backward
from ._threads import run
from .kl_standard_normal import kl_standard_normal_bwd

__all__ = ["reparameterize_kl_bwd", "reparameterize_kl_fwd"]

_NS_PER_ELEMENT = 0.85


@loop
def _fwd_piece(mu: Any, logvar: Any, eps: Any, z: Any, kl: Any, count: int) -> Any:
    total = ZERO
    for d in range(count):
        sigma, _, growth_minus = exp_and_square(HALF * logvar[d])
        z[d] = mu[d] + sigma * eps[d]
        kl[d] = HALF * (mu[d] * mu[d] + growth_minus)
        total += kl[d]
    return total


@loop
def _bwd_piece(dz: Any, dkl: Any, mu: Any, logvar: Any, eps: Any, dmu: Any, dlogvar: Any, count: int) -> None:
    for d in range(count):
        sigma, growth, _ = exp_and_square(HALF * logvar[d])
        dmu[d] = dz[d] + dkl * mu[d]
        dlogvar[d] = dz[d] * (HALF * sigma * eps[d]) + dkl * (HALF * growth)


@kernel
def _fwd_kernel(
    first_tile: int,
    last_tile: int,
    mu: Rows,  # float32 [K, B, L]
    logvar: Rows,
    z: Rows,
    kl: int,  # float32 [K * B, tiles across]
    sums: int,  # float64 [tiles down, L], or 0
    seed: int,  # int64 [1]
    K: int,
    B: int,
    L: int,
    across: int,
    height: int,
    width: int,
    example_offset: int,
    stream: int,
) -> None:
    eps, kl_piece = f32_scratch(MAX_NORMALS), f32_scratch(512)
    # several rows if a row is short; one row, piece by piece, if it is long
    rows = slots_per_draw(width)
    for tile in range(first_tile, last_tile):
        block, part = tile // across, tile % across
        bottom, end = min(K * B, (block + 1) * height), min(L, (part + 1) * width)
        k, b = block * height // B, block * height % B
        for top in range(block * height, bottom, rows):
            drawn = min(rows, bottom - top)
            total = 0.0
            for d in range(part * width, end, PIECE):
                count = min(PIECE, end - d)
                draw_rows(eps, top, drawn, 1, K, B, d, count, i64_at(seed)[0], stream, example_offset, 0, 0)
                for i in range(drawn):
                    total += _fwd_piece(
                        f32_at(row_address(mu, k, b) + 4 * d),
                        f32_at(row_address(logvar, k, b) + 4 * d),
                        shifted(eps, i * ((count + 3) // 4 * 4)),
                        f32_at(row_address(z, k, b) + 4 * d),
                        kl_piece,
                        count,
                    )
                    if sums != 0:
                        add_piece(kl_piece, f64_at(sums + 8 * (block * L + d)), count)
                    if d + count == end:
                        f32_at(kl)[(top + i) * across + part] = np.float32(total)
                        total = 0.0
                        b += 1
                        if b == B:
                            k, b = k + 1, 0


@kernel
def _bwd_kernel(
    first_tile: int,
    last_tile: int,
    dz: Rows,  # float32 [K, B, L]
    dkl: Rows,  # float32 [K, B]
    mu: Rows,
    logvar: Rows,
    dmu: Rows,
    dlogvar: Rows,
    sums: int,  # float64 [tiles down, 2 L]: of dmu, then of dlogvar; or 0
    seed: int,  # int64 [1]
    K: int,
    B: int,
    L: int,
    across: int,
    height: int,
    width: int,
    example_offset: int,
    stream: int,
) -> None:
    eps, dmu_piece, dlogvar_piece = f32_scratch(MAX_NORMALS), f32_scratch(512), f32_scratch(512)
    rows = slots_per_draw(width)
    # gradients that overwrite nothing are written where they belong
    direct = dmu[0] != dz[0] and dmu[0] != mu[0] and dlogvar[0] != dz[0] and dlogvar[0] != logvar[0]
    for tile in range(first_tile, last_tile):
        block, part = tile // across, tile % across
        bottom, end = min(K * B, (block + 1) * height), min(L, (part + 1) * width)
        k, b = block * height // B, block * height % B
        for top in range(block * height, bottom, rows):
            drawn = min(rows, bottom - top)
            for d in range(part * width, end, PIECE):
                count = min(PIECE, end - d)
                draw_rows(eps, top, drawn, 1, K, B, d, count, i64_at(seed)[0], stream, example_offset, 0, 0)
                for i in range(drawn):
                    to_mu, to_logvar = dmu_piece, dlogvar_piece
                    if direct:
                        to_mu = f32_at(row_address(dmu, k, b) + 4 * d)
                        to_logvar = f32_at(row_address(dlogvar, k, b) + 4 * d)
                    _bwd_piece(
                        f32_at(row_address(dz, k, b) + 4 * d),
                        f32_at(row_address(dkl, k, b))[0],
                        f32_at(row_address(mu, k, b) + 4 * d),
                        f32_at(row_address(logvar, k, b) + 4 * d),
                        shifted(eps, i * ((count + 3) // 4 * 4)),
                        to_mu,
                        to_logvar,
                        count,
                    )
                    if sums != 0:
                        add_piece(to_mu, f64_at(sums + 8 * (2 * block * L + d)), count)
                        add_piece(to_logvar, f64_at(sums + 8 * ((2 * block + 1) * L + d)), count)
                    if not direct:
                        store_piece(dmu_piece, f32_at(row_address(dmu, k, b) + 4 * d), count)
                        store_piece(dlogvar_piece, f32_at(row_address(dlogvar, k, b) + 4 * d), count)
                    if d + count == end:
                        b += 1
                        if b == B:
                            k, b = k + 1, 0


def reparameterize_kl_fwd(
    mu: Tensor, logvar: Tensor, seed: Tensor, example_offset: int, stream: int, per_dim: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    """(z `[..., L]`, kl `[...]`, kl of each latent summed over the rows `[L]` or None), float32, one pass."""
    grid = plan(mu.shape)
    mu, logvar = walkable(mu), walkable(logvar)
    z, totals = destination(None, mu), row_totals(grid.leading, grid)
    sums = PartialSums(grid) if per_dim else None
    run(
        _fwd_kernel,
        grid,
        _NS_PER_ELEMENT * grid.elements,
        rows_of(mu),
        rows_of(logvar),
        rows_of(z),
        totals.data_ptr(),
        0 if sums is None else sums.address,
        seed.data_ptr(),
        *grid.sizes,
        example_offset,
        stream,
    )
    return z, row_sums(totals, grid.leading, grid), None if sums is None else sums.per_column()


def reparameterize_kl_bwd(
    dz: Tensor | None,
    dkl: Tensor | None,
    mu: Tensor,
    logvar: Tensor,
    seed: Tensor,
    example_offset: int,
    stream: int,
    out: tuple[Tensor, Tensor] | None = None,
    column_sum: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """(dmu, dlogvar) `[..., L]` for dz `[..., L]` and dkl `[...]`; None for one of them is zero.

    Sums over the rows go to `column_sum` `[2 L]`, if it is given: those of dmu, then of dlogvar. Both upstream
    gradients must be there then.
    """
    if dz is None:
        dkl = mu.new_zeros(()).expand(mu.shape[:-1]) if dkl is None else dkl
        return kl_standard_normal_bwd(dkl, mu, logvar, out)
    if dkl is None:
        dmu, dlogvar = samples_backward(dz, None, None, logvar, seed, None, False, example_offset, 0, stream, out=out)
        assert dmu is not None
        return dmu, dlogvar
    grid = plan(mu.shape)
    dz, mu, logvar = walkable(dz), walkable(mu), walkable(logvar)
    dkl, dkl_rows = scalars_of(dkl)
    out_mu, out_logvar = out or (None, None)
    dmu, dlogvar = destination(out_mu, mu), destination(out_logvar, mu)
    sums = None if column_sum is None else PartialSums(grid, 2 * grid.D)
    run(
        _bwd_kernel,
        grid,
        _NS_PER_ELEMENT * grid.elements,
        rows_of(dz),
        dkl_rows,
        rows_of(mu),
        rows_of(logvar),
        rows_of(dmu),
        rows_of(dlogvar),
        0 if sums is None else sums.address,
        seed.data_ptr(),
        *grid.sizes,
        example_offset,
        stream,
    )
    if sums is not None:
        sums.per_column(column_sum)
    return deliver(dmu, out_mu), deliver(dlogvar, out_logvar)
