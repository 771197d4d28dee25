"""KL(N(mu_q, exp(logvar_q)) || N(mu_p, exp(logvar_p))), diagonal; with d = mu_q - mu_p and r = logvar_q - logvar_p:

    kl       = 1/2 sum_l [d^2 exp(-logvar_p) + expm1(r) - r]
    dmu_q    = dkl * d exp(-logvar_p)         dlogvar_q = dkl / 2 * expm1(r)
    dmu_p    = -dmu_q                         dlogvar_p = -dkl / 2 * (d^2 exp(-logvar_p) + expm1(r))

All four inputs `[*leading, L]`, float32, bfloat16 or float16; kl `[*leading]` float32, nats.
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
def _terms(mu_q, logvar_q, mu_p, logvar_p, PRECISE: tl.constexpr):
    """(d exp(-logvar_p), d^2 exp(-logvar_p), expm1(r), expm1(r) - r)."""
    d = mu_q - mu_p
    r = logvar_q - logvar_p
    _, precision_p = exponentials(-logvar_p, PRECISE)
    _, ratio = exponentials(r, PRECISE)
    scaled = d * precision_p
    expm1_r, excess = expm1_terms(r, ratio, PRECISE)
    return scaled, d * scaled, expm1_r, excess


@triton.jit(do_not_specialize=["num_rows", "num_examples"])
def _kl_normal_fwd_kernel(
    mu_q_ptr,  # [K, B, L], like the three that follow
    logvar_q_ptr,
    mu_p_ptr,
    logvar_p_ptr,
    kl_ptr,  # [splits, K * B]
    num_rows,
    num_examples,
    num_elements,
    mu_q_stride_k,
    mu_q_stride_b,
    mu_q_stride_l,
    logvar_q_stride_k,
    logvar_q_stride_b,
    logvar_q_stride_l,
    mu_p_stride_k,
    mu_p_stride_b,
    mu_p_stride_l,
    logvar_p_stride_k,
    logvar_p_stride_b,
    logvar_p_stride_l,
    splits,
    chunks,
    W: tl.constexpr,
    SAMPLES: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    """`num_elements` and the strides k and b count units of W."""
    PRECISE: tl.constexpr = mu_q_ptr.dtype.element_ty == tl.float32
    group, split = split_program(tl.program_id(0), splits)
    first_row = group.to(tl.int64) * ROWS
    row, k, b = locate_rows(first_row, num_examples, ROWS, SAMPLES)
    mu_q_row = row_pointer(mu_q_ptr, k, b, mu_q_stride_k, mu_q_stride_b, W)
    logvar_q_row = row_pointer(logvar_q_ptr, k, b, logvar_q_stride_k, logvar_q_stride_b, W)
    mu_p_row = row_pointer(mu_p_ptr, k, b, mu_p_stride_k, mu_p_stride_b, W)
    logvar_p_row = row_pointer(logvar_p_ptr, k, b, logvar_p_stride_k, logvar_p_stride_b, W)
    kl = tl.zeros((ROWS, COLS), tl.float32)
    for chunk in range(0, chunks):
        col = (split * chunks + chunk) * COLS + tl.arange(0, COLS)[None, :]
        mask = (row < num_rows) & (col < num_elements * W)
        mu_q = load_tile(mu_q_row, col, mu_q_stride_l, mask)
        logvar_q = load_tile(logvar_q_row, col, logvar_q_stride_l, mask)
        mu_p = load_tile(mu_p_row, col, mu_p_stride_l, mask)
        logvar_p = load_tile(logvar_p_row, col, logvar_p_stride_l, mask)
        _, squared, _, excess = _terms(mu_q, logvar_q, mu_p, logvar_p, PRECISE)
        kl += squared + excess
    rows = first_row + tl.arange(0, ROWS)
    tl.store(kl_ptr + split.to(tl.int64) * num_rows + rows, 0.5 * tl.sum(kl, axis=1), rows < num_rows)


@triton.jit(do_not_specialize=["num_rows", "num_examples"])
def _kl_normal_bwd_kernel(
    dkl_ptr,  # [K, B]
    mu_q_ptr,  # [K, B, L], like the three that follow
    logvar_q_ptr,
    mu_p_ptr,
    logvar_p_ptr,
    dmu_q_ptr,  # [K * B, L], contiguous, like the three that follow
    dlogvar_q_ptr,
    dmu_p_ptr,
    dlogvar_p_ptr,
    num_rows,
    num_examples,
    num_elements,
    dkl_stride_k,
    dkl_stride_b,
    mu_q_stride_k,
    mu_q_stride_b,
    mu_q_stride_l,
    logvar_q_stride_k,
    logvar_q_stride_b,
    logvar_q_stride_l,
    mu_p_stride_k,
    mu_p_stride_b,
    mu_p_stride_l,
    logvar_p_stride_k,
    logvar_p_stride_b,
    logvar_p_stride_l,
    splits,
    W: tl.constexpr,
    SAMPLES: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    """`num_elements` and the strides k and b, but those of dkl, count units of W."""
    PRECISE: tl.constexpr = mu_q_ptr.dtype.element_ty == tl.float32
    group, split = split_program(tl.program_id(0), splits)
    row, k, b = locate_rows(group.to(tl.int64) * ROWS, num_examples, ROWS, SAMPLES)
    col = split * COLS + tl.arange(0, COLS)[None, :]
    mask = (row < num_rows) & (col < num_elements * W)
    dkl = tl.load(row_pointer(dkl_ptr, k, b, dkl_stride_k, dkl_stride_b, 1), row < num_rows, other=0.0)
    mu_q = load_tile(row_pointer(mu_q_ptr, k, b, mu_q_stride_k, mu_q_stride_b, W), col, mu_q_stride_l, mask)
    logvar_q_row = row_pointer(logvar_q_ptr, k, b, logvar_q_stride_k, logvar_q_stride_b, W)
    logvar_q = load_tile(logvar_q_row, col, logvar_q_stride_l, mask)
    mu_p = load_tile(row_pointer(mu_p_ptr, k, b, mu_p_stride_k, mu_p_stride_b, W), col, mu_p_stride_l, mask)
    logvar_p_row = row_pointer(logvar_p_ptr, k, b, logvar_p_stride_k, logvar_p_stride_b, W)
    logvar_p = load_tile(logvar_p_row, col, logvar_p_stride_l, mask)
    scaled, squared, expm1_r, _ = _terms(mu_q, logvar_q, mu_p, logvar_p, PRECISE)
    dmu = dkl * scaled
    dlogvar = 0.5 * dkl * expm1_r
    store_tile(row_pointer(dmu_q_ptr, 0, row, 0, num_elements, W), col, 1, dmu, mask)
    store_tile(row_pointer(dlogvar_q_ptr, 0, row, 0, num_elements, W), col, 1, dlogvar, mask)
    store_tile(row_pointer(dmu_p_ptr, 0, row, 0, num_elements, W), col, 1, -dmu, mask)
    dlogvar_p = -0.5 * dkl * squared - dlogvar
    store_tile(row_pointer(dlogvar_p_ptr, 0, row, 0, num_elements, W), col, 1, dlogvar_p, mask)


def kl_normal_fwd(mu_q: Tensor, logvar_q: Tensor, mu_p: Tensor, logvar_p: Tensor) -> Tensor:
    """kl float32 `[*leading]`."""
    *leading, L = mu_q.shape
    if not mu_q.numel():
        return torch.zeros(leading, dtype=torch.float32, device=mu_q.device)
    K, B, rows = merge_rows(mu_q.shape, *map(as_rows, (mu_q, logvar_q, mu_p, logvar_p)))
    W = vector_width(L, *rows)
    plan = whole_rows(K * B, L)
    kl = torch.empty(plan.splits, *leading, dtype=torch.float32, device=mu_q.device)
    with device_guard(mu_q):
        _kl_normal_fwd_kernel[grid_1d(plan.groups, plan.splits)](
            *(row.tensor for row in rows),
            kl,
            K * B,
            B,
            L // W,
            *(stride for row in rows for stride in row.strides_in(W)),
            plan.splits,
            plan.chunks,
            W=W,
            SAMPLES=K > 1,
            ROWS=plan.rows,
            COLS=plan.cols,
        )
    return sum_partials(kl)[0]


def kl_normal_bwd(
    dkl: Tensor, mu_q: Tensor, logvar_q: Tensor, mu_p: Tensor, logvar_p: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(dmu_q, dlogvar_q, dmu_p, dlogvar_p) in the inputs' dtypes, contiguous; dkl float32 `[*leading]`."""
    inputs = (mu_q, logvar_q, mu_p, logvar_p)
    dmu_q, dlogvar_q, dmu_p, dlogvar_p = (torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in inputs)
    if not mu_q.numel():
        return dmu_q, dlogvar_q, dmu_p, dlogvar_p
    L = mu_q.shape[-1]
    K, B, (dkl_rows, *rows) = merge_rows(mu_q.shape, as_rows(dkl, event=False), *map(as_rows, inputs))
    W = vector_width(L, *rows)
    plan = single_tiles(K * B, L)
    with device_guard(mu_q):
        _kl_normal_bwd_kernel[grid_1d(plan.groups, plan.splits)](
            dkl_rows.tensor,
            *(row.tensor for row in rows),
            dmu_q,
            dlogvar_q,
            dmu_p,
            dlogvar_p,
            K * B,
            B,
            L // W,
            dkl_rows.stride_k,
            dkl_rows.stride_b,
            *(stride for row in rows for stride in row.strides_in(W)),
            plan.splits,
            W=W,
            SAMPLES=K > 1,
            ROWS=plan.rows,
            COLS=plan.cols,
        )
    return dmu_q, dlogvar_q, dmu_p, dlogvar_p
