"""Bernoulli negative log-likelihood: nll = sum_d [softplus(l_d) - x_d l_d], and dnll / dl_d = sigmoid(l_d) - x_d.

logits l `[*leading, D]` float32, bfloat16 or float16; data x of the same shape, float, bool or uint8 (x / 255), as it
is or binarised from a seed; nll `[*leading]` float32, nats. Source: Kingma & Welling, 2013, Appendix C.1.

    softplus(l) = max(l, 0) + log(1 + e), e = exp(-|l|)
    sum_d log(1 + e_d) = log(1 + q), 1 + q = prod_d (1 + e_d)

Each factor is in (1, 2], so that 64 of them share one logarithm; q instead of 1 + q keeps the digits of sure logits.
"""

# triton ships no types, and types jitted functions at launch
# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call, import-untyped"

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._data import as_bytes, binarize, unit_interval
from ._layout import Rows, as_rows, device_guard, grid_1d, merge_rows, vector_width
from ._math import exponential, inverse, log1p
from ._philox import load_key
from ._rows import column_walk, load_weight, locate_rows, output_rows, row_walk, sum_partials, sums_layout

# a padded logit: with x = 0 it costs max(l, 0) - x l = 0 and e = 0, exactly, in every dtype
_PADDING = tl.constexpr(-60000.0)

_UNSPECIALISED = [
    *("num_rows", "num_examples", "num_elements", "tiles", "splits", "chunks", "example_offset"),
    *("logits_stride_k", "logits_stride_b", "x_stride_k", "x_stride_b"),
    *("weight_stride_k", "weight_stride_b", "dlogits_stride_k", "dlogits_stride_b", "sum_stride"),
]


@triton.jit
def _nll_terms(logits, x, PRECISE: tl.constexpr):
    """(max(l, 0) - x l, e): what the sum over elements adds, and what the product multiplies."""
    return tl.maximum(logits, 0.0) - x * logits, exponential(-tl.abs(logits), PRECISE)


@triton.jit
def _grad(logits, x, e, weight, PRECISE: tl.constexpr):
    """weight * (sigmoid(l) - x), with sigmoid(l) = 1 / (1 + e) or e / (1 + e)."""
    r = inverse(1.0 + e, PRECISE)
    # by the bits, since LLVM would narrow a comparison of widened float16 values to packed float16
    positive = logits.to(tl.int32, bitcast=True) > 0
    return weight * (tl.where(positive, 1.0, e) * r - x)


@triton.jit
def _times(q, e):
    """(1 + q) (1 + e) - 1."""
    return q + (e + q * e)


