"""Reparameterised samples, K per example from one read of mu and logvar: Kingma & Welling, 2013, Section 2.4.

    z_k = mu + sigma * eps_k,  sigma = exp(logvar / 2)
    dmu = sum_k dz_k                          dlogvar = 1/2 sigma * sum_k dz_k * eps_k

mu, logvar `[*leading, L]`, z `[K, *leading, L]` (`[*leading, L]` without K) float32, bfloat16 or float16. eps ~ N(0, I)
is drawn in the kernel from (seed, stream, example, sample, latent) and drawn again in the backward, never stored.
"""

# triton ships no types, and types jitted functions at launch
# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call, import-untyped"

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._layout import Rows, as_rows, collapse, device_guard, grid_1d, vector_width
from ._math import exp_half, normal
from ._philox import load_key
from ._rows import locate_rows, sum_partials
from ._tiles import draw_chunks, load_tile, row_pointer, single_tiles, split_program, store_tile

_UNSPECIALISED = ["num_rows", "num_examples", "num_draws", "draws", "example_offset", "sample_offset", "stream"]


@triton.jit(do_not_specialize=_UNSPECIALISED)
def _reparameterize_fwd_kernel(
    mu_ptr,  # [S, B, L]
    logvar_ptr,  # [S, B, L]
    seed_ptr,  # [1]
    z_ptr,  # [K, S * B, L], contiguous
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
    stream: tl.int32,
    W: tl.constexpr,
    SAMPLES: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    """`num_elements` and the strides s and b count units of W. See `Draws` for the counters of draw k."""
    PRECISE: tl.constexpr = z_ptr.dtype.element_ty == tl.float32
    tile, chunk = split_program(tl.program_id(0), chunks)
    group, split = split_program(tile, splits)
    first_col = split * COLS
    row, s, b = locate_rows(group.to(tl.int64) * ROWS, num_examples, ROWS, SAMPLES)
    col = first_col + tl.arange(0, COLS)[None, :]
    mask = (row < num_rows) & (col < num_elements * W)
    mu = load_tile(row_pointer(mu_ptr, s, b, mu_stride_s, mu_stride_b, W), col, mu_stride_l, mask)
    logvar = load_tile(row_pointer(logvar_ptr, s, b, logvar_stride_s, logvar_stride_b, W), col, logvar_stride_l, mask)
    sigma = exp_half(logvar, PRECISE)
    key_lo, key_hi = load_key(seed_ptr)
    for k in range(chunk * draws, tl.minimum((chunk + 1) * draws, num_draws)):
        example = b + (example_offset + k * draw_example)
        sample = s + (sample_offset + k * draw_sample)
        eps = normal(first_col, example, sample, stream, key_lo, key_hi, COLS, W >= 8 and not PRECISE, PRECISE)
        z_row = row_pointer(z_ptr, tl.cast(k, tl.int64) * num_rows, row, num_elements, num_elements, W)
        store_tile(z_row, col, 1, tl.fma(sigma, eps, mu), mask)


@triton.jit(do_not_specialize=_UNSPECIALISED)
def _reparameterize_bwd_kernel(
    dz_ptr,  # [K, S, B, L]
    logvar_ptr,  # [S, B, L]
    seed_ptr,  # [1]
    dmu_ptr,  # [chunks, S * B, L], contiguous; None where dmu is dz
    dlogvar_ptr,  # [chunks, S * B, L], contiguous
    num_rows,
    num_examples,
    num_elements,
    num_draws,
    dz_stride_k,
    dz_stride_s,
    dz_stride_b,
    dz_stride_l,
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
    stream: tl.int32,
    W: tl.constexpr,
    SAMPLES: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    """`num_elements` and the strides k, s and b count units of W. See `Draws` for the counters of draw k."""
    PRECISE: tl.constexpr = logvar_ptr.dtype.element_ty == tl.float32
    tile, chunk = split_program(tl.program_id(0), chunks)
    group, split = split_program(tile, splits)
    first_col = split * COLS
    row, s, b = locate_rows(group.to(tl.int64) * ROWS, num_examples, ROWS, SAMPLES)
    col = first_col + tl.arange(0, COLS)[None, :]
    mask = (row < num_rows) & (col < num_elements * W)
    dz_row = row_pointer(dz_ptr, s, b, dz_stride_s, dz_stride_b, W)
    logvar = load_tile(row_pointer(logvar_ptr, s, b, logvar_stride_s, logvar_stride_b, W), col, logvar_stride_l, mask)
    key_lo, key_hi = load_key(seed_ptr)
    dmu = tl.zeros((ROWS, COLS), tl.float32)
    dsigma = tl.zeros((ROWS, COLS), tl.float32)
    for k in range(chunk * draws, tl.minimum((chunk + 1) * draws, num_draws)):
        example = b + (example_offset + k * draw_example)
        sample = s + (sample_offset + k * draw_sample)
        eps = normal(first_col, example, sample, stream, key_lo, key_hi, COLS, W >= 8 and not PRECISE, PRECISE)
        dz = load_tile(dz_row + tl.cast(k, tl.int64) * dz_stride_k * W, col, dz_stride_l, mask)
        dmu += dz
        dsigma = tl.fma(dz, eps, dsigma)
    dlogvar = 0.5 * exp_half(logvar, PRECISE) * dsigma
    out_row = row + tl.cast(chunk, tl.int64) * num_rows
    if dmu_ptr is not None:
        store_tile(row_pointer(dmu_ptr, 0, out_row, 0, num_elements, W), col, 1, dmu, mask)
    store_tile(row_pointer(dlogvar_ptr, 0, out_row, 0, num_elements, W), col, 1, dlogvar, mask)


class Draws(NamedTuple):
    """K draws for each of S x B rows: draw k of row (s, b) has the counters of the flattened shape `[K, *leading]`.

    That is example b + k * `example`, sample s + k * `sample`: without leading dimensions the draws are the examples.
    """

    num_draws: int
    num_rows: int
    num_examples: int
    example: int
    sample: int


def draws_of(shape: torch.Size, num_samples: int | None) -> Draws:
    """The draws for mu of `shape` `[*leading, L]`; `num_samples` None is one draw without a dimension of its own."""
    *leading, L = shape
    num_rows = shape.numel() // L
    num_examples = leading[-1] if leading else 1
    if num_samples is None:
        return Draws(1, num_rows, num_examples, 0, 0)
    return Draws(num_samples, num_rows, num_examples, int(not leading), num_rows // num_examples if leading else 0)


def draw_rows(t: Tensor | None, num_samples: int | None, like: Tensor, *, event: bool = True) -> tuple[Rows, int]:
    """(rows of one draw, stride from draw to draw) of `t` `[K, *leading(, L)]`; strides of 0 for a missing tensor."""
    if t is None:
        return Rows(like, 0, 0, 1), 0
    if num_samples is None:
        return as_rows(t, event=event), 0
    samples = slice(1, -2 if event else -1)
    if collapse(t.shape[samples], t.stride()[samples]) is None:
        t = t.contiguous()
    # the kernel gets the pointer of all draws
    return as_rows(t[0], event=event)._replace(tensor=t), t.stride(0)


def reparameterize_fwd(
    mu: Tensor,
    logvar: Tensor,
    seed: Tensor,
    num_samples: int | None,
    example_offset: int,
    sample_offset: int,
    stream: int,
) -> Tensor:
    """z in the dtype of mu, contiguous."""
    z = mu.new_empty(mu.shape if num_samples is None else (num_samples, *mu.shape))
    if not z.numel():
        return z
    L = mu.shape[-1]
    draws = draws_of(mu.shape, num_samples)
    mu_rows, logvar_rows = as_rows(mu), as_rows(logvar)
    W = vector_width(L, mu_rows, logvar_rows)
    plan = single_tiles(draws.num_rows, L)
    chunks, draws_per_chunk = draw_chunks(draws.num_draws, plan, least=1)
    with device_guard(mu):
        _reparameterize_fwd_kernel[grid_1d(plan.groups, plan.splits, chunks)](
            mu_rows.tensor,
            logvar_rows.tensor,
            seed,
            z,
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
            stream,
            W=W,
            SAMPLES=draws.num_rows != draws.num_examples,
            ROWS=plan.rows,
            COLS=plan.cols,
        )
    return z


def reparameterize_bwd(
    dz: Tensor,
    logvar: Tensor,
    seed: Tensor,
    num_samples: int | None,
    example_offset: int,
    sample_offset: int,
    stream: int,
) -> tuple[Tensor | None, Tensor]:
    """(dmu, dlogvar) in the dtype of logvar, contiguous, summed over the K draws; dmu is None where it is dz.

    So it is for `num_samples` None, of which nothing is summed.
    """
    with_dmu = num_samples is not None
    if not dz.numel():
        return logvar.new_zeros(logvar.shape) if with_dmu else None, logvar.new_zeros(logvar.shape)
    L = logvar.shape[-1]
    draws = draws_of(logvar.shape, num_samples)
    logvar_rows = as_rows(logvar)
    dz_rows, dz_stride_k = draw_rows(dz, num_samples, logvar)
    W = vector_width(L, logvar_rows, dz_rows, Rows(dz, dz_stride_k, 0, 1))
    plan = single_tiles(draws.num_rows, L)
    chunks, draws_per_chunk = draw_chunks(draws.num_draws, plan, least=32)
    # gradients of the parts are added in float32
    dtype = logvar.dtype if chunks == 1 else torch.float32
    dlogvar = logvar.new_empty((chunks, *logvar.shape), dtype=dtype)
    dmu = torch.empty_like(dlogvar) if with_dmu else None
    with device_guard(logvar):
        _reparameterize_bwd_kernel[grid_1d(plan.groups, plan.splits, chunks)](
            dz_rows.tensor,
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
            *logvar_rows.strides_in(W),
            draws.example,
            draws.sample,
            plan.splits,
            chunks,
            draws_per_chunk,
            example_offset,
            sample_offset,
            stream,
            W=W,
            SAMPLES=draws.num_rows != draws.num_examples,
            ROWS=plan.rows,
            COLS=plan.cols,
        )
    return (None, dlogvar[0]) if dmu is None else sum_chunks(dmu, dlogvar, logvar.dtype)


def sum_chunks(dmu: Tensor, dlogvar: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Gradients `[chunks, ...]` of the parts of the draws, summed and in `dtype`."""
    if dmu.shape[0] == 1:
        return dmu[0], dlogvar[0]
    sum_mu, sum_logvar = sum_partials(dmu, dlogvar)
    assert sum_logvar is not None
    return sum_mu.to(dtype), sum_logvar.to(dtype)
