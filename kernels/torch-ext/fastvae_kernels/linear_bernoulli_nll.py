"""Bernoulli negative log-likelihood as the epilogue of its output layer's matrix product.

nll_r = sum_d [softplus(l_rd) - x_rd l_rd] with l = h W^T + b, for h `[*leading, H]`, W `[D, H]`, b `[D]` in float32,
bfloat16 or float16, and data x `[*leading, D]`, float, bool or uint8 (x / 255). The logits live in the accumulators of
one block at a time, in float32, and never in memory: what moves is h, x and, from the caches, W.
"""

# triton ships no types, and types jitted functions at launch
# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call, import-untyped"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._data import as_bytes, unit_interval
from ._layout import as_rows, device_guard, grid_1d
from ._rows import locate_rows, sum_partials
from .bernoulli_nll import _PADDING, _nll_terms, _row_sum

_PROGRAMS = 256  # about two for each multiprocessor of the largest GPUs
_ROWS, _COLS, _DEPTH = 64, 128, 32


@triton.jit(
    do_not_specialize=["num_rows", "num_examples", "D", "splits", "blocks", "x_stride_k", "x_stride_b", "x_stride_d"]
)
def _linear_bernoulli_nll_kernel(
    h_ptr,  # [K * B, H]
    weight_ptr,  # [D, H]
    bias_ptr,  # [D]
    x_ptr,  # [K, B, D]
    nll_ptr,  # [splits, K * B]
    num_rows,
    num_examples,
    D,
    H,
    x_stride_k,
    x_stride_b,
    x_stride_d,
    splits,
    blocks,
    LEVELS: tl.constexpr,
    PRECISION: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    DEPTH: tl.constexpr,
):
    """A program owns a tile of rows and, one after the other, `blocks` blocks of columns."""
    group = (tl.program_id(0) // splits).to(tl.int64)
    split = tl.program_id(0) % splits
    row, k, b = locate_rows(group * ROWS, num_examples, ROWS, True)
    in_rows = row < num_rows
    x_row = x_ptr + k * x_stride_k + b * x_stride_b
    depth = tl.arange(0, DEPTH)
    nll = tl.zeros((ROWS, 1), tl.float32)
    for block in range(split * blocks, tl.minimum((split + 1) * blocks, tl.cdiv(D, COLS))):
        col = block * COLS + tl.arange(0, COLS)
        in_cols = col < D
        logits = tl.zeros((ROWS, COLS), tl.float32)
        for first in range(0, H, DEPTH):
            i = first + depth
            # both operands are 0 beyond the width, so that no product is NaN
            h = tl.load(h_ptr + row * H + i[None, :], in_rows & (i[None, :] < H), other=0.0)
            weight = tl.load(
                weight_ptr + col[None, :].to(tl.int64) * H + i[:, None], in_cols[None, :] & (i[:, None] < H), other=0.0
            )
            logits = tl.dot(h, weight, logits, input_precision=PRECISION)
        logits += tl.load(bias_ptr + col, in_cols, other=0.0).to(tl.float32)[None, :]
        x = tl.load(x_row + col[None, :].to(tl.int64) * x_stride_d, in_rows & in_cols[None, :], other=0)
        # a padded column costs exactly 0, see `_PADDING`
        linear, e = _nll_terms(tl.where(in_cols[None, :], logits, _PADDING), unit_interval(x, LEVELS, True), True)
        nll += _row_sum(linear, e, 3)
    tl.store(nll_ptr + split.to(tl.int64) * num_rows + row, nll, in_rows)


def linear_bernoulli_nll_fwd(h: Tensor, weight: Tensor, bias: Tensor, x: Tensor) -> Tensor:
    """nll float32 `[*leading]`.

    float32 is multiplied as torch is set to (`torch.set_float32_matmul_precision`): in full by default, as TF32 for
    "high" and "medium".
    """
    *leading, H = h.shape
    D = len(bias)
    if not h[..., 0].numel() or not D:
        return h.new_zeros(leading, dtype=torch.float32)
    x, levels = as_bytes(x)
    x_rows = as_rows(x)
    h, weight, bias = h.reshape(-1, H).contiguous(), weight.contiguous(), bias.contiguous()
    num_rows, num_blocks = len(h), triton.cdiv(D, _COLS)
    groups = triton.cdiv(num_rows, _ROWS)
    blocks = triton.cdiv(num_blocks, max(1, min(num_blocks, _PROGRAMS // groups)))
    splits = triton.cdiv(num_blocks, blocks)
    nll = h.new_empty((splits, *leading), dtype=torch.float32)
    with device_guard(h):
        _linear_bernoulli_nll_kernel[grid_1d(groups, splits)](
            h,
            weight,
            bias,
            x_rows.tensor,
            nll,
            num_rows,
            leading[-1] if leading else 1,
            D,
            H,
            x_rows.stride_k,
            x_rows.stride_b,
            x_rows.stride_l,
            splits,
            blocks,
            LEVELS=levels,
            PRECISION="ieee" if torch.get_float32_matmul_precision() == "highest" else "tf32",
            ROWS=_ROWS,
            COLS=_COLS,
            DEPTH=_DEPTH,
            num_warps=8,
            num_stages=3,
        )
    return nll[0] if splits == 1 else sum_partials(nll)[0]
