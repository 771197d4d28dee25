"""The first and the last kernel of a training step: what it reads from the step counter, and what it leaves behind.

Step t of a run with key k takes the examples at positions first .. first + B - 1 of its batch in the epoch's order, the
seed k + t, and row t of the schedules of learning rate and KL weight. It ends by writing (loss, nll, kl), means over
the batch, to row t mod R of a ring, and t + 1 to the counter.
"""

# triton ships no types, and types jitted functions at launch
# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call, import-untyped"

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ._layout import device_guard, grid_1d

__all__ = ["begin_step", "end_step"]

_INDEX_BLOCK, _CAST_BLOCK, _MEAN_BLOCK = 1024, 2048, 2048


@triton.jit(do_not_specialize=["key", "steps_per_epoch", "batch_size", "first", "num_indices"])
def _begin_step_kernel(
    step_ptr,  # [1]
    lr_ptr,  # [steps]
    beta_ptr,  # [steps]
    order_ptr,  # [N], or None
    wide_ptr,  # [num_cast] float32, or None
    seed_ptr,  # [1]
    lr_out_ptr,  # [1]
    weights_out_ptr,  # [3]: beta, 1 / B, beta / B
    index_ptr,  # [num_indices]
    narrow_ptr,  # [num_cast]
    key: tl.int64,
    steps_per_epoch: tl.int64,
    batch_size: tl.int64,
    first: tl.int64,
    num_indices,
    num_cast,
    row_weight: tl.float32,
    INDEX_BLOCK: tl.constexpr,
    CAST_BLOCK: tl.constexpr,
):
    program = tl.program_id(0)
    step = tl.load(step_ptr)
    if program == 0:
        beta = tl.load(beta_ptr + step)
        tl.store(seed_ptr, key + step)
        tl.store(lr_out_ptr, tl.load(lr_ptr + step))
        tl.store(weights_out_ptr, beta)
        tl.store(weights_out_ptr + 1, row_weight)
        tl.store(weights_out_ptr + 2, beta * row_weight)
    index_programs = tl.cdiv(num_indices, INDEX_BLOCK)
    if program < index_programs:
        if order_ptr is not None:
            i = program * INDEX_BLOCK + tl.arange(0, INDEX_BLOCK)
            position = step % steps_per_epoch * batch_size + first + i
            tl.store(index_ptr + i, tl.load(order_ptr + position, i < num_indices, other=0), i < num_indices)
    elif wide_ptr is not None:
        element = (program - index_programs) * CAST_BLOCK + tl.arange(0, CAST_BLOCK)
        value = tl.load(wide_ptr + element, element < num_cast, other=0.0)
        tl.store(narrow_ptr + element, value.to(narrow_ptr.dtype.element_ty), element < num_cast)


@triton.jit
def _mean(ptr, count, BLOCK: tl.constexpr):
    total = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, count, BLOCK):
        i = start + tl.arange(0, BLOCK)
        total += tl.load(ptr + i, i < count, other=0.0)
    return tl.sum(total) / count


@triton.jit(do_not_specialize=["num_rows"])
def _end_step_kernel(
    step_ptr,  # [1]
    loss_ptr,  # [1], or None for nll + beta * kl
    nll_ptr,  # [num_examples]
    kl_ptr,  # [num_examples]
    beta_ptr,  # [1]
    metrics_ptr,  # [num_rows, 3]
    num_examples,
    num_rows: tl.int64,
    BLOCK: tl.constexpr,
):
    nll = _mean(nll_ptr, num_examples, BLOCK)
    kl = _mean(kl_ptr, num_examples, BLOCK)
    loss = nll + tl.load(beta_ptr) * kl if loss_ptr is None else tl.load(loss_ptr)
    step = tl.load(step_ptr)
    row = metrics_ptr + step % num_rows * 3
    tl.store(row, loss)
    tl.store(row + 1, nll)
    tl.store(row + 2, kl)
    tl.store(step_ptr, step + 1)


def begin_step(
    step: Tensor,
    key: int,
    lr: Tensor,
    beta: Tensor,
    order: Tensor | None,
    batch_size: int,
    first: int,
    out: tuple[Tensor, Tensor, Tensor, Tensor],
    cast: tuple[Tensor, Tensor] | None = None,
) -> None:
    """Writes `out`: seed int64 `[1]`, lr float32 `[]`, (beta, 1 / B, beta / B) float32 `[3]`, index int64 `[B]`.

    `step` is int64 `[1]`, `lr` and `beta` the schedules float32 `[steps]`, `order` that of the epoch, int64 `[N]`;
    without it the index stays as it is. `cast` is two contiguous tensors of one size: the first, float32, is copied
    into the second.
    """
    seed, lr_out, weights_out, index = out
    wide, narrow = cast or (None, None)
    num_cast = 0 if wide is None else wide.numel()
    grid = grid_1d(triton.cdiv(len(index), _INDEX_BLOCK) + triton.cdiv(num_cast, _CAST_BLOCK))
    with device_guard(step):
        _begin_step_kernel[grid](
            step,
            lr,
            beta,
            order,
            wide,
            seed,
            lr_out,
            weights_out,
            index,
            narrow,
            key,
            1 if order is None else len(order) // batch_size,
            batch_size,
            first,
            len(index),
            num_cast,
            1.0 / len(index),
            INDEX_BLOCK=_INDEX_BLOCK,
            CAST_BLOCK=_CAST_BLOCK,
        )


def end_step(step: Tensor, loss: Tensor | None, nll: Tensor, kl: Tensor, beta: Tensor, metrics: Tensor) -> None:
    """Writes (loss, mean nll, mean kl) to row `step` mod R of `metrics` float32 `[R, 3]`, and adds 1 to `step`.

    `nll` and `kl` are contiguous float32 `[B]`; without a `loss`, of one element, it is nll + beta * kl.
    """
    with device_guard(step):
        _end_step_kernel[grid_1d(1)](
            step, loss, nll, kl, beta, metrics, len(nll), len(metrics), BLOCK=_MEAN_BLOCK, num_warps=8
        )
