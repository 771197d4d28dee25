"""-log p(x|z) = sum_d [softplus(l_d) - x_d l_d] for Bernoulli pixels with logits l, in nats; and its gradient.

    softplus(l) = max(l, 0) + log(1 + e),  e = exp(-|l|);   d/dl = sigmoid(l) - x,  sigmoid(|l|) = 1 / (1 + e)
    sum_d log(1 + e_d) = log(1 + q),  1 + q = prod_d (1 + e_d)

One exponential and one division per element, and one logarithm for up to 64 of them: a factor is in (1, 2]. q instead
of 1 + q keeps the digits of sure logits. Source: Kingma & Welling 2013, Appendix C.1.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from torch import Tensor

from ._data import binarize_piece, data_kind, load_piece, piece_at
from ._jit import kernel, loop, term
from ._layout import NO_ROWS, PIECE, Rows, deliver, destination, plan, rows_of, scalars_of, walkable
from ._math import ONE, ZERO, exp_of_negative, log1p
from ._pieces import add_piece, row_address, store_piece
from ._pointers import f32_at, f32_scratch, f64_at, i64_at, read_ahead, shifted, write_ahead
from ._reduce import PartialSums, row_sums, row_totals
from ._threads import run

__all__ = ["bernoulli_nll_bwd", "bernoulli_nll_fwd", "bernoulli_nll_with_grad"]

_NS_PER_ELEMENT = 0.25
# Elements are taken in lines of 16; their sums and products are kept in as many lanes. Four lines, neighbours in
# memory, make one store to the lanes: a store waits for those before it, which for a gradient may be long. Blocks of
# four lines take turns in four chains of lanes, as each waits for its last sum. 64 factors share a logarithm: FLUSH
# pieces hold as many.
LINE, CHAINS, FLUSH = 16, 4, 2
BLOCK = 4 * LINE
# tensors of so many elements are not in a core's own cache. There the processor asks for data too late, as it looks
# ahead over arithmetic first: told 8 KiB before, 4096 x 784 takes 20 % less time (Zen 5). Of data or gradients in
# scratch there is nothing ahead, which costs a few instructions
FAR = 2**19


@term
def _linear_term(logit: Any, x: Any) -> Any:
    """max(l, 0) - x l."""
    return (logit if logit > ZERO else ZERO) - x * logit


@term
def _grad_term(logit: Any, x: Any, e: Any) -> Any:
    """sigmoid(l) - x."""
    larger = ONE / (ONE + e)
    return (larger if logit >= ZERO else e * larger) - x


@term
def _times(q: Any, e: Any) -> Any:
    """(1 + q) (1 + e) - 1."""
    return q + (e + q * e)


@loop
def _clear(lanes: Any) -> None:
    for i in range(CHAINS * LINE):
        lanes[i] = ZERO


@loop
def _add_line(logits: Any, x: Any, linear: Any, q: Any, weight: Any, grad: Any, count: int) -> None:
    """The linear terms are added to `linear`, the factors multiplied into `q`, each element into a lane of its own.

    The gradient is written where there is a place for it, with the same exponential; None is compiled away.
    """
    for i in range(count):
        e = exp_of_negative(-abs(logits[i]))
        linear[i] += _linear_term(logits[i], x[i])
        q[i] = _times(q[i], e)
        if grad is not None:
            grad[i] = weight * _grad_term(logits[i], x[i], e)


@loop
def _add_block(logits: Any, x: Any, linear: Any, q: Any, weight: Any, grad: Any) -> None:
    """`_add_line` of four lines."""
    for i in range(LINE):
        a, b, c = i + LINE, i + 2 * LINE, i + 3 * LINE
        e0, e1 = exp_of_negative(-abs(logits[i])), exp_of_negative(-abs(logits[a]))
        e2, e3 = exp_of_negative(-abs(logits[b])), exp_of_negative(-abs(logits[c]))
        q[i] = _times(q[i], _times(_times(e0, e1), _times(e2, e3)))
        front = _linear_term(logits[i], x[i]) + _linear_term(logits[a], x[a])
        linear[i] += front + (_linear_term(logits[b], x[b]) + _linear_term(logits[c], x[c]))
        if grad is not None:
            grad[i] = weight * _grad_term(logits[i], x[i], e0)
            grad[a] = weight * _grad_term(logits[a], x[a], e1)
            grad[b] = weight * _grad_term(logits[b], x[b], e2)
            grad[c] = weight * _grad_term(logits[c], x[c], e3)


@loop
def _nll_piece(logits: Any, x: Any, linear: Any, q: Any, weight: Any, grad: Any, count: int, far: bool) -> None:
    whole = count // BLOCK * BLOCK
    for d in range(0, whole, BLOCK):
        chain = d // BLOCK % CHAINS * LINE
        to = None if grad is None else shifted(grad, d)
        if far:
            read_ahead(shifted(logits, d))
            read_ahead(shifted(x, d))
            if grad is not None:
                write_ahead(shifted(grad, d))
        _add_block(shifted(logits, d), shifted(x, d), shifted(linear, chain), shifted(q, chain), weight, to)
    for d in range(whole, count, LINE):
        to = None if grad is None else shifted(grad, d)
        _add_line(shifted(logits, d), shifted(x, d), linear, q, weight, to, min(LINE, count - d))


@loop
def _grad_piece(logits: Any, x: Any, weight: Any, grad: Any, count: int) -> None:
    for d in range(count):
        grad[d] = weight * _grad_term(logits[d], x[d], exp_of_negative(-abs(logits[d])))


@loop
def _total(linear: Any, q: Any) -> Any:
    """The sum of the linear terms, and the logarithm of the product of the factors 1 + q."""
    total = ZERO
    for i in range(LINE):
        a, b, c = i + LINE, i + 2 * LINE, i + 3 * LINE
        product = _times(_times(q[i], q[a]), _times(q[b], q[c]))
        total += ((linear[i] + linear[a]) + (linear[b] + linear[c])) + log1p(product)
    return total


@kernel
def _bernoulli_kernel(
    first_tile: int,
    last_tile: int,
    logits: Rows,  # float32 [K, B, D]
    x: Rows,  # [K, B, D] of type x_kind
    x_kind: int,
    weight: Rows,  # float32 [K, B]; address 0: 1 / (K * B) each
    grad: Rows,  # float32 [K, B, D], may be `logits`; address 0: not wanted
    nll: int,  # float32 [K * B, tiles across], or 0
    sums: int,  # float64 [tiles down, D], or 0
    seed: int,  # int64 [1], or 0: x is not binarised
    K: int,
    B: int,
    D: int,
    across: int,
    height: int,
    width: int,
    example_offset: int,
) -> None:
    x_piece, grad_piece = f32_scratch(512), f32_scratch(512)
    linear, q = f32_scratch(64), f32_scratch(64)
    # a gradient that overwrites nothing is written where it belongs
    direct = grad[0] != logits[0]
    far = K * B * D >= FAR
    for tile in range(first_tile, last_tile):
        block, part = tile // across, tile % across
        k, b = block * height // B, block * height % B
        for r in range(block * height, min(K * B, (block + 1) * height)):
            l_row = row_address(logits, k, b)
            x_row = row_address(x, k, b)
            grad_row = row_address(grad, k, b)
            w = np.float32(1.0 / (K * B))
            if weight[0] != 0:
                w = f32_at(row_address(weight, k, b))[0]
            total = 0.0
            end = min(D, (part + 1) * width)
            for d in range(part * width, end, PIECE):
                count = min(PIECE, end - d)
                if nll != 0 and (d - part * width) // PIECE % FLUSH == 0:
                    _clear(linear)
                    _clear(q)
                if seed == 0:
                    x_here = piece_at(x_row, x_kind, d, count, x_piece)
                else:
                    load_piece(x_row, x_kind, d, count, x_piece)
                    binarize_piece(x_piece, d, count, i64_at(seed)[0], b + example_offset)
                    x_here = x_piece
                if grad[0] == 0:
                    _nll_piece(f32_at(l_row + 4 * d), x_here, linear, q, w, None, count, far)
                else:
                    to = f32_at(grad_row + 4 * d) if direct else grad_piece
                    if nll != 0:
                        _nll_piece(f32_at(l_row + 4 * d), x_here, linear, q, w, to, count, far)
                    else:
                        _grad_piece(f32_at(l_row + 4 * d), x_here, w, to, count)
                    if not direct:
                        store_piece(grad_piece, f32_at(grad_row + 4 * d), count)
                    if sums != 0:
                        add_piece(to, f64_at(sums + 8 * (block * D + d)), count)
                if nll != 0 and (d + count == end or ((d - part * width) // PIECE + 1) % FLUSH == 0):
                    total += _total(linear, q)
            if nll != 0:
                f32_at(nll)[r * across + part] = np.float32(total)
            b += 1
            if b == B:
                k, b = k + 1, 0


def _launch(
    logits: Tensor,
    x: Tensor,
    weight: Tensor | None,
    binarize_seed: Tensor | None,
    example_offset: int,
    *,
    with_nll: bool,
    with_grad: bool,
    column_sums: bool | Tensor = False,
    out: Tensor | None = None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """(nll, weight * d nll / d logits, its column sums), each if asked for; without weights those of the mean."""
    grid = plan(logits.shape)
    logits, x = walkable(logits), walkable(x)
    totals = row_totals(grid.leading, grid) if with_nll else None
    given = column_sums if isinstance(column_sums, Tensor) else None
    sums = PartialSums(grid) if given is not None or column_sums else None
    grad, weight_rows, grad_rows = None, NO_ROWS, NO_ROWS
    if weight is not None:
        weight, weight_rows = scalars_of(weight)
    if with_grad:
        grad = destination(out, logits)
        grad_rows = rows_of(grad)
    run(
        _bernoulli_kernel,
        grid,
        _NS_PER_ELEMENT * grid.elements,
        rows_of(logits),
        rows_of(x),
        data_kind(x),
        weight_rows,
        grad_rows,
        0 if totals is None else totals.data_ptr(),
        0 if sums is None else sums.address,
        0 if binarize_seed is None else binarize_seed.data_ptr(),
        *grid.sizes,
        example_offset,
    )
    return (
        None if totals is None else row_sums(totals, grid.leading, grid),
        None if grad is None else deliver(grad, out),
        None if sums is None else sums.per_column(given),
    )


def bernoulli_nll_fwd(logits: Tensor, x: Tensor, binarize_seed: Tensor | None, example_offset: int) -> Tensor:
    """nll `[...]` float32 for logits `[..., D]` float32 and x `[..., D]` float32, bool or uint8 (x / 255)."""
    nll, _, _ = _launch(logits, x, None, binarize_seed, example_offset, with_nll=True, with_grad=False)
    assert nll is not None
    return nll


def bernoulli_nll_bwd(
    dnll: Tensor, logits: Tensor, x: Tensor, binarize_seed: Tensor | None, example_offset: int
) -> Tensor:
    """dlogits `[..., D]` for dnll `[...]`."""
    _, dlogits, _ = _launch(logits, x, dnll, binarize_seed, example_offset, with_nll=False, with_grad=True)
    assert dlogits is not None
    return dlogits


def bernoulli_nll_with_grad(
    logits: Tensor,
    x: Tensor,
    row_weight: Tensor | None,
    binarize_seed: Tensor | None,
    example_offset: int,
    column_sums: bool | Tensor,
    out: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """(nll, row_weight * d nll / d logits, its sums over the rows `[D]` or None) in one pass.

    `row_weight` `[...]` is 1 / rows where it is None. `out` takes the gradient, and may be `logits`; a part of
    `ColumnSums` for the column sums takes those.
    """
    nll, dlogits, sums = _launch(
        logits,
        x,
        row_weight,
        binarize_seed,
        example_offset,
        with_nll=True,
        with_grad=True,
        column_sums=column_sums,
        out=out,
    )
    assert nll is not None
    assert dlogits is not None
    return nll, dlogits, sums
