"""KL(N(mu, exp(logvar)) || N(0, I)): Kingma & Welling, 2013, Appendix B.

    kl      = 1/2 sum_l [mu^2 + expm1(logvar) - logvar]
    dmu     = dkl * mu                        dlogvar = dkl / 2 * expm1(logvar)

mu, logvar `[*leading, L]` float32, bfloat16 or float16; kl `[*leading]` float32, nats.
"""

# triton ships no types, and types jitted functions at launch
# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call, import-untyped"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._layout import as_rows, device_guard, grid_1d, merge_rows, vector_width
from ._math import expm1_terms, exponentials
from ._rows import locate_rows, sum_partials
from ._tiles import load_tile, row_pointer, single_tiles, split_program, store_tile, whole_rows


@triton.jit
def kl_term(mu, logvar, variance, PRECISE: tl.constexpr):
    """Twice the divergence of one latent."""
    _, excess = expm1_terms(logvar, variance, PRECISE)
    return tl.fma(mu, mu, excess)


@triton.jit
def kl_grads(mu, logvar, variance, PRECISE: tl.constexpr):
    """(d kl / d mu, 2 d kl / d logvar) of one latent."""
    dlogvar, _ = expm1_terms(logvar, variance, PRECISE)
    return mu, dlogvar


@triton.jit(do_not_specialize=["num_rows", "num_examples"])
def _kl_standard_normal_fwd_kernel(
    mu_ptr,  # [K, B, L]
    logvar_ptr,  # [K, B, L]
    kl_ptr,  # [splits, K * B]
    num_rows,
    num_examples,
    num_elements,
    mu_stride_k,
    mu_stride_b,
    mu_stride_l,
    logvar_stride_k,
    logvar_stride_b,
    logvar_stride_l,
    splits,
    chunks,
    W: tl.constexpr,
    SAMPLES: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    """`num_elements` and the strides k and b count units of W."""
    PRECISE: tl.constexpr = mu_ptr.dtype.element_ty == tl.float32
    group, split = split_program(tl.program_id(0), splits)
    first_row = group.to(tl.int64) * ROWS
    row, k, b = locate_rows(first_row, num_examples, ROWS, SAMPLES)
    mu_row = row_pointer(mu_ptr, k, b, mu_stride_k, mu_stride_b, W)
    logvar_row = row_pointer(logvar_ptr, k, b, logvar_stride_k, logvar_stride_b, W)
    kl = tl.zeros((ROWS, COLS), tl.float32)
    for chunk in range(0, chunks):
        col = (split * chunks + chunk) * COLS + tl.arange(0, COLS)[None, :]
        mask = (row < num_rows) & (col < num_elements * W)
        mu = load_tile(mu_row, col, mu_stride_l, mask)
        logvar = load_tile(logvar_row, col, logvar_stride_l, mask)
        _, variance = exponentials(logvar, PRECISE)
        kl += kl_term(mu, logvar, variance, PRECISE)
    rows = first_row + tl.arange(0, ROWS)
    tl.store(kl_ptr + split.to(tl.int64) * num_rows + rows, 0.5 * tl.sum(kl, axis=1), rows < num_rows)


@triton.jit(do_not_specialize=["num_rows", "num_examples"])
def _kl_standard_normal_bwd_kernel(
    dkl_ptr,  # [K, B]
    mu_ptr,  # [K, B, L]
    logvar_ptr,  # [K, B, L]
    dmu_ptr,  # [K * B, L], contiguous
    dlogvar_ptr,  # [K * B, L], contiguous
    num_rows,
    num_examples,
    num_elements,
    dkl_stride_k,
    dkl_stride_b,
    mu_stride_k,
    mu_stride_b,
    mu_stride_l,
    logvar_stride_k,
    logvar_stride_b,
    logvar_stride_l,
    splits,
    W: tl.constexpr,
    SAMPLES: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    """`num_elements` and the strides k and b, but those of dkl, count units of W."""
    PRECISE: tl.constexpr = mu_ptr.dtype.element_ty == tl.float32
    group, split = split_program(tl.program_id(0), splits)
    row, k, b = locate_rows(group.to(tl.int64) * ROWS, num_examples, ROWS, SAMPLES)
    col = split * COLS + tl.arange(0, COLS)[None, :]
    mask = (row < num_rows) & (col < num_elements * W)
    dkl = tl.load(row_pointer(dkl_ptr, k, b, dkl_stride_k, dkl_stride_b, 1), row < num_rows, other=0.0)
    mu = load_tile(row_pointer(mu_ptr, k, b, mu_stride_k, mu_stride_b, W), col, mu_stride_l, mask)
    logvar = load_tile(row_pointer(logvar_ptr, k, b, logvar_stride_k, logvar_stride_b, W), col, logvar_stride_l, mask)
    _, variance = exponentials(logvar, PRECISE)
    dmu, dlogvar = kl_grads(mu, logvar, variance, PRECISE)
    store_tile(row_pointer(dmu_ptr, 0, row, 0, num_elements, W), col, 1, dkl * dmu, mask)
    store_tile(row_pointer(dlogvar_ptr, 0, row, 0, num_elements, W), col, 1, 0.5 * dkl * dlogvar, mask)


def kl_standard_normal_fwd(mu: Tensor, logvar: Tensor) -> Tensor:
    """kl float32 `[*leading]`."""
    *leading, L = mu.shape
    if not mu.numel():
        return torch.zeros(leading, dtype=torch.float32, device=mu.device)
    K, B, (mu_rows, logvar_rows) = merge_rows(mu.shape, as_rows(mu), as_rows(logvar))
    W = vector_width(L, mu_rows, logvar_rows)
    plan = whole_rows(K * B, L)
    kl = torch.empty(plan.splits, *leading, dtype=torch.float32, device=mu.device)
    with device_guard(mu):
        _kl_standard_normal_fwd_kernel[grid_1d(plan.groups, plan.splits)](
            mu_rows.tensor,
            logvar_rows.tensor,
            kl,
            K * B,
            B,
            L // W,
            *mu_rows.strides_in(W),
            *logvar_rows.strides_in(W),
            plan.splits,
            plan.chunks,
            W=W,
            SAMPLES=K > 1,
            ROWS=plan.rows,
            COLS=plan.cols,
        )
    return sum_partials(kl)[0]


def kl_standard_normal_bwd(dkl: Tensor, mu: Tensor, logvar: Tensor) -> tuple[Tensor, Tensor]:
    """(dmu, dlogvar) in the inputs' dtypes, contiguous; dkl float32 `[*leading]` of any strides."""
    dmu = torch.empty(mu.shape, dtype=mu.dtype, device=mu.device)
    dlogvar = torch.empty(mu.shape, dtype=logvar.dtype, device=mu.device)
    if not mu.numel():
        return dmu, dlogvar
    L = mu.shape[-1]
    rows = merge_rows(mu.shape, as_rows(mu), as_rows(logvar), as_rows(dkl, event=False))
    K, B, (mu_rows, logvar_rows, dkl_rows) = rows
    W = vector_width(L, mu_rows, logvar_rows)
    plan = single_tiles(K * B, L)
    with device_guard(mu):
        _kl_standard_normal_bwd_kernel[grid_1d(plan.groups, plan.splits)](
            dkl_rows.tensor,
            mu_rows.tensor,
            logvar_rows.tensor,
            dmu,
            dlogvar,
            K * B,
            B,
            L // W,
            dkl_rows.stride_k,
            dkl_rows.stride_b,
            *mu_rows.strides_in(W),
            *logvar_rows.strides_in(W),
            plan.splits,
            W=W,
            SAMPLES=K > 1,
            ROWS=plan.rows,
            COLS=plan.cols,
        )
    return dmu, dlogvar
