"""Sample and divergence in one pass, the latent half of SGVB estimator B (Kingma & Welling, 2013):

    z = mu + sigma * eps,  sigma = exp(logvar / 2)          dmu     = dz + dkl * mu
    kl = 1/2 sum_l [mu^2 + expm1(logvar) - logvar]          dlogvar = 1/2 (dz * sigma * eps + dkl * expm1(logvar))

mu, logvar, z `[*leading, L]` float32, bfloat16 or float16; kl `[*leading]` float32, nats. eps ~ N(0, I) is drawn in the
kernel from (seed, stream, example, sample, latent) and drawn again in the backward, never stored.
"""

# triton ships no types, and types jitted functions at launch
# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call, import-untyped"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._layout import Rows, as_rows, device_guard, grid_1d, vector_width
from ._math import exponentials, normal
from ._philox import load_key
from ._rows import locate_rows, output_rows, sum_partials, sums_layout
from ._tiles import column_bands, load_tile, row_pointer, single_tiles, split_program, store_tile, whole_rows
from .kl_standard_normal import kl_grads, kl_term

_UNSPECIALISED = ["num_rows", "num_examples", "example_offset", "stream"]
_UNSPECIALISED_BWD = [*_UNSPECIALISED, "sum_stride", "tiles"]


@triton.jit(do_not_specialize=_UNSPECIALISED)
def _reparameterize_kl_fwd_kernel(
    mu_ptr,  # [K, B, L]
    logvar_ptr,  # [K, B, L]
    seed_ptr,  # [1]
    z_ptr,  # [K * B, L], contiguous
    kl_ptr,  # [splits, K * B]
    kl_per_dim_ptr,  # [groups, L], or None
    num_rows,
    num_examples,
    num_elements,
    mu_stride_k,
    mu_stride_b,
    mu_stride_l,
    logvar_stride_k,
    logvar_stride_b,
    logvar_stride_l,
    tiles,
    splits,
    chunks,
    example_offset: tl.int64,
    stream: tl.int32,
    W: tl.constexpr,
    SAMPLES: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    """`num_elements` and the strides k and b count units of W."""
    PRECISE: tl.constexpr = z_ptr.dtype.element_ty == tl.float32
    L = num_elements * W
    group, split = split_program(tl.program_id(0), splits)
    key_lo, key_hi = load_key(seed_ptr)
    if kl_per_dim_ptr is not None:
        per_dim = tl.zeros((ROWS, COLS), tl.float32)
    for tile in range(0, tiles):
        first_row = (group * tiles + tile).to(tl.int64) * ROWS
        row, k, b = locate_rows(first_row, num_examples, ROWS, SAMPLES)
        in_rows = row < num_rows
        mu_row = row_pointer(mu_ptr, k, b, mu_stride_k, mu_stride_b, W)
        logvar_row = row_pointer(logvar_ptr, k, b, logvar_stride_k, logvar_stride_b, W)
        z_row = row_pointer(z_ptr, 0, row, 0, num_elements, W)
        kl = tl.zeros((ROWS, COLS), tl.float32)
        for chunk in range(0, chunks):
            first_col = (split * chunks + chunk) * COLS
            col = first_col + tl.arange(0, COLS)[None, :]
            mask = in_rows & (col < L)
            mu = load_tile(mu_row, col, mu_stride_l, mask)
            logvar = load_tile(logvar_row, col, logvar_stride_l, mask)
            sigma, variance = exponentials(logvar, PRECISE)
            eps = normal(
                first_col, b + example_offset, k, stream, key_lo, key_hi, COLS, W >= 8 and not PRECISE, PRECISE
            )
            store_tile(z_row, col, 1, tl.fma(sigma, eps, mu), mask)
            term = kl_term(mu, logvar, variance, PRECISE)
            kl += term
            if kl_per_dim_ptr is not None:
                per_dim += term
        rows = first_row + tl.arange(0, ROWS)
        tl.store(kl_ptr + split.to(tl.int64) * num_rows + rows, 0.5 * tl.sum(kl, axis=1), rows < num_rows)
    if kl_per_dim_ptr is not None:
        # here a program has one tile of columns
        cols = split * COLS + tl.arange(0, COLS)
        tl.store(kl_per_dim_ptr + group.to(tl.int64) * L + cols, 0.5 * tl.sum(per_dim, axis=0), cols < L)


@triton.jit(do_not_specialize=_UNSPECIALISED_BWD)
def _reparameterize_kl_bwd_kernel(
    dz_ptr,  # [K, B, L], or None
    dkl_ptr,  # [K, B], or None
    mu_ptr,  # [K, B, L]
    logvar_ptr,  # [K, B, L]
    seed_ptr,  # [1]
    dmu_ptr,  # [K, B, L]
    dlogvar_ptr,  # [K, B, L]
    column_sum_ptr,  # [groups, 2 L]: of dmu, then of dlogvar; or None
    num_rows,
    num_examples,
    num_elements,
    dz_stride_k,
    dz_stride_b,
    dz_stride_l,
    dkl_stride_k,
    dkl_stride_b,
    mu_stride_k,
    mu_stride_b,
    mu_stride_l,
    logvar_stride_k,
    logvar_stride_b,
    logvar_stride_l,
    dmu_stride_k,
    dmu_stride_b,
    dmu_stride_l,
    dlogvar_stride_k,
    dlogvar_stride_b,
    dlogvar_stride_l,
    sum_stride,
    tiles,
    splits,
    example_offset: tl.int64,
    stream: tl.int32,
    W: tl.constexpr,
    SUM_WIDTH: tl.constexpr,
    SAMPLES: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    """`num_elements` and the strides k and b, but those of dkl, count units of W, `sum_stride` of SUM_WIDTH."""
    PRECISE: tl.constexpr = dmu_ptr.dtype.element_ty == tl.float32
    SUMS: tl.constexpr = column_sum_ptr is not None
    group, split = split_program(tl.program_id(0), splits)
    first_col = split * COLS
    col = first_col + tl.arange(0, COLS)[None, :]
    L = num_elements * W
    if dz_ptr is not None:
        key_lo, key_hi = load_key(seed_ptr)
    if SUMS:
        dmu_sum = tl.zeros((ROWS, COLS), tl.float32)
        dlogvar_sum = tl.zeros((ROWS, COLS), tl.float32)
    # without sums there is one tile: bounds that say so leave no loop
    first_tile = group * tiles if SUMS else group
    last_tile = tl.minimum(first_tile + tiles, tl.cdiv(num_rows, ROWS)) if SUMS else group + 1
    for tile in range(first_tile, last_tile):
        row, k, b = locate_rows(tl.cast(tile, tl.int64) * ROWS, num_examples, ROWS, SAMPLES)
        mask = (row < num_rows) & (col < L)
        logvar_row = row_pointer(logvar_ptr, k, b, logvar_stride_k, logvar_stride_b, W)
        logvar = load_tile(logvar_row, col, logvar_stride_l, mask)
        sigma, variance = exponentials(logvar, PRECISE)
        dmu = tl.zeros((ROWS, COLS), tl.float32)
        dlogvar = tl.zeros((ROWS, COLS), tl.float32)
        if dz_ptr is not None:
            eps = normal(
                first_col, b + example_offset, k, stream, key_lo, key_hi, COLS, W >= 8 and not PRECISE, PRECISE
            )
            dmu = load_tile(row_pointer(dz_ptr, k, b, dz_stride_k, dz_stride_b, W), col, dz_stride_l, mask)
            dlogvar = dmu * (sigma * eps)
        if dkl_ptr is not None:
            dkl = tl.load(row_pointer(dkl_ptr, k, b, dkl_stride_k, dkl_stride_b, 1), row < num_rows, other=0.0)
            mu = load_tile(row_pointer(mu_ptr, k, b, mu_stride_k, mu_stride_b, W), col, mu_stride_l, mask)
            kl_dmu, kl_dlogvar = kl_grads(mu, logvar, variance, PRECISE)
            dmu = tl.fma(dkl, kl_dmu, dmu)
            dlogvar = tl.fma(dkl, kl_dlogvar, dlogvar)
        dlogvar = 0.5 * dlogvar
        store_tile(row_pointer(dmu_ptr, k, b, dmu_stride_k, dmu_stride_b, W), col, dmu_stride_l, dmu, mask)
        dlogvar_row = row_pointer(dlogvar_ptr, k, b, dlogvar_stride_k, dlogvar_stride_b, W)
        store_tile(dlogvar_row, col, dlogvar_stride_l, dlogvar, mask)
        if SUMS:
            # padded rows are 0: logvar, mu and dz are, and no noise is added to them
            dmu_sum += dmu
            dlogvar_sum += dlogvar
    if SUMS:
        sum_row = column_sum_ptr + group.to(tl.int64) * sum_stride * SUM_WIDTH
        tl.store(sum_row + col, tl.sum(dmu_sum, axis=0, keep_dims=True), col < L)
        tl.store(sum_row + L + col, tl.sum(dlogvar_sum, axis=0, keep_dims=True), col < L)


def reparameterize_kl_fwd(
    mu: Tensor, logvar: Tensor, seed: Tensor, example_offset: int, stream: int, per_dim: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    """(z, kl, kl_per_dim or None); kl_per_dim `[L]` float32 is the sum of the latents' own terms over all rows."""
    *leading, L = mu.shape
    z = torch.empty(mu.shape, dtype=mu.dtype, device=mu.device)
    if not mu.numel():
        kl = torch.zeros(leading, dtype=torch.float32, device=mu.device)
        return z, kl, kl.new_zeros(L) if per_dim else None
    mu_rows, logvar_rows = as_rows(mu), as_rows(logvar)
    B = leading[-1] if leading else 1
    num_rows = mu.numel() // L
    W = vector_width(L, mu_rows, logvar_rows)
    plan = column_bands(num_rows, L) if per_dim else whole_rows(num_rows, L)
    kl = torch.empty(plan.splits, *leading, dtype=torch.float32, device=mu.device)
    kl_per_dim = torch.empty(plan.groups, L, dtype=torch.float32, device=mu.device) if per_dim else None
    with device_guard(mu):
        _reparameterize_kl_fwd_kernel[grid_1d(plan.groups, plan.splits)](
            mu_rows.tensor,
            logvar_rows.tensor,
            seed,
            z,
            kl,
            kl_per_dim,
            num_rows,
            B,
            L // W,
            *mu_rows.strides_in(W),
            *logvar_rows.strides_in(W),
            plan.tiles,
            plan.splits,
            plan.chunks,
            example_offset,
            stream,
            W=W,
            SAMPLES=num_rows != B,
            ROWS=plan.rows,
            COLS=plan.cols,
        )
    return z, *sum_partials(kl, kl_per_dim)


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
    """(dmu, dlogvar), in `out` if given, of any strides; a missing upstream gradient is zero and is not read.

    Partial sums over the rows go to `column_sum` `[groups, 2 L]`, if it is given: those of dmu, then of dlogvar.
    """
    dmu, dlogvar = out or (torch.empty_like(t, memory_format=torch.contiguous_format) for t in (mu, logvar))
    if not mu.numel():
        return dmu, dlogvar
    *leading, L = mu.shape
    B = leading[-1] if leading else 1
    num_rows = mu.numel() // L
    # a missing tensor has strides that no kernel reads
    dz_rows = Rows(dmu, 0, 0, 1) if dz is None else as_rows(dz)
    dkl_rows = Rows(dmu, 0, 0, 1) if dkl is None else as_rows(dkl, event=False)
    mu_rows, logvar_rows, dmu_rows, dlogvar_rows = as_rows(mu), as_rows(logvar), output_rows(dmu), output_rows(dlogvar)
    W = vector_width(L, dz_rows, mu_rows, logvar_rows, dmu_rows, dlogvar_rows)
    plan = single_tiles(num_rows, L) if column_sum is None else column_bands(num_rows, L, len(column_sum))
    sum_stride, sum_width = (0, 1) if column_sum is None else sums_layout(column_sum)
    with device_guard(mu):
        _reparameterize_kl_bwd_kernel[grid_1d(plan.groups, plan.splits)](
            None if dz is None else dz_rows.tensor,
            None if dkl is None else dkl_rows.tensor,
            mu_rows.tensor,
            logvar_rows.tensor,
            seed,
            dmu,
            dlogvar,
            column_sum,
            num_rows,
            B,
            L // W,
            *dz_rows.strides_in(W),
            dkl_rows.stride_k,
            dkl_rows.stride_b,
            *mu_rows.strides_in(W),
            *logvar_rows.strides_in(W),
            *dmu_rows.strides_in(W),
            *dlogvar_rows.strides_in(W),
            sum_stride,
            plan.tiles,
            plan.splits,
            example_offset,
            stream,
            W=W,
            SUM_WIDTH=sum_width,
            SAMPLES=num_rows != B,
            ROWS=plan.rows,
            COLS=plan.cols,
        )
    return dmu, dlogvar
