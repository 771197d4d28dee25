"""One step of Adam over all parameters of a model, which lie in one buffer.

    g += decay p,   m += (1 - beta1) (g - m),   v = beta2 v + (1 - beta2) g^2
    p -= lr / (1 - beta1^t) m / (sqrt(v) / sqrt(1 - beta2^t) + eps)

Source: Kingma & Ba 2014, Algorithm 1; the weight decay is an L2 penalty, as in torch.optim.Adam. t is read on the
device, where the steps are counted.
"""

# triton ships no types, and types jitted functions at launch
# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call, import-untyped"

from __future__ import annotations

import math

import triton
import triton.language as tl
from torch import Tensor

from ._layout import device_guard, grid_1d

__all__ = ["adam_flat_"]

_BLOCK = 1024  # two 128-bit accesses per thread and tensor


@triton.jit
def _one_minus_power(log_beta, t):
    """1 - beta^t in float32, to its last digits where it is small: 0.001 at the first steps."""
    y = log_beta * t
    # expm1(y) / y by its series: the next term is below 2e-8 of the sum
    series = tl.fma(y, 1.0 / 7.0, 1.0)
    for n in tl.static_range(6, 1, -1):
        series = tl.fma(y * series, 1.0 / n, 1.0)
    return tl.where(y > -0.35, -y * series, 1.0 - tl.exp(y))


@triton.jit(do_not_specialize=["log_beta1", "log_beta2", "one_minus_beta1", "one_minus_beta2", "eps", "decay"])
def _adam_kernel(
    p_ptr,  # [num_elements]
    g_ptr,  # [num_elements]
    m_ptr,  # [num_elements]
    v_ptr,  # [num_elements]
    taken_ptr,  # [1]: t - 1
    lr_ptr,  # [1]
    num_elements,
    log_beta1: tl.float32,
    log_beta2: tl.float32,
    one_minus_beta1: tl.float32,
    one_minus_beta2: tl.float32,
    eps: tl.float32,
    decay: tl.float32,
    BLOCK: tl.constexpr,
):
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = i < num_elements
    t = (tl.load(taken_ptr) + 1).to(tl.float32)
    step_size = tl.load(lr_ptr) / _one_minus_power(log_beta1, t)
    root = 1.0 / tl.sqrt(_one_minus_power(log_beta2, t))
    p = tl.load(p_ptr + i, mask, other=0.0)
    m = tl.load(m_ptr + i, mask, other=0.0)
    v = tl.load(v_ptr + i, mask, other=0.0)
    g = tl.fma(decay, p, tl.load(g_ptr + i, mask, other=0.0).to(tl.float32))
    m = tl.fma(one_minus_beta1, g - m, m)
    v = tl.fma(one_minus_beta2, g * g - v, v)
    tl.store(m_ptr + i, m, mask)
    tl.store(v_ptr + i, v, mask)
    tl.store(p_ptr + i, p - step_size * (m / tl.fma(tl.sqrt(v), root, eps)), mask)


def adam_flat_(
    parameters: Tensor,
    gradients: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    taken: Tensor,
    lr: Tensor,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
) -> None:
    """The step after `taken` steps (int64 `[1]`) in place; contiguous `[P]`, float32 but for the gradients."""
    beta1, beta2 = betas
    num_elements = parameters.numel()
    with device_guard(parameters):
        _adam_kernel[grid_1d(triton.cdiv(num_elements, _BLOCK))](
            parameters,
            gradients,
            exp_avg,
            exp_avg_sq,
            taken,
            lr,
            num_elements,
            math.log(beta1),
            math.log(beta2),
            1.0 - beta1,
            1.0 - beta2,
            eps,
            weight_decay,
            BLOCK=_BLOCK,
        )