@triton.jit
def _pairs(t):
    return tl.split(tl.reshape(t, (t.shape[0], t.shape[1] // 2, 2)))


@triton.jit
def _row_sum(linear, q, LOG_GROUP: tl.constexpr, FOLDS: tl.constexpr = 0):
    """The rows' sums `[ROWS, 1]` of `linear` + log(1 + q); 2^LOG_GROUP neighbours share a logarithm.

    A thread adds its values one by one. Where neighbours are not its own, they meet in one thread, a whole row of them:
    FOLDS adds pairs first, so that the roundings of a long chain do not add up.
    """
    for _ in tl.static_range(LOG_GROUP):
        linear_a, linear_b = _pairs(linear)
        q_a, q_b = _pairs(q)
        linear = linear_a + linear_b
        q = _times(q_a, q_b)
    total = linear + log1p(q)
    for _ in tl.static_range(FOLDS):
        total_a, total_b = _pairs(total)
        total = total_a + total_b
    return tl.sum(total, axis=1, keep_dims=True)


@triton.jit
def _step(
    logits_row,  # pointers [ROWS, 1]
    x_row,  # pointers [ROWS, 1]
    dlogits_row,  # pointers [ROWS, 1], or None
    weight,  # [ROWS, 1]
    first,
    D,
    in_rows,  # [ROWS, 1]
    example,  # [ROWS, 1]
    key_lo,
    key_hi,
    logits_stride_d,
    x_stride_d,
    dlogits_stride_d,
    COLS: tl.constexpr,
    LEVELS: tl.constexpr,
    BINARIZE: tl.constexpr,
    MASKED: tl.constexpr,
):
    """The columns from `first` on: `_nll_terms`, and the gradient, which is stored."""
    PRECISE: tl.constexpr = logits_row.dtype.element_ty == tl.float32
    col = (first + tl.arange(0, COLS)[None, :]).to(tl.int64)
    mask = in_rows & (col < D) if MASKED else in_rows
    logits = tl.load(logits_row + col * logits_stride_d, mask, other=_PADDING).to(tl.float32)
    x = unit_interval(tl.load(x_row + col * x_stride_d, mask, other=0), LEVELS, PRECISE or BINARIZE)
    if BINARIZE:
        x = binarize(x, example, first, key_lo, key_hi)
    linear, e = _nll_terms(logits, x, PRECISE)
    dlogits = _grad(logits, x, e, weight, PRECISE)
    if dlogits_row is not None:
        tl.store(dlogits_row + col * dlogits_stride_d, dlogits.to(dlogits_row.dtype.element_ty), mask)
    return linear, e, dlogits


@triton.jit(do_not_specialize=_UNSPECIALISED)
def _bernoulli_nll_kernel(
    logits_ptr,  # [K, B, D]
    x_ptr,  # [K, B, D]
    weight_ptr,  # [K, B], or None for 1 / num_rows each
    index_ptr,  # [B]: the row of x that belongs to example b; None for its own
    seed_ptr,  # [1], or None for the data as it is
    nll_ptr,  # [splits, K * B], or None without the loss
    dlogits_ptr,  # [K, B, D], or None without the gradient
    column_sum_ptr,  # [groups, D], or None without column sums
    num_rows,
    num_examples,
    num_elements,
    logits_stride_k,
    logits_stride_b,
    logits_stride_d,
    x_stride_k,
    x_stride_b,
    x_stride_d,
    weight_stride_k,
    weight_stride_b,
    dlogits_stride_k,
    dlogits_stride_b,
    dlogits_stride_d,
    sum_stride,
    tiles,
    splits,
    chunks,
    example_offset: tl.int64,
    WIDTH: tl.constexpr,
    SUM_WIDTH: tl.constexpr,
    LEVELS: tl.constexpr,
    SAMPLES: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    TAIL: tl.constexpr,
):
    """See `_rows` for the walk.

    `num_elements` and the strides k and b of all but the weight count units of WIDTH, `sum_stride` of SUM_WIDTH.
    """
    BINARIZE: tl.constexpr = seed_ptr is not None
    SUMS: tl.constexpr = column_sum_ptr is not None
    # as many neighbours as one 128-bit access of the logits brings
    LOG_GROUP: tl.constexpr = 2 if logits_ptr.dtype.element_ty == tl.float32 or COLS < 8 else 3
    TAIL_GROUP: tl.constexpr = 0 if ROWS * TAIL < 512 else 2
    FOLDS: tl.constexpr = 2 if WIDTH < 4 and COLS >= 64 else 0
    BLOCK: tl.constexpr = 64 >> LOG_GROUP
    D = num_elements * WIDTH
    group = (tl.program_id(0) // splits).to(tl.int64)
    split = tl.program_id(0) % splits
    whole = D // COLS
    begin = split * chunks
    end = tl.minimum(begin + chunks, whole)
    key_lo = 0
    key_hi = 0
    if BINARIZE:
        key_lo, key_hi = load_key(seed_ptr)
    column_sum = tl.zeros((ROWS, COLS), tl.float32)

    # along the rows there is one tile: bounds that say so leave no loop
    first_tile = group * tiles if SUMS else group
    last_tile = tl.minimum(first_tile + tiles, tl.cdiv(num_rows, ROWS)) if SUMS else group + 1
    for tile in range(first_tile, last_tile):
        row, k, b = locate_rows(tile * ROWS, num_examples, ROWS, SAMPLES)
        in_rows = row < num_rows
        example = b + example_offset
        logits_row = logits_ptr + (k * logits_stride_k + b * logits_stride_b) * WIDTH
        x_b = b if index_ptr is None else tl.load(index_ptr + b, in_rows, other=0)
        x_row = x_ptr + (k * x_stride_k + x_b * x_stride_b) * WIDTH
        dlogits_row = None
        weight = 0.0
        if dlogits_ptr is not None:
            dlogits_row = dlogits_ptr + (k * dlogits_stride_k + b * dlogits_stride_b) * WIDTH
            weight = load_weight(weight_ptr, k * weight_stride_k + b * weight_stride_b, num_rows, in_rows)
        if SUMS:
            linear, e, dlogits = _step(
                logits_row, x_row, dlogits_row, weight, split * COLS, D, in_rows, example, key_lo, key_hi,
                logits_stride_d, x_stride_d, dlogits_stride_d, COLS, LEVELS, BINARIZE, True,
            )  # fmt: skip
            column_sum += dlogits
            nll = _row_sum(linear, e, LOG_GROUP, FOLDS)
        else:
            nll = tl.zeros((ROWS, 1), tl.float32)
            for block in range(begin, end, BLOCK):
                linear = tl.zeros((ROWS, COLS), tl.float32)
                q = tl.zeros((ROWS, COLS), tl.float32)
                for chunk in range(block, tl.minimum(block + BLOCK, end)):
                    terms, e, dlogits = _step(
                        logits_row, x_row, dlogits_row, weight, chunk * COLS, D, in_rows, example, key_lo, key_hi,
                        logits_stride_d, x_stride_d, dlogits_stride_d, COLS, LEVELS, BINARIZE, False,
                    )  # fmt: skip
                    linear += terms
                    q = _times(q, e)
                nll += _row_sum(linear, q, LOG_GROUP, FOLDS)
            if TAIL:  # noqa: SIM102  # known at compile time, the next one is not
                if split == splits - 1:
                    terms, e, dlogits = _step(
                        logits_row, x_row, dlogits_row, weight, whole * COLS, D, in_rows, example, key_lo, key_hi,
                        logits_stride_d, x_stride_d, dlogits_stride_d, TAIL, LEVELS, BINARIZE, True,
                    )  # fmt: skip
                    nll += _row_sum(terms, e, TAIL_GROUP)
        if nll_ptr is not None:
            tl.store(nll_ptr + split.to(tl.int64) * num_rows + row, nll, in_rows)

    if SUMS:
        col = split * COLS + tl.arange(0, COLS)[None, :]
        sum_row = column_sum_ptr + group * sum_stride * SUM_WIDTH
        tl.store(sum_row + col, tl.sum(column_sum, axis=0, keep_dims=True), col < D)


def _launch(
    logits: Tensor,
    x: Tensor,
    weight: Tensor | None,
    binarize_seed: Tensor | None,
    example_offset: int,
    dlogits: Tensor | None,
    *,
    loss: bool,
    column_sums: bool | Tensor = False,
    index: Tensor | None = None,
) -> tuple[Tensor | None, Tensor | None]:
    """One pass over logits and x: (nll, column sums) as far as they are wanted, and the gradient into `dlogits`.

    With a tensor for the column sums both are left as partial sums, those of nll `[splits, *leading]`.
    """
    *leading, D = logits.shape
    x, levels = as_bytes(x)
    rows = [as_rows(logits), as_rows(x), as_rows(logits) if dlogits is None else output_rows(dlogits)]
    width = vector_width(D, *rows)
    rows.append(Rows(logits, 0, 0, 0) if weight is None else as_rows(weight, event=False))
    if binarize_seed is None and index is None:
        K, B, rows = merge_rows(logits.shape, *rows)
    else:
        K, B = math.prod(leading[:-1]), leading[-1] if leading else 1
    # the generator needs registers: fewer elements per thread then
    itemsize = 4 if binarize_seed is not None else logits.element_size()
    given = column_sums if isinstance(column_sums, Tensor) else None
    if given is not None or column_sums:
        walk = column_walk(K * B, D, itemsize, None if given is None else len(given))
    else:
        walk = row_walk(K * B, D, itemsize)
    nll = logits.new_empty((walk.splits, *leading), dtype=torch.float32) if loss else None
    column_sum = logits.new_empty((walk.groups, D), dtype=torch.float32) if column_sums is True else given
    sum_stride, sum_width = (0, 1) if column_sum is None else sums_layout(column_sum)
    logits_rows, x_rows, dlogits_rows, weight_rows = rows
    with device_guard(logits):
        _bernoulli_nll_kernel[grid_1d(walk.groups, walk.splits)](
            logits_rows.tensor,
            x_rows.tensor,
            None if weight is None else weight_rows.tensor,
            index,
            binarize_seed,
            nll,
            dlogits,
            column_sum,
            K * B,
            B,
            D // width,
            *logits_rows.strides_in(width),
            *x_rows.strides_in(width),
            weight_rows.stride_k,
            weight_rows.stride_b,
            *dlogits_rows.strides_in(width),
            sum_stride,
            walk.tiles,
            walk.splits,
            walk.chunks,
            example_offset,
            WIDTH=width,
            SUM_WIDTH=sum_width,
            LEVELS=levels,
            SAMPLES=K > 1,
            ROWS=walk.rows,
            COLS=walk.cols,
            TAIL=walk.tail,
            num_warps=walk.warps,
        )
    if nll is None:
        return None, None
    if given is not None:
        return nll, None
    return sum_partials(nll, column_sum)


def bernoulli_nll_fwd(logits: Tensor, x: Tensor, binarize_seed: Tensor | None, example_offset: int) -> Tensor:
    """nll float32 `[*leading]`."""
    if not logits.numel():
        return logits.new_zeros(logits.shape[:-1], dtype=torch.float32)
    nll, _ = _launch(logits, x, None, binarize_seed, example_offset, None, loss=True)
    assert nll is not None
    return nll


def bernoulli_nll_bwd(
    dnll: Tensor, logits: Tensor, x: Tensor, binarize_seed: Tensor | None, example_offset: int
) -> Tensor:
    """dlogits in the dtype of the logits, from the upstream gradient `dnll` float32 `[*leading]` of any strides."""
    dlogits = torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
    if logits.numel():
        _launch(logits, x, dnll, binarize_seed, example_offset, dlogits, loss=False)
    return dlogits


def bernoulli_nll_with_grad(
    logits: Tensor,
    x: Tensor,
    row_weight: Tensor | None,
    binarize_seed: Tensor | None,
    example_offset: int,
    column_sums: bool | Tensor,
    out: Tensor | None = None,
    index: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """(nll, dlogits, column sums `[D]` float32 or None) in one pass: dlogits = row_weight * (sigmoid(logits) - x).

    `row_weight` is float32 `[*leading]`, or None for 1 / rows; the column sums are those of dlogits over the rows, the
    gradient of the output layer's bias. `out` takes dlogits, and may be `logits` itself. With a part of `ColumnSums`
    for the column sums, partial sums go there, and nll is `[splits, *leading]`, for its `finish`. With `index` int64
    `[B]` the data of example b is row index[b] of x `[N, D]`.
    """
    dlogits = torch.empty(logits.shape, dtype=logits.dtype, device=logits.device) if out is None else out
    if not logits.numel():
        nll = logits.new_zeros(logits.shape[:-1], dtype=torch.float32)
        return nll, dlogits, logits.new_zeros(logits.shape[-1], dtype=torch.float32) if column_sums else None
    losses, column_sum = _launch(
        logits, x, row_weight, binarize_seed, example_offset, dlogits, loss=True, column_sums=column_sums, index=index
    )
    assert losses is not None
    return losses, dlogits, column_sum
