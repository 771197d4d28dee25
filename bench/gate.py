"""No figure for a wrong result: every provider is compared with float64 before it is timed.

Results and gradients must be within a tolerance of the largest value of the exact ones, computed from the same inputs
by `fastvae.reference` in float64. Providers draw noise of their own; it is recovered from what they drew, must have the
moments of the noise that was asked for, and must explain everything else that they return.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from bench.formulas import Function, Results
from bench.ops import OPS, Case

__all__ = ["upstream", "wrong"]

# of the largest value: about a hundred units in the last place, far less than any real mistake
TOLERANCES = {torch.float32: 2e-5, torch.bfloat16: 2e-2, torch.float16: 2e-3}
# standard errors: one false alarm in 10^8
SIGMAS = 6.0


def upstream(results: Results) -> list[Tensor]:
    """Random gradients of the results; 1 for a scalar loss."""
    generator = torch.Generator().manual_seed(4)
    return [
        torch.randn(r.shape, generator=generator).to(r.device, r.dtype) if r.ndim else torch.ones_like(r)
        for r in results
    ]


def _gradients(results: Results, inputs: Sequence[Tensor]) -> list[Tensor]:
    leaves = [t for t in inputs if t.requires_grad]
    if not leaves:
        return []
    # the same random numbers for both sides, whatever their types
    gradients = [g.to(r.dtype) for g, r in zip(upstream(tuple(r.float() for r in results)), results)]
    return list(torch.autograd.grad(results, leaves, gradients))


def wrong(case: Case, provider: Function, inputs: Sequence[Tensor]) -> str | None:
    """None if the provider is right, else what is wrong with it."""
    op = OPS[case.op]
    results = provider(*inputs)
    # a provider may reuse its buffers, as torch.compile with CUDA graphs does
    found = [t.detach().double().clone() for t in (*results, *_gradients(results, inputs))]

    wide = [t.detach().double().requires_grad_() if t.requires_grad else t for t in inputs]
    if op.noise is None or op.exact is None:
        exact_results = op.reference(*wide, **case.options)
    else:
        noise = op.noise([t.detach() for t in wide], tuple(found[: len(results)]))
        if complaint := _implausible(noise):
            return complaint
        exact_results = op.exact(noise, *wide)
    exact = [t.detach().double() for t in (*exact_results, *_gradients(exact_results, wide))]

    tolerance = TOLERANCES[getattr(torch, case.dtype)]
    for number, (got, expected) in enumerate(zip(found, exact, strict=True)):
        what = f"result {number}" if number < len(results) else f"gradient {number - len(results)}"
        if got.shape != expected.shape:
            return f"{what} has shape {list(got.shape)}, expected {list(expected.shape)}"
        error = ((got - expected).abs().max() / expected.abs().max()).item()
        # a comparison with NaN is false
        if not error <= tolerance:
            return f"{what} is off by {error:.1e} of its largest value, allowed {tolerance:.0e}"
    return None


def _implausible(noise: Tensor) -> str | None:
    mean, variance = noise.mean().item(), noise.var().item()
    # the variance of x^2 is its kurtosis less 1: 2 for a normal
    spread = math.sqrt(max(noise.pow(4).mean().item() - 1.0, 2.0) / noise.numel())
    if not (abs(mean) <= SIGMAS / math.sqrt(noise.numel()) and abs(variance - 1.0) <= SIGMAS * spread):
        return f"the noise has mean {mean:.3g} and variance {variance:.3g}, expected 0 and 1"
    return None
