"""K samples of each posterior, z_k = mu + sigma eps_k, and what goes with them: the kernels of two operations.

`reparameterize` draws, `reparameterize_log_ratio` draws and weighs. mu and logvar are read, and sigma computed, once
for all samples of a row; the gradients are summed over the samples where they are made.

With r = log p(z) - log q(z|x) = 1/2 sum_l [eps_l^2 + logvar_l - z_l^2] and upstream gradients dz, dr, per sample:

    grad = dz - dr z,   dmu = sum_k grad,   dlogvar = sum_k [grad sigma eps / 2 + dr / 2]

as eps does not change with mu and logvar. Sticking the landing drops the score of q: grad gains dr eps / sigma, and the
last term goes.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from ._jit import kernel, loop, term
from ._layout import NO_ROWS, PIECE, Rows, deliver, destination, plan, rows_of, scalars_of, walkable
from ._math import HALF, ZERO, exp
from ._philox import MAX_NORMALS, draw_rows, slots_per_draw
from ._pieces import row_address, store_piece
from ._pointers import f32_at, f32_scratch, f64_scratch, i64_at, shifted
from ._reduce import row_sums, row_totals
from ._threads import run

__all__ = ["draw_samples", "samples_backward"]

_NS_PER_ELEMENT = 0.8
# samples whose gradients are added up in float32, before they join a sum in float64
FLUSH = 32


@term
def _one_piece(rows: Rows, K: int, B: int, L: int) -> bool:
    """Whether the rows follow each other in memory."""
    return rows[2] == 4 * L and (K == 1 or rows[1] == 4 * L * B)


@loop
def _sigma_piece(logvar: Any, sigma: Any, count: int) -> None:
    for d in range(count):
        sigma[d] = exp(HALF * logvar[d])


@loop
def _z_piece(mu: Any, sigma: Any, eps: Any, z: Any, count: int) -> None:
    for d in range(count):
        z[d] = mu[d] + sigma[d] * eps[d]


@loop
def _z_and_ratio_piece(mu: Any, logvar: Any, sigma: Any, eps: Any, z: Any, count: int) -> Any:
    total = ZERO
    for d in range(count):
        value = mu[d] + sigma[d] * eps[d]
        z[d] = value
        total += HALF * ((eps[d] * eps[d] - value * value) + logvar[d])
    return total


@loop
def _add_grad(dz: Any, sigma: Any, eps: Any, dmu: Any, dlogvar: Any, count: int) -> None:
    for d in range(count):
        dmu[d] += dz[d]
        dlogvar[d] += dz[d] * (HALF * sigma[d] * eps[d])


@loop
def _add_grad_with_ratio(dz: Any, dr: Any, mu: Any, sigma: Any, eps: Any, dmu: Any, dlogvar: Any, count: int) -> None:
    for d in range(count):
        grad = dz[d] - dr * (mu[d] + sigma[d] * eps[d])
        dmu[d] += grad
        dlogvar[d] += grad * (HALF * sigma[d] * eps[d]) + HALF * dr


@loop
def _add_grad_with_path(dz: Any, dr: Any, mu: Any, sigma: Any, eps: Any, dmu: Any, dlogvar: Any, count: int) -> None:
    """Sticking the landing."""
    for d in range(count):
        grad = dz[d] + dr * (eps[d] / sigma[d] - (mu[d] + sigma[d] * eps[d]))
        dmu[d] += grad
        dlogvar[d] += grad * (HALF * sigma[d] * eps[d])


@loop
def _clear(piece: Any, count: int) -> None:
    for d in range(count):
        piece[d] = ZERO


@loop
def _flush(piece: Any, totals: Any, count: int) -> None:
    """Moves what is in float32 into float64."""
    for d in range(count):
        totals[d] += np.float64(piece[d])
        piece[d] = ZERO


@loop
def _round(totals: Any, piece: Any, count: int) -> None:
    for d in range(count):
        piece[d] = np.float32(totals[d])
        totals[d] = 0.0


@kernel
def _fwd_kernel(
    first_tile: int,
    last_tile: int,
    mu: Rows,  # float32 [K, B, L]
    logvar: Rows,
    z: int,  # float32 [samples, K, B, L], contiguous
    ratio: int,  # float32 [samples * K * B, tiles across], or 0
    seed: int,  # int64 [1]
    samples: int,
    K: int,
    B: int,
    L: int,
    across: int,
    height: int,
    width: int,
    example_offset: int,
    sample_offset: int,
    stream: int,
    samples_are_examples: int,
) -> None:
    eps, sigma = f32_scratch(MAX_NORMALS), f32_scratch(512)
    slots = slots_per_draw(width)
    # short rows that follow each other are one, as are their normals, where nothing is summed over a row
    joined = samples == 1 and ratio == 0 and across == 1 and L % 4 == 0
    joined = joined and _one_piece(mu, K, B, L) and _one_piece(logvar, K, B, L)
    for tile in range(first_tile, last_tile):
        block, part = tile // across, tile % across
        end = min(L, (part + 1) * width)
        row, sample = block * height, 0
        bottom = min(K * B, (block + 1) * height) * samples
        for top in range(row * samples, bottom, slots):
            drawn = min(slots, bottom - top)
            total = 0.0
            for d in range(part * width, end, PIECE):
                count = min(PIECE, end - d)
                draw_rows(
                    eps,
                    top,
                    drawn,
                    samples,
                    K,
                    B,
                    d,
                    count,
                    i64_at(seed)[0],
                    stream,
                    example_offset,
                    sample_offset,
                    samples_are_examples,
                )
                step = drawn if joined else 1
                for i in range(0, drawn, step):
                    k, b = row // B, row % B
                    mu_piece = f32_at(row_address(mu, k, b) + 4 * d)
                    logvar_piece = f32_at(row_address(logvar, k, b) + 4 * d)
                    eps_piece = shifted(eps, i * ((count + 3) // 4 * 4))
                    z_row = sample * (K * B) + row
                    if i == 0 or sample == 0:
                        _sigma_piece(logvar_piece, sigma, step * count)
                    z_piece = f32_at(z + 4 * (z_row * L + d))
                    if ratio == 0:
                        _z_piece(mu_piece, sigma, eps_piece, z_piece, step * count)
                    else:
                        total += _z_and_ratio_piece(mu_piece, logvar_piece, sigma, eps_piece, z_piece, count)
                    if d + count == end:
                        if ratio != 0:
                            f32_at(ratio)[z_row * across + part] = np.float32(total)
                            total = 0.0
                        sample += 1
                        if sample == samples:
                            row, sample = row + step, 0


@kernel
def _bwd_kernel(
    first_tile: int,
    last_tile: int,
    dz: Rows,  # float32 [samples * K, B, L], or address 0: zero
    dr: Rows,  # float32 [samples * K, B], or address 0: no log ratio
    sticking_the_landing: int,
    mu: Rows,  # float32 [K, B, L], not read without dr
    logvar: Rows,
    dmu: Rows,  # address 0: not wanted
    dlogvar: Rows,
    seed: int,  # int64 [1]
    samples: int,
    K: int,
    B: int,
    L: int,
    across: int,
    height: int,
    width: int,
    example_offset: int,
    sample_offset: int,
    stream: int,
    samples_are_examples: int,
) -> None:
    eps, sigma, zeros = f32_scratch(MAX_NORMALS), f32_scratch(512), f32_scratch(512)
    mu_sum, logvar_sum = f32_scratch(512), f32_scratch(512)
    mu_total, logvar_total = f64_scratch(512), f64_scratch(512)
    if samples > FLUSH or dz[0] == 0:
        for d in range(PIECE):
            zeros[d], mu_total[d], logvar_total[d] = ZERO, 0.0, 0.0
    slots = slots_per_draw(width)
    # as in the forward
    joined = samples == 1 and dr[0] == 0 and across == 1 and L % 4 == 0 and _one_piece(dz, K, B, L)
    joined = joined and _one_piece(logvar, K, B, L) and _one_piece(dlogvar, K, B, L)
    joined = joined and (dmu[0] == 0 or _one_piece(dmu, K, B, L))
    for tile in range(first_tile, last_tile):
        block, part = tile // across, tile % across
        end = min(L, (part + 1) * width)
        bottom = min(K * B, (block + 1) * height) * samples
        for d in range(part * width, end, PIECE):
            count = min(PIECE, end - d)
            row, sample = block * height, 0
            for top in range(row * samples, bottom, slots):
                drawn = min(slots, bottom - top)
                draw_rows(
                    eps,
                    top,
                    drawn,
                    samples,
                    K,
                    B,
                    d,
                    count,
                    i64_at(seed)[0],
                    stream,
                    example_offset,
                    sample_offset,
                    samples_are_examples,
                )
                step = drawn if joined else 1
                for i in range(0, drawn, step):
                    k, b = row // B, row % B
                    mu_piece = f32_at(row_address(mu, k, b) + 4 * d)
                    eps_piece = shifted(eps, i * ((count + 3) // 4 * 4))
                    if i == 0 or sample == 0:
                        _sigma_piece(f32_at(row_address(logvar, k, b) + 4 * d), sigma, step * count)
                    if sample == 0:
                        _clear(mu_sum, step * count)
                        _clear(logvar_sum, step * count)
                    at = sample * K + k
                    dz_piece = zeros if dz[0] == 0 else f32_at(row_address(dz, at, b) + 4 * d)
                    if dr[0] == 0:
                        _add_grad(dz_piece, sigma, eps_piece, mu_sum, logvar_sum, step * count)
                    else:
                        dr_row = f32_at(row_address(dr, at, b))[0]
                        if sticking_the_landing:
                            _add_grad_with_path(dz_piece, dr_row, mu_piece, sigma, eps_piece, mu_sum, logvar_sum, count)
                        else:
                            _add_grad_with_ratio(
                                dz_piece, dr_row, mu_piece, sigma, eps_piece, mu_sum, logvar_sum, count
                            )
                    sample += 1
                    if samples > FLUSH and (sample % FLUSH == 0 or sample == samples):
                        _flush(mu_sum, mu_total, count)
                        _flush(logvar_sum, logvar_total, count)
                    if sample == samples:
                        if samples > FLUSH:
                            _round(mu_total, mu_sum, count)
                            _round(logvar_total, logvar_sum, count)
                        if dmu[0] != 0:
                            store_piece(mu_sum, f32_at(row_address(dmu, k, b) + 4 * d), step * count)
                        store_piece(logvar_sum, f32_at(row_address(dlogvar, k, b) + 4 * d), step * count)
                        row, sample = row + step, 0


def draw_samples(
    mu: Tensor,
    logvar: Tensor,
    seed: Tensor,
    num_samples: int | None,
    example_offset: int,
    sample_offset: int,
    stream: int,
    *,
    with_ratio: bool,
) -> tuple[Tensor, Tensor | None]:
    """z `[num_samples, ..., L]` (`[..., L]` for None) and, if asked for, the log ratio of each sample."""
    samples = 1 if num_samples is None else num_samples
    leading = mu.shape[:-1] if num_samples is None else torch.Size((num_samples, *mu.shape[:-1]))
    grid = plan(mu.shape, samples)
    mu, logvar = walkable(mu), walkable(logvar)
    z = torch.empty(*leading, grid.D, dtype=torch.float32)
    totals = row_totals(leading, grid) if with_ratio else None
    run(
        _fwd_kernel,
        grid,
        _NS_PER_ELEMENT * z.numel(),
        rows_of(mu),
        rows_of(logvar),
        z.data_ptr(),
        0 if totals is None else totals.data_ptr(),
        seed.data_ptr(),
        samples,
        *grid.sizes,
        example_offset,
        sample_offset,
        stream,
        int(num_samples is not None and mu.ndim == 1),
    )
    return z, None if totals is None else row_sums(totals, leading, grid)


def samples_backward(
    dz: Tensor | None,
    dr: Tensor | None,
    mu: Tensor | None,
    logvar: Tensor,
    seed: Tensor,
    num_samples: int | None,
    sticking_the_landing: bool,
    example_offset: int,
    sample_offset: int,
    stream: int,
    *,
    with_dmu: bool = True,
    out: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor | None, Tensor]:
    """(dmu if it is wanted, dlogvar) `[..., L]` for dz and dr of each sample; `mu` matters with dr alone."""
    samples = 1 if num_samples is None else num_samples
    grid = plan(logvar.shape, samples)
    dz_rows, dr_rows, mu_rows, dmu_rows = NO_ROWS, NO_ROWS, NO_ROWS, NO_ROWS
    samples_are_examples = num_samples is not None and logvar.ndim == 1
    if dz is not None:
        dz = walkable(dz.unsqueeze(-2) if samples_are_examples else dz)
        dz_rows = rows_of(dz)
    if dr is not None and mu is not None:
        dr, dr_rows = scalars_of(dr.unsqueeze(-1) if samples_are_examples else dr)
        mu = walkable(mu)
        mu_rows = rows_of(mu)
    logvar = walkable(logvar)
    out_mu, out_logvar = out or (None, None)
    dlogvar = destination(out_logvar, logvar)
    dmu = None
    if with_dmu:
        dmu = destination(out_mu, logvar)
        dmu_rows = rows_of(dmu)
    run(
        _bwd_kernel,
        grid,
        _NS_PER_ELEMENT * samples * grid.elements,
        dz_rows,
        dr_rows,
        int(sticking_the_landing),
        mu_rows,
        rows_of(logvar),
        dmu_rows,
        rows_of(dlogvar),
        seed.data_ptr(),
        samples,
        *grid.sizes,
        example_offset,
        sample_offset,
        stream,
        int(samples_are_examples),
    )
    return None if dmu is None else deliver(dmu, out_mu), deliver(dlogvar, out_logvar)
