"""Gaussian negative log-likelihood of diagonal covariance: Kingma & Welling, 2013, Appendix C.2.

    nll     = 1/2 sum_d [log 2 pi + logvar_d + s_d],  s_d = (x_d - mu_d)^2 exp(-logvar_d)
    dmu     = dnll * (mu - x) exp(-logvar)            dlogvar = dnll / 2 * (1 - s)

mu `[*leading, D]` float32, bfloat16 or float16; x of the same shape, float, bool or uint8 (x / 255); logvar of the same
shape, per feature `[D]` or scalar `[]`, and dlogvar summed to that; nll `[*leading]` float32, nats.

With a floor, logvar is raw: the log-variance is floor + softplus(raw - floor), and dlogvar is the gradient of raw.
"""

# triton ships no types, and types jitted functions at launch
# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call, import-untyped"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._data import as_bytes, unit_interval
from ._layout import Rows, as_rows, device_guard, grid_1d, merge_rows, vector_width
from ._math import exponential, inverse, log1p
from ._rows import column_walk, load_weight, locate_rows, output_rows, row_walk, sum_partials

_LOG_2_PI = tl.constexpr(1.8378770664093453)

_UNSPECIALISED = [
    *("num_rows", "num_examples", "num_elements", "tiles", "splits", "chunks"),
    *("mu_stride_k", "mu_stride_b", "logvar_stride_k", "logvar_stride_b", "x_stride_k", "x_stride_b"),
    *("weight_stride_k", "weight_stride_b"),
    *("dmu_stride_k", "dmu_stride_b", "dlogvar_stride_k", "dlogvar_stride_b"),
]


@triton.jit
def _terms(mu, logvar, x, PRECISE: tl.constexpr):
    """(difference / variance, s)."""
    difference = x - mu
    scaled = difference * exponential(-logvar, PRECISE)
    return scaled, difference * scaled


@triton.jit
def _floored(raw, floor, PRECISE: tl.constexpr):
    """(floor + softplus(raw - floor), its derivative)."""
    above = raw - floor
    e = exponential(-tl.abs(above), PRECISE)
    logvar = floor + (tl.maximum(above, 0.0) + log1p(e))
    return logvar, tl.where(above > 0.0, 1.0, e) * inverse(1.0 + e, PRECISE)


@triton.jit
def _step(
    mu_row,  # pointers [ROWS, 1]
    logvar_row,  # pointers [ROWS, 1]
    x_row,  # pointers [ROWS, 1]
    dmu_row,  # pointers [ROWS, 1], or None
    dlogvar_row,  # pointers [ROWS, 1], or None
    weight,  # [ROWS, 1]
    first,
    D,
    in_rows,  # [ROWS, 1]
    mu_stride_d,
    logvar_stride_d,
    x_stride_d,
    dmu_stride_d,
    dlogvar_stride_d,
    floor,
    COLS: tl.constexpr,
    LEVELS: tl.constexpr,
    FLOORED: tl.constexpr,
    MASKED: tl.constexpr,
):
    """The columns from `first` on: twice their nll, without the constant, dmu and dlogvar, also stored."""
    PRECISE: tl.constexpr = mu_row.dtype.element_ty == tl.float32
    col = (first + tl.arange(0, COLS)[None, :]).to(tl.int64)
    mask = in_rows & (col < D) if MASKED else in_rows
    # the padding, a mean of 0 with x = 0 and logvar = 0, adds 0
    mu = tl.load(mu_row + col * mu_stride_d, mask, other=0.0).to(tl.float32)
    x = unit_interval(tl.load(x_row + col * x_stride_d, mask, other=0), LEVELS, PRECISE)
    logvar = tl.load(logvar_row + col * logvar_stride_d, mask, other=0.0).to(tl.float32)
    if FLOORED:
        logvar, slope = _floored(logvar, floor, PRECISE)
        logvar = tl.where(mask, logvar, 0.0) if MASKED else logvar
    scaled, s = _terms(mu, logvar, x, PRECISE)
    dmu = -weight * scaled
    dlogvar = 0.5 * weight * (1.0 - s)
    if FLOORED:
        dlogvar *= slope
    if dmu_row is not None:
        tl.store(dmu_row + col * dmu_stride_d, dmu.to(dmu_row.dtype.element_ty), mask)
    if dlogvar_row is not None:
        tl.store(dlogvar_row + col * dlogvar_stride_d, dlogvar.to(dlogvar_row.dtype.element_ty), mask)
    return logvar + s, dmu, dlogvar


