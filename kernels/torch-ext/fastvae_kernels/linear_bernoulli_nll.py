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
from ._layout import as_rows, device_guard, grid_1d, vector_width
from ._math import log1p
from ._rows import locate_rows, sum_partials
from .bernoulli_nll import _PADDING, _nll_terms, _pairs, _times

# (rows, columns, depth, programs) of a tile, as large as the registers of its eight warps hold on every architecture:
# the larger, the less often h and W come from the caches. As many programs as run at a time on the largest GPUs. For
# 16-bit operands; for TF32 or 32-bit data; and without tensor cores
_LARGE, _MEDIUM, _SMALL = (128, 128, 32, 128), (64, 128, 32, 256), (64, 64, 16, 256)


@triton.jit
def _halves(t):
    return tl.split(tl.permute(tl.reshape(t, (t.shape[0], 2, t.shape[1] // 2)), (0, 2, 1)))


@triton.jit
def _row_sum_of_accumulators(linear, q):
    """`_row_sum` of a matrix product's tile: eight elements that share a logarithm, all of one thread.

    Where the matrix units leave the tile, a thread has two neighbours, and more of them a multiple of eight columns on.
    """
    linear_a, linear_b = _pairs(linear)
    q_a, q_b = _pairs(q)
    linear = linear_a + linear_b
    q = _times(q_a, q_b)
    for _ in tl.static_range(2):
        linear_a, linear_b = _halves(linear)
        q_a, q_b = _halves(q)
        linear = linear_a + linear_b
        q = _times(q_a, q_b)
    return tl.sum(linear + log1p(q), axis=1, keep_dims=True)


@triton.jit(
    do_not_specialize=[
        "num_rows",
        "num_examples",
        "num_elements",
        "num_inputs",
        "splits",
        "blocks",
        "x_stride_k",
        "x_stride_b",
    ]
)
def _linear_bernoulli_nll_kernel(
    h_ptr,  # [K * B, H]
    weight_ptr,  # [D, H]
    bias_ptr,  # [D]
    x_ptr,  # [K, B, D]
    nll_ptr,  # [splits, K * B]
    num_rows,
    num_examples,
    num_elements,
    num_inputs,
    x_stride_k,
    x_stride_b,
    x_stride_d,
    splits,
    blocks,
    WIDTH: tl.constexpr,
    INPUT_WIDTH: tl.constexpr,
    LEVELS: tl.constexpr,
    PRECISION: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    DEPTH: tl.constexpr,
):
    """A program owns a tile of rows and, one after the other, `blocks` blocks of columns.

    `num_elements` and the strides k and b of x count units of WIDTH, `num_inputs` counts units of INPUT_WIDTH.
    """
    D = num_elements * WIDTH
    H = num_inputs * INPUT_WIDTH
    group = (tl.program_id(0) // splits).to(tl.int64)
    split = tl.program_id(0) % splits
    row, k, b = locate_rows(group * ROWS, num_examples, ROWS, True)
    in_rows = row < num_rows
    x_row = x_ptr + (k * x_stride_k + b * x_stride_b) * WIDTH
    # one 64-bit base for each operand's tile, and 32 bits within it
    depth = tl.arange(0, DEPTH)
    h_tile = h_ptr + group * ROWS * H
    h_offset = tl.arange(0, ROWS)[:, None] * H + depth[None, :]
    weight_step = (COLS * H).to(tl.int64)
    weight_offset = tl.arange(0, COLS)[None, :] * H + depth[:, None]
    nll = tl.zeros((ROWS, 1), tl.float32)
    for block in range(split * blocks, tl.minimum((split + 1) * blocks, tl.cdiv(D, COLS))):
        col = block * COLS + tl.arange(0, COLS)
        in_cols = col < D
        weight_tile = weight_ptr + block * weight_step
        logits = tl.zeros((ROWS, COLS), tl.float32)
        for first in range(0, H, DEPTH):
            # both operands are 0 beyond the width, so that no product is NaN
            in_depth = depth < H - first
            h = tl.load(h_tile + first + h_offset, in_rows & in_depth[None, :], other=0.0)
            weight = tl.load(weight_tile + first + weight_offset, in_cols[None, :] & in_depth[:, None], other=0.0)
            logits = tl.dot(h, weight, logits, input_precision=PRECISION)
        logits += tl.load(bias_ptr + col, in_cols, other=0.0).to(tl.float32)[None, :]
        x = tl.load(x_row + col[None, :].to(tl.int64) * x_stride_d, in_rows & in_cols[None, :], other=0)
        # a padded column costs exactly 0, see `_PADDING`
        linear, e = _nll_terms(tl.where(in_cols[None, :], logits, _PADDING), unit_interval(x, LEVELS, True), True)
        nll += _row_sum_of_accumulators(linear, e)
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
    width, input_width = vector_width(D, x_rows), vector_width(H)
    h, weight, bias = h.reshape(-1, H).contiguous(), weight.contiguous(), bias.contiguous()
    in_full = torch.get_float32_matmul_precision() == "highest"
    if h.dtype == torch.float32 and in_full:
        rows, cols, depth, programs = _SMALL
    else:
        rows, cols, depth, programs = _LARGE if max(h.element_size(), x.element_size()) <= 2 else _MEDIUM
    num_rows, num_blocks = len(h), triton.cdiv(D, cols)
    groups = triton.cdiv(num_rows, rows)
    blocks = triton.cdiv(num_blocks, max(1, min(num_blocks, programs // groups)))
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
            D // width,
            H // input_width,
            *x_rows.strides_in(width),
            splits,
            blocks,
            WIDTH=width,
            INPUT_WIDTH=input_width,
            LEVELS=levels,
            PRECISION="ieee" if in_full else "tf32",
            ROWS=rows,
            COLS=cols,
            DEPTH=depth,
            num_warps=8,
            num_stages=3,
        )
    return sum_partials(nll)[0]
