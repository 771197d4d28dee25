"""The first and the last kernel of a training step: what it reads from the step counter, and what it leaves behind.

Step t of a run with key k takes the examples at positions first .. first + B - 1 of its batch in the epoch's order, the
seed k + t, and row t of the schedules of learning rate and KL weight. It ends by writing (loss, nll, kl), means over
the batch, to row t mod R of a ring, and t + 1 to the counter.
"""

from __future__ import annotations

import numpy as np
from torch import Tensor

from ._jit import kernel
from ._pointers import f32_at, i64_at
from ._record import launch

__all__ = ["begin_step", "end_step"]


@kernel
def _begin_step_kernel(
    step: int,  # int64 [1]
    key: int,
    lr: int,  # float32 [steps]
    beta: int,  # float32 [steps]
    order: int,  # int64 [N], or 0
    steps_per_epoch: int,
    batch_size: int,
    first: int,
    seed_out: int,  # int64 [1]
    lr_out: int,  # float32 [1]
    weights_out: int,  # float32 [3]: beta, 1 / B, beta / B
    index_out: int,  # int64 [B]
    B: int,
) -> None:
    t = i64_at(step)[0]
    i64_at(seed_out)[0] = key + t
    f32_at(lr_out)[0] = f32_at(lr)[t]
    weights, row_weight = f32_at(weights_out), np.float32(1.0 / B)
    weights[0], weights[1], weights[2] = f32_at(beta)[t], row_weight, f32_at(beta)[t] * row_weight
    if order:
        start = order + 8 * (t % steps_per_epoch * batch_size + first)
        index, rows = i64_at(index_out), i64_at(start)
        for b in range(B):
            index[b] = rows[b]


@kernel
def _end_step_kernel(
    step: int,  # int64 [1]
    loss: int,  # float32 [1], or 0 for nll + beta * kl
    nll: int,  # float32 [B]
    kl: int,  # float32 [B]
    beta: int,  # float32 [1]
    metrics: int,  # float32 [rows, 3]
    B: int,
    rows: int,
) -> None:
    nll_sum, kl_sum = 0.0, 0.0
    nlls, kls = f32_at(nll), f32_at(kl)
    for b in range(B):
        nll_sum += np.float64(nlls[b])
        kl_sum += np.float64(kls[b])
    t = i64_at(step)[0]
    row = f32_at(metrics + 12 * (t % rows))
    row[1], row[2] = np.float32(nll_sum / B), np.float32(kl_sum / B)
    row[0] = f32_at(loss)[0] if loss else row[1] + f32_at(beta)[0] * row[2]
    i64_at(step)[0] = t + 1


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
    without it the index stays as it is. `cast` is two contiguous tensors of one size, of which the first is copied into
    the second. All but the latter has to stay where it is.
    """
    seed_out, lr_out, weights_out, index_out = out
    launch(
        _begin_step_kernel,
        step.data_ptr(),
        key,
        lr.data_ptr(),
        beta.data_ptr(),
        0 if order is None else order.data_ptr(),
        1 if order is None else len(order) // batch_size,
        batch_size,
        first,
        seed_out.data_ptr(),
        lr_out.data_ptr(),
        weights_out.data_ptr(),
        index_out.data_ptr(),
        len(index_out),
    )
    if cast is not None:
        wide, narrow = cast
        narrow.copy_(wide)


def end_step(step: Tensor, loss: Tensor | None, nll: Tensor, kl: Tensor, beta: Tensor, metrics: Tensor) -> None:
    """Writes (loss, mean nll, mean kl) to row `step` mod R of `metrics` float32 `[R, 3]`, and adds 1 to `step`.

    `nll` and `kl` are contiguous float32 `[B]`; without a `loss`, of one element, it is nll + beta * kl.
    """
    launch(
        _end_step_kernel,
        step.data_ptr(),
        0 if loss is None else loss.data_ptr(),
        nll.data_ptr(),
        kl.data_ptr(),
        beta.data_ptr(),
        metrics.data_ptr(),
        len(nll),
        len(metrics),
    )