@triton.jit(do_not_specialize=_UNSPECIALISED)
def _gaussian_nll_kernel(
    mu_ptr,  # [K, B, D]
    logvar_ptr,  # [K, B, D]; strides of 0 where it is shared
    x_ptr,  # [K, B, D]
    weight_ptr,  # [K, B], or None for 1 / num_rows each
    nll_ptr,  # [splits, K * B], or None without the loss
    dmu_ptr,  # [K, B, D], or None without gradients
    dlogvar_ptr,  # [K, B, D], or None without its gradient or if it is shared
    sum_ptr,  # dmu and dlogvar [groups, 2, D]; dlogvar alone, SHARED: 1 [groups, D], 2 [groups, splits]; or None
    num_rows,
    num_examples,
    num_elements,
    mu_stride_k,
    mu_stride_b,
    mu_stride_d,
    logvar_stride_k,
    logvar_stride_b,
    logvar_stride_d,
    x_stride_k,
    x_stride_b,
    x_stride_d,
    weight_stride_k,
    weight_stride_b,
    dmu_stride_k,
    dmu_stride_b,
    dmu_stride_d,
    dlogvar_stride_k,
    dlogvar_stride_b,
    dlogvar_stride_d,
    tiles,
    splits,
    chunks,
    floor: tl.float32,
    WIDTH: tl.constexpr,
    LEVELS: tl.constexpr,
    FLOORED: tl.constexpr,
    SHARED: tl.constexpr,
    SAMPLES: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    TAIL: tl.constexpr,
):
    """See `_rows` for the walk. `num_elements` and the strides k and b of all but the weight count units of WIDTH."""
    SUMS: tl.constexpr = sum_ptr is not None
    D = num_elements * WIDTH
    group = (tl.program_id(0) // splits).to(tl.int64)
    split = tl.program_id(0) % splits
    whole = D // COLS
    begin = split * chunks
    dmu_sum = tl.zeros((ROWS, COLS), tl.float32)
    dlogvar_sum = tl.zeros((ROWS, COLS), tl.float32)

    # along the rows there is one tile: bounds that say so leave no loop
    first_tile = group * tiles if SUMS else group
    last_tile = tl.minimum(first_tile + tiles, tl.cdiv(num_rows, ROWS)) if SUMS else group + 1
    for tile in range(first_tile, last_tile):
        row, k, b = locate_rows(tile * ROWS, num_examples, ROWS, SAMPLES)
        in_rows = row < num_rows
        mu_row = mu_ptr + (k * mu_stride_k + b * mu_stride_b) * WIDTH
        logvar_row = logvar_ptr + (k * logvar_stride_k + b * logvar_stride_b) * WIDTH
        x_row = x_ptr + (k * x_stride_k + b * x_stride_b) * WIDTH
        dmu_row = None
        dlogvar_row = None
        weight = 0.0
        if dmu_ptr is not None:
            weight = load_weight(weight_ptr, k * weight_stride_k + b * weight_stride_b, num_rows, in_rows)
            dmu_row = dmu_ptr + (k * dmu_stride_k + b * dmu_stride_b) * WIDTH
        if dlogvar_ptr is not None:
            dlogvar_row = dlogvar_ptr + (k * dlogvar_stride_k + b * dlogvar_stride_b) * WIDTH
        if SUMS:
            terms, dmu, dlogvar = _step(
                mu_row, logvar_row, x_row, dmu_row, dlogvar_row, weight, split * COLS, D, in_rows, mu_stride_d,
                logvar_stride_d, x_stride_d, dmu_stride_d, dlogvar_stride_d, floor, COLS, LEVELS, FLOORED, True,
            )  # fmt: skip
            dmu_sum += dmu
            dlogvar_sum += dlogvar
            nll = tl.sum(terms, axis=1, keep_dims=True)
        else:
            total = tl.zeros((ROWS, COLS // 2), tl.float32)
            for chunk in range(begin, tl.minimum(begin + chunks, whole)):
                terms, dmu, dlogvar = _step(
                    mu_row, logvar_row, x_row, dmu_row, dlogvar_row, weight, chunk * COLS, D, in_rows, mu_stride_d,
                    logvar_stride_d, x_stride_d, dmu_stride_d, dlogvar_stride_d, floor, COLS, LEVELS, FLOORED, False,
                )  # fmt: skip
                # neighbours first, for half of the registers
                left, right = tl.split(tl.reshape(terms, (ROWS, COLS // 2, 2)))
                total += left + right
            nll = tl.sum(total, axis=1, keep_dims=True)
            if TAIL:  # noqa: SIM102  # known at compile time, the next one is not
                if split == splits - 1:
                    tail, dmu, dlogvar = _step(
                        mu_row, logvar_row, x_row, dmu_row, dlogvar_row, weight, whole * COLS, D, in_rows, mu_stride_d,
                        logvar_stride_d, x_stride_d, dmu_stride_d, dlogvar_stride_d, floor, TAIL, LEVELS, FLOORED, True,
                    )  # fmt: skip
                    nll += tl.sum(tail, axis=1, keep_dims=True)
        if nll_ptr is not None:
            nll += tl.where(split == 0, _LOG_2_PI * D, 0.0)
            tl.store(nll_ptr + split.to(tl.int64) * num_rows + row, 0.5 * nll, in_rows)

    if SUMS:
        col = split * COLS + tl.arange(0, COLS)[None, :]
        dlogvar_sum = tl.sum(dlogvar_sum, axis=0, keep_dims=True)
        if SHARED == 2:
            tl.store(sum_ptr + tl.program_id(0), tl.sum(tl.where(col < D, dlogvar_sum, 0.0)))
        elif SHARED == 1:
            tl.store(sum_ptr + group * D + col, dlogvar_sum, col < D)
        else:
            tl.store(sum_ptr + group * 2 * D + col, tl.sum(dmu_sum, axis=0, keep_dims=True), col < D)
            tl.store(sum_ptr + (group * 2 + 1) * D + col, dlogvar_sum, col < D)


def _launch(
    mu: Tensor,
    logvar: Tensor,
    x: Tensor,
    weight: Tensor | None,
    dmu: Tensor | None,
    dlogvar: Tensor | None,
    *,
    loss: bool,
    sums: bool,
    floor: float | None,
) -> tuple[Tensor | None, Tensor | None]:
    """One pass: (nll, sums of dmu and dlogvar `[2, D]`) as far as they are wanted, gradients into `dmu` and `dlogvar`.

    A shared dlogvar, contiguous, is a sum over the rows itself.
    """
    *leading, D = mu.shape
    x, levels = as_bytes(x)
    shared = 0 if logvar.shape == mu.shape else 2 - logvar.ndim
    mu_rows = as_rows(mu)
    rows = [mu_rows, as_rows(logvar.expand(mu.shape)), as_rows(x)]
    # what is absent, or no gradient of each element, gets the strides of mu, which are not used
    rows += [mu_rows if t is None or t.shape != mu.shape else output_rows(t) for t in (dmu, dlogvar)]
    width = vector_width(D, *rows)
    rows.append(Rows(mu, 0, 0, 0) if weight is None else as_rows(weight, event=False))
    K, B, (mu_rows, logvar_rows, x_rows, dmu_rows, dlogvar_rows, weight_rows) = merge_rows(mu.shape, *rows)
    place = dlogvar if shared else None
    walk = (column_walk if sums or place is not None else row_walk)(K * B, D, mu.element_size())
    nll = mu.new_empty((walk.splits, *leading), dtype=torch.float32) if loss else None
    partial = None
    if sums:
        partial = mu.new_empty((walk.groups, 2, D), dtype=torch.float32)
    elif place is not None:
        parts = walk.groups * (walk.splits if shared == 2 else 1)
        if parts == 1:
            partial, place = place[None], None
        else:
            partial = mu.new_empty((parts, *place.shape), dtype=torch.float32)
    with device_guard(mu):
        _gaussian_nll_kernel[grid_1d(walk.groups, walk.splits)](
            mu_rows.tensor,
            logvar_rows.tensor,
            x_rows.tensor,
            None if weight is None else weight_rows.tensor,
            nll,
            dmu,
            None if shared else dlogvar,
            partial,
            K * B,
            B,
            D // width,
            *mu_rows.strides_in(width),
            *logvar_rows.strides_in(width),
            *x_rows.strides_in(width),
            weight_rows.stride_k,
            weight_rows.stride_b,
            *dmu_rows.strides_in(width),
            *dlogvar_rows.strides_in(width),
            walk.tiles,
            walk.splits,
            walk.chunks,
            0.0 if floor is None else floor,
            WIDTH=width,
            LEVELS=levels,
            FLOORED=floor is not None,
            SHARED=shared,
            SAMPLES=K > 1,
            ROWS=walk.rows,
            COLS=walk.cols,
            TAIL=walk.tail,
            num_warps=walk.warps,
        )
    if nll is not None:
        return sum_partials(nll, partial, second_out=place)
    if partial is not None and place is not None:
        sum_partials(partial, out=place)
    return None, None


def gaussian_nll_fwd(mu: Tensor, logvar: Tensor, x: Tensor, floor: float | None = None) -> Tensor:
    """nll float32 `[*leading]`."""
    if not mu.numel():
        return mu.new_zeros(mu.shape[:-1], dtype=torch.float32)
    nll, _ = _launch(mu, logvar, x, None, None, None, loss=True, sums=False, floor=floor)
    assert nll is not None
    return nll


def _gradients(
    weight: Tensor | None,
    mu: Tensor,
    logvar: Tensor,
    x: Tensor,
    out: tuple[Tensor, Tensor] | None,
    *,
    loss: bool,
    sums: bool,
    floor: float | None,
) -> tuple[Tensor | None, Tensor, Tensor, Tensor | None]:
    """(nll, dmu, dlogvar, sums of both); a shared dlogvar is a sum over the rows, in the shape and dtype of logvar."""
    if out is not None:
        dmu, dlogvar = out
    else:
        dmu = torch.empty(mu.shape, dtype=mu.dtype, device=mu.device)
        dlogvar = torch.empty(logvar.shape, dtype=logvar.dtype, device=logvar.device)
    if not mu.numel():
        nll = mu.new_zeros(mu.shape[:-1], dtype=torch.float32)
        return nll, dmu, dlogvar.zero_(), mu.new_zeros((2, mu.shape[-1]), dtype=torch.float32) if sums else None
    losses, both = _launch(mu, logvar, x, weight, dmu, dlogvar, loss=loss, sums=sums, floor=floor)
    return losses, dmu, dlogvar, both if sums else None


def gaussian_nll_bwd(
    dnll: Tensor, mu: Tensor, logvar: Tensor, x: Tensor, floor: float | None = None
) -> tuple[Tensor, Tensor]:
    """(dmu, dlogvar) in the dtypes and shapes of mu and logvar; dnll float32 `[*leading]` of any strides."""
    _, dmu, dlogvar, _ = _gradients(dnll, mu, logvar, x, None, loss=False, sums=False, floor=floor)
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
    """(nll, dmu, dlogvar, column sums of dmu and dlogvar `[D]` float32 or None) in one pass over mu, logvar and x.

    dmu and dlogvar are the gradients of sum_r row_weight_r nll_r, `row_weight` float32 `[*leading]`, or None for
    1 / rows. `out` takes them, in any strides, and may be mu and logvar themselves. `column_sums` needs a logvar in the
    shape of mu.
    """
    nll, dmu, dlogvar, sums = _gradients(row_weight, mu, logvar, x, out, loss=True, sums=column_sums, floor=floor)
    assert nll is not None
    return nll, dmu, dlogvar, None if sums is None else (sums[0], sums[1])
