"""K samples and their log p(z) - log q(z|x), in one pass: SGVB estimator A (Kingma & Welling, 2013), IWAE (2015).

    z_k = mu + sigma * eps_k                  log_ratio_k = 1/2 sum_l [eps_k^2 + logvar - z_k^2]
    dmu = sum_k g_k                           dlogvar = 1/2 sum_k [g_k * sigma * eps_k + dlog_ratio_k]

with g_k = dz_k - dlog_ratio_k * z_k. Sticking the landing (Roeder et al., 2017) differentiates log q through z alone:
then g_k = dz_k + dlog_ratio_k * (eps_k / sigma - z_k), and the last term is absent.

mu, logvar `[*leading, L]`, z `[K, *leading, L]` float32, bfloat16 or float16; log_ratio `[K, *leading]` float32, nats,
of the samples before they are rounded. One read of mu and logvar serves all K; their gradients are summed in registers.
"""

# triton ships no types, and types jitted functions at launch
# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call, import-untyped"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._layout import Rows, as_rows, device_guard, grid_1d, vector_width
from ._math import exp_half, normal
from ._philox import STREAM_NOISE, load_key
from ._rows import locate_rows, sum_partials
from ._tiles import draw_chunks, load_tile, row_pointer, single_tiles, split_program, store_tile
from .reparameterize import draw_rows, draws_of, sum_chunks

_UNSPECIALISED = ["num_rows", "num_examples", "num_draws", "draws", "example_offset", "sample_offset"]


