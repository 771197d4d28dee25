"""-log N(x; mu, exp(logvar)) = 1/2 sum_d [log 2 pi + logvar_d + (x_d - mu_d)^2 exp(-logvar_d)], in nats; its gradient.

    d/dmu = (mu - x) exp(-logvar),   d/dlogvar = [1 - (x - mu)^2 exp(-logvar)] / 2

`logvar` is full, per feature `[D]`, or scalar; the gradient of a shared one is summed over what shares it, in the same
pass. With a floor it is raw: the log-variance is floor + softplus(raw - floor), and the gradient that of raw.
Source: Kingma & Welling 2013, Appendix C.2.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from torch import Tensor

from ._data import data_kind, piece_at
from ._jit import kernel, loop, term
from ._layout import NO_ROWS, PIECE, Rows, deliver, destination, plan, rows_of, scalars_of, walkable
from ._math import HALF, ONE, ZERO, exp, exp_of_negative, log1p
from ._pieces import add_piece, row_address, store_piece
from ._pointers import f32_at, f32_scratch, f64_at
from ._reduce import PartialSums, row_sums, row_totals
from ._threads import run

__all__ = ["gaussian_nll_bwd", "gaussian_nll_fwd", "gaussian_nll_with_grad"]

_NS_PER_ELEMENT = 0.3
LOG_2PI = np.float32(math.log(2.0 * math.pi))


@term
def _nll_term(mu: Any, logvar: Any, x: Any) -> Any:
    residual = x - mu
    return HALF * ((LOG_2PI + logvar) + residual * residual * exp(-logvar))


@term
def _grad_terms(mu: Any, logvar: Any, x: Any) -> Any:
    residual = x - mu
    scaled = residual * exp(-logvar)
    return -scaled, HALF * (ONE - residual * scaled)


@loop
def _floor_piece(raw: Any, floor: Any, logvar: Any, slope: Any, count: int) -> None:
    """logvar = floor + softplus(raw - floor), and its derivative."""
    for d in range(count):
        above = raw[d] - floor
        e = exp_of_negative(-abs(above))
        logvar[d] = floor + ((above if above > ZERO else ZERO) + log1p(e))
        slope[d] = (ONE if above >= ZERO else e) / (ONE + e)


@loop
def _chain_piece(grad: Any, slope: Any, count: int) -> None:
    for d in range(count):
        grad[d] *= slope[d]


@loop
def _nll_piece(mu: Any, logvar: Any, x: Any, count: int) -> Any:
    total = ZERO
    for d in range(count):
        total += _nll_term(mu[d], logvar[d], x[d])
    return total


@loop
def _grad_piece(mu: Any, logvar: Any, x: Any, weight: Any, dmu: Any, dlogvar: Any, count: int) -> None:
    for d in range(count):
        by_mu, by_logvar = _grad_terms(mu[d], logvar[d], x[d])
        dmu[d] = weight * by_mu
        dlogvar[d] = weight * by_logvar


@loop
def _nll_and_grad_piece(mu: Any, logvar: Any, x: Any, weight: Any, dmu: Any, dlogvar: Any, count: int) -> Any:
    """Both in one loop, where the compiler shares their exponential."""
    total = ZERO
    for d in range(count):
        total += _nll_term(mu[d], logvar[d], x[d])
        by_mu, by_logvar = _grad_terms(mu[d], logvar[d], x[d])
        dmu[d] = weight * by_mu
        dlogvar[d] = weight * by_logvar
    return total


@kernel
def _gaussian_kernel(
    first_tile: int,
    last_tile: int,
    mu: Rows,  # float32 [K, B, D]
    logvar: Rows,  # float32 [K, B, D]
    x: Rows,  # [K, B, D] of type x_kind
    x_kind: int,
    weight: Rows,  # float32 [K, B], or address 0: 1 / (K * B) each
    dmu: Rows,  # float32 [K, B, D], may be `mu`, or address 0: no gradients
    dlogvar: Rows,  # float32 [K, B, D], may be `logvar`, or address 0: not wanted per element
    nll: int,  # float32 [K * B, tiles across], or 0
    mu_sums: int,  # float64 [tiles down, D], or 0
    logvar_sums: int,  # float64 [tiles down, D], or 0
    K: int,
    B: int,
    D: int,
    across: int,
    height: int,
    width: int,
    floored: int,
    floor: float,
) -> None:
    x_piece, dmu_piece, dlogvar_piece = f32_scratch(512), f32_scratch(512), f32_scratch(512)
    logvar_piece, slope = f32_scratch(512), f32_scratch(512)
    # gradients that overwrite nothing are written where they belong
    direct = dlogvar[0] != 0 and dmu[0] != mu[0] and dlogvar[0] != logvar[0]
    for tile in range(first_tile, last_tile):
        block, part = tile // across, tile % across
        k, b = block * height // B, block * height % B
        for r in range(block * height, min(K * B, (block + 1) * height)):
            mu_row = row_address(mu, k, b)
            logvar_row = row_address(logvar, k, b)
            x_row = row_address(x, k, b)
            dmu_row = row_address(dmu, k, b)
            dlogvar_row = row_address(dlogvar, k, b)
            w = np.float32(1.0 / (K * B))
            if weight[0] != 0:
                w = f32_at(row_address(weight, k, b))[0]
            total = 0.0
            end = min(D, (part + 1) * width)
            for d in range(part * width, end, PIECE):
                count = min(PIECE, end - d)
                x_here = piece_at(x_row, x_kind, d, count, x_piece)
                m, v = f32_at(mu_row + 4 * d), f32_at(logvar_row + 4 * d)
                if floored:
                    _floor_piece(v, np.float32(floor), logvar_piece, slope, count)
                    v = logvar_piece
                if dmu[0] == 0:
                    total += _nll_piece(m, v, x_here, count)
                else:
                    to_mu = f32_at(dmu_row + 4 * d) if direct else dmu_piece
                    to_logvar = f32_at(dlogvar_row + 4 * d) if direct else dlogvar_piece
                    if nll != 0:
                        total += _nll_and_grad_piece(m, v, x_here, w, to_mu, to_logvar, count)
                    else:
                        _grad_piece(m, v, x_here, w, to_mu, to_logvar, count)
                    if floored:
                        _chain_piece(to_logvar, slope, count)
                    if not direct:
                        store_piece(dmu_piece, f32_at(dmu_row + 4 * d), count)
                        if dlogvar[0] != 0:
                            store_piece(dlogvar_piece, f32_at(dlogvar_row + 4 * d), count)
                    if mu_sums != 0:
                        add_piece(to_mu, f64_at(mu_sums + 8 * (block * D + d)), count)
                    if logvar_sums != 0:
                        add_piece(to_logvar, f64_at(logvar_sums + 8 * (block * D + d)), count)
            if nll != 0:
                f32_at(nll)[r * across + part] = np.float32(total)
            b += 1
            if b == B:
                k, b = k + 1, 0


def _launch(
    mu: Tensor,
    logvar: Tensor,
    x: Tensor,
    weight: Tensor | None,
    *,
    with_nll: bool,
    with_grad: bool,
    column_sums: bool = False,
    out: tuple[Tensor, Tensor] | None = None,
    floor: float | None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None, tuple[Tensor, Tensor] | None]:
    """(nll, weight * d nll / d mu, weight * d nll / d logvar, their column sums), each if asked for.

    Without weights the gradients are those of the mean.
    """
    grid = plan(mu.shape)
    shared = logvar.shape != mu.shape
    # expanded over the rows, a log-variance per feature costs nothing; a scalar becomes one per feature
    wide_logvar = (logvar.expand(grid.D).contiguous() if shared else logvar).expand(mu.shape)
    mu, wide_logvar, x = walkable(mu), walkable(wide_logvar), walkable(x)
    totals = row_totals(grid.leading, grid) if with_nll else None
    mu_sums = PartialSums(grid) if column_sums else None
    logvar_sums = None
    dmu, dlogvar = None, None
    out_mu, out_logvar = out or (None, None)
    weight_rows, dmu_rows, dlogvar_rows = NO_ROWS, NO_ROWS, NO_ROWS
    if weight is not None:
        weight, weight_rows = scalars_of(weight)
    if with_grad:
        dmu = destination(out_mu, mu)
        dmu_rows = rows_of(dmu)
        if not shared:
            dlogvar = destination(out_logvar, mu)
            dlogvar_rows = rows_of(dlogvar)
        if shared or column_sums:
            logvar_sums = PartialSums(grid)
    run(
        _gaussian_kernel,
        grid,
        _NS_PER_ELEMENT * grid.elements,
        rows_of(mu),
        rows_of(wide_logvar),
        rows_of(x),
        data_kind(x),
        weight_rows,
        dmu_rows,
        dlogvar_rows,
        0 if totals is None else totals.data_ptr(),
        0 if mu_sums is None else mu_sums.address,
        0 if logvar_sums is None else logvar_sums.address,
        *grid.sizes,
        int(floor is not None),
        0.0 if floor is None else float(floor),
    )
    if shared and logvar_sums is not None:
        dlogvar = logvar_sums.total() if logvar.ndim == 0 else logvar_sums.per_column()
    return (
        None if totals is None else row_sums(totals, grid.leading, grid),
        None if dmu is None else deliver(dmu, out_mu),
        None if dlogvar is None else deliver(dlogvar, out_logvar),
        None if mu_sums is None or logvar_sums is None else (mu_sums.per_column(), logvar_sums.per_column()),
    )


def gaussian_nll_fwd(mu: Tensor, logvar: Tensor, x: Tensor, floor: float | None = None) -> Tensor:
    """nll `[...]` float32 for mu `[..., D]`, logvar `[..., D]`, `[D]` or `[]`, and x `[..., D]` of any data type.

    With a `floor` logvar is raw, here and below.
    """
    nll, _, _, _ = _launch(mu, logvar, x, None, with_nll=True, with_grad=False, floor=floor)
    assert nll is not None
    return nll


def gaussian_nll_bwd(
    dnll: Tensor, mu: Tensor, logvar: Tensor, x: Tensor, floor: float | None = None
) -> tuple[Tensor, Tensor]:
    """(dmu `[..., D]`, dlogvar of logvar's shape) for dnll `[...]`."""
    _, dmu, dlogvar, _ = _launch(mu, logvar, x, dnll, with_nll=False, with_grad=True, floor=floor)
    assert dmu is not None
    assert dlogvar is not None
    return dmu, dlogvar


def gaussian_nll_with_grad(
    mu: Tensor,
    logvar: Tensor,
    x: Tensor,
    row_weight: Tensor | None,
    column_sums: bool,
    floor: float | None = None,
    out: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor, Tensor, tuple[Tensor, Tensor] | None]:
    """(nll, row_weight * dmu, row_weight * dlogvar, sums of both over the rows or None); `out` may be (mu, logvar).

    `row_weight` `[...]` is 1 / rows where it is None.
    """
    nll, dmu, dlogvar, sums = _launch(
        mu, logvar, x, row_weight, with_nll=True, with_grad=True, column_sums=column_sums, out=out, floor=floor
    )
    assert nll is not None
    assert dmu is not None
    assert dlogvar is not None
    return nll, dmu, dlogvar, sums