@triton.jit(do_not_specialize=_UNSPECIALISED)
def _reparameterize_log_ratio_fwd_kernel(
    mu_ptr,  # [S, B, L]
    logvar_ptr,  # [S, B, L]
    seed_ptr,  # [1]
    z_ptr,  # [K, S * B, L], contiguous
    log_ratio_ptr,  # [splits, K, S * B]
    num_rows,
    num_examples,
    num_elements,
    num_draws,
    mu_stride_s,
    mu_stride_b,
    mu_stride_l,
    logvar_stride_s,
    logvar_stride_b,
    logvar_stride_l,
    draw_example,
    draw_sample,
    splits,
    chunks,
    draws,
    example_offset: tl.int64,
    sample_offset: tl.int64,
    W: tl.constexpr,
    SAMPLES: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    """`num_elements` and the strides s and b count units of W. See `reparameterize.Draws` for the counters."""
    PAIRS: tl.constexpr = W >= 8 and z_ptr.dtype.element_ty != tl.float32
    tile, chunk = split_program(tl.program_id(0), chunks)
    group, split = split_program(tile, splits)
    first_row = group.to(tl.int64) * ROWS
    row, s, b = locate_rows(first_row, num_examples, ROWS, SAMPLES)
    rows = first_row + tl.arange(0, ROWS)
    col = split * COLS + tl.arange(0, COLS)[None, :]
    mask = (row < num_rows) & (col < num_elements * W)
    mu = load_tile(row_pointer(mu_ptr, s, b, mu_stride_s, mu_stride_b, W), col, mu_stride_l, mask)
    logvar = load_tile(row_pointer(logvar_ptr, s, b, logvar_stride_s, logvar_stride_b, W), col, logvar_stride_l, mask)
    sigma = exp_half(logvar, True)
    key_lo, key_hi = load_key(seed_ptr)
    for k in range(chunk * draws, tl.minimum((chunk + 1) * draws, num_draws)):
        example = b + (example_offset + k * draw_example)
        sample = s + (sample_offset + k * draw_sample)
        # float32 whatever the dtype of z: the log-ratio is
        eps = normal(split * COLS, example, sample, STREAM_NOISE, key_lo, key_hi, COLS, PAIRS, True)
        z = tl.fma(sigma, eps, mu)
        z_row = row_pointer(z_ptr, tl.cast(k, tl.int64) * num_rows, row, num_elements, num_elements, W)
        store_tile(z_row, col, 1, z, mask)
        # the noise of the padding is not zero
        log_ratio = tl.sum(tl.where(mask, tl.fma(eps, eps, logvar) - z * z, 0.0), axis=1)
        plane = (split.to(tl.int64) * num_draws + k) * num_rows
        tl.store(log_ratio_ptr + plane + rows, 0.5 * log_ratio, rows < num_rows)


@triton.jit(do_not_specialize=_UNSPECIALISED)
def _reparameterize_log_ratio_bwd_kernel(
    dz_ptr,  # [K, S, B, L], or None
    dlog_ratio_ptr,  # [K, S, B], or None
    mu_ptr,  # [S, B, L]
    logvar_ptr,  # [S, B, L]
    seed_ptr,  # [1]
    dmu_ptr,  # [chunks, S * B, L], contiguous
    dlogvar_ptr,  # [chunks, S * B, L], contiguous
    num_rows,
    num_examples,
    num_elements,
    num_draws,
    dz_stride_k,
    dz_stride_s,
    dz_stride_b,
    dz_stride_l,
    dlog_ratio_stride_k,
    dlog_ratio_stride_s,
    dlog_ratio_stride_b,
    mu_stride_s,
    mu_stride_b,
    mu_stride_l,
    logvar_stride_s,
    logvar_stride_b,
    logvar_stride_l,
    draw_example,
    draw_sample,
    splits,
    chunks,
    draws,
    example_offset: tl.int64,
    sample_offset: tl.int64,
    STICKING_THE_LANDING: tl.constexpr,
    W: tl.constexpr,
    SAMPLES: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    """`num_elements` and the strides k, s and b, but those of dlog_ratio, count units of W."""
    PRECISE: tl.constexpr = mu_ptr.dtype.element_ty == tl.float32
    PAIRS: tl.constexpr = W >= 8 and not PRECISE
    tile, chunk = split_program(tl.program_id(0), chunks)
    group, split = split_program(tile, splits)
    first_col = split * COLS
    row, s, b = locate_rows(group.to(tl.int64) * ROWS, num_examples, ROWS, SAMPLES)
    in_rows = row < num_rows
    col = first_col + tl.arange(0, COLS)[None, :]
    mask = in_rows & (col < num_elements * W)
    mu = load_tile(row_pointer(mu_ptr, s, b, mu_stride_s, mu_stride_b, W), col, mu_stride_l, mask)
    logvar = load_tile(row_pointer(logvar_ptr, s, b, logvar_stride_s, logvar_stride_b, W), col, logvar_stride_l, mask)
    sigma = exp_half(logvar, PRECISE)
    inverse_sigma = exp_half(-logvar, PRECISE)
    key_lo, key_hi = load_key(seed_ptr)
    dmu = tl.zeros((ROWS, COLS), tl.float32)
    dlogvar = tl.zeros((ROWS, COLS), tl.float32)
    for k in range(chunk * draws, tl.minimum((chunk + 1) * draws, num_draws)):
        example = b + (example_offset + k * draw_example)
        sample = s + (sample_offset + k * draw_sample)
        eps = normal(first_col, example, sample, STREAM_NOISE, key_lo, key_hi, COLS, PAIRS, PRECISE)
        noise = sigma * eps
        g = tl.zeros((ROWS, COLS), tl.float32)
        if dz_ptr is not None:
            dz_row = row_pointer(dz_ptr, s, b, dz_stride_s, dz_stride_b, W) + tl.cast(k, tl.int64) * dz_stride_k * W
            g = load_tile(dz_row, col, dz_stride_l, mask)
        if dlog_ratio_ptr is not None:
            dlog_ratio_row = row_pointer(dlog_ratio_ptr, s, b, dlog_ratio_stride_s, dlog_ratio_stride_b, 1)
            dlog_ratio = tl.load(dlog_ratio_row + tl.cast(k, tl.int64) * dlog_ratio_stride_k, in_rows, other=0.0)
            if STICKING_THE_LANDING:
                g += dlog_ratio * (eps * inverse_sigma - (mu + noise))
            else:
                g -= dlog_ratio * (mu + noise)
                dlogvar += dlog_ratio
        dmu += g
        dlogvar = tl.fma(g, noise, dlogvar)
    out_row = row + tl.cast(chunk, tl.int64) * num_rows
    store_tile(row_pointer(dmu_ptr, 0, out_row, 0, num_elements, W), col, 1, dmu, mask)
    store_tile(row_pointer(dlogvar_ptr, 0, out_row, 0, num_elements, W), col, 1, 0.5 * dlogvar, mask)


def reparameterize_log_ratio_fwd(
    mu: Tensor, logvar: Tensor, seed: Tensor, num_samples: int, example_offset: int, sample_offset: int
) -> tuple[Tensor, Tensor]:
    """(z in the dtype of mu, log_ratio float32), contiguous."""
    *leading, L = mu.shape
    z = mu.new_empty(num_samples, *mu.shape)
    if not z.numel():
        return z, mu.new_zeros(num_samples, *leading, dtype=torch.float32)
    draws = draws_of(mu.shape, num_samples)
    mu_rows, logvar_rows = as_rows(mu), as_rows(logvar)
    W = vector_width(L, mu_rows, logvar_rows)
    plan = single_tiles(draws.num_rows, L)
    chunks, draws_per_chunk = draw_chunks(draws.num_draws, plan, least=1)
    log_ratio = torch.empty(plan.splits, num_samples, *leading, dtype=torch.float32, device=mu.device)
    with device_guard(mu):
        _reparameterize_log_ratio_fwd_kernel[grid_1d(plan.groups, plan.splits, chunks)](
            mu_rows.tensor,
            logvar_rows.tensor,
            seed,
            z,
            log_ratio,
            draws.num_rows,
            draws.num_examples,
            L // W,
            draws.num_draws,
            *mu_rows.strides_in(W),
            *logvar_rows.strides_in(W),
            draws.example,
            draws.sample,
            plan.splits,
            chunks,
            draws_per_chunk,
            example_offset,
            sample_offset,
            W=W,
            SAMPLES=draws.num_rows != draws.num_examples,
            ROWS=plan.rows,
            COLS=plan.cols,
        )
    return z, sum_partials(log_ratio)[0]


def reparameterize_log_ratio_bwd(
    dz: Tensor | None,
    dlog_ratio: Tensor | None,
    mu: Tensor,
    logvar: Tensor,
    seed: Tensor,
    num_samples: int,
    sticking_the_landing: bool,
    example_offset: int,
    sample_offset: int,
) -> tuple[Tensor, Tensor]:
    """(dmu, dlogvar) in the inputs' dtype, contiguous, summed over K; a missing upstream gradient is zero, not read."""
    if not mu.numel() or not num_samples:
        return mu.new_zeros(mu.shape), mu.new_zeros(mu.shape)
    L = mu.shape[-1]
    draws = draws_of(mu.shape, num_samples)
    mu_rows, logvar_rows = as_rows(mu), as_rows(logvar)
    dz_rows, dz_stride_k = draw_rows(dz, num_samples, mu)
    dlog_ratio_rows, dlog_ratio_stride_k = draw_rows(dlog_ratio, num_samples, mu, event=False)
    W = vector_width(L, mu_rows, logvar_rows, dz_rows, Rows(mu, dz_stride_k, 0, 1))
    plan = single_tiles(draws.num_rows, L)
    chunks, draws_per_chunk = draw_chunks(draws.num_draws, plan, least=32)
    # gradients of the parts are added in float32
    dtype = mu.dtype if chunks == 1 else torch.float32
    dmu, dlogvar = (torch.empty(chunks, *mu.shape, dtype=dtype, device=mu.device) for _ in range(2))
    with device_guard(mu):
        _reparameterize_log_ratio_bwd_kernel[grid_1d(plan.groups, plan.splits, chunks)](
            None if dz is None else dz_rows.tensor,
            None if dlog_ratio is None else dlog_ratio_rows.tensor,
            mu_rows.tensor,
            logvar_rows.tensor,
            seed,
            dmu,
            dlogvar,
            draws.num_rows,
            draws.num_examples,
            L // W,
            draws.num_draws,
            dz_stride_k // W,
            *dz_rows.strides_in(W),
            dlog_ratio_stride_k,
            dlog_ratio_rows.stride_k,
            dlog_ratio_rows.stride_b,
            *mu_rows.strides_in(W),
            *logvar_rows.strides_in(W),
            draws.example,
            draws.sample,
            plan.splits,
            chunks,
            draws_per_chunk,
            example_offset,
            sample_offset,
            STICKING_THE_LANDING=sticking_the_landing,
            W=W,
            SAMPLES=draws.num_rows != draws.num_examples,
            ROWS=plan.rows,
            COLS=plan.cols,
            # seven tiles of float32 values in registers: 8 elements per thread, not 16, or some are spilled
            num_warps=8 if mu.dtype == torch.float32 else 4,
        )
    return sum_chunks(dmu, dlogvar, mu.dtype)
