"""The autograd Functions: each saves, calls `_fwd`, calls `_bwd`, and has no ideas of its own.

The first argument of each is the kernel package that runs it (see `fastvae.functional`). Inputs have been checked and
expanded to one shape. A backward that is itself differentiated (`create_graph=True`) goes to the reference.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from fastvae import reference

Kernels = (
    Any  # a module: the two kernel packages and `fastvae._library` share the signatures of their `_fwd` and `_bwd`
)
Grad = Tensor | None


def reference_grads(op: Callable[..., Any], inputs: Sequence[Tensor], grads: Sequence[Grad]) -> tuple[Grad, ...]:
    """The vector-Jacobian product of a reference op, differentiable again."""
    # views, so that one tensor given twice is two inputs
    inputs = [t.view_as(t) for t in inputs]
    outputs = op(*inputs)
    pairs = [(o, g) for o, g in zip(outputs if isinstance(outputs, tuple) else (outputs,), grads) if g is not None]
    needed = [t for t in inputs if t.requires_grad]
    outputs, upstream = [o for o, _ in pairs], [g for _, g in pairs]
    found = iter(torch.autograd.grad(outputs, needed, upstream, create_graph=True, allow_unused=True))
    return tuple(next(found) if t.requires_grad else None for t in inputs)


def apply(function: type[Function], *args: Any) -> Any:
    """`function.apply(*args)` without its preparations for `torch.func`, 2 microseconds of each call.

    `choose_backend` has seen that no transforms are active. torch.compile knows the method itself.
    """
    if torch.compiler.is_compiling():
        return function.apply(*args)
    return super(Function, function).apply(*args)  # type: ignore[misc]


class Reparameterize(Function):
    @staticmethod
    def forward(
        ctx: Any, kernels: Kernels, mu: Tensor, logvar: Tensor, seed: Tensor, where: tuple[int | None, int, int, int]
    ) -> Tensor:
        ctx.save_for_backward(mu, logvar, seed)
        ctx.kernels, ctx.where = kernels, where
        return kernels.reparameterize_fwd(mu, logvar, seed, *where)

    @staticmethod
    def backward(ctx: Any, dz: Tensor) -> tuple[Any, ...]:
        mu, logvar, seed = ctx.saved_tensors
        num_samples, example_offset, sample_offset, stream = ctx.where
        if torch.is_grad_enabled():

            def op(mu: Tensor, logvar: Tensor) -> Tensor:
                return reference.reparameterize(
                    mu,
                    logvar,
                    seed,
                    num_samples=num_samples,
                    example_offset=example_offset,
                    sample_offset=sample_offset,
                    stream=stream,
                )

            dmu, dlogvar = reference_grads(op, (mu, logvar), (dz,))
        else:
            dmu, dlogvar = ctx.kernels.reparameterize_bwd(dz, logvar, seed, *ctx.where)
            dmu = dz if num_samples is None else dmu
        return None, dmu, dlogvar, None, None


class KLStandardNormal(Function):
    @staticmethod
    def forward(ctx: Any, kernels: Kernels, mu: Tensor, logvar: Tensor) -> Tensor:
        ctx.save_for_backward(mu, logvar)
        ctx.kernels = kernels
        return kernels.kl_standard_normal_fwd(mu, logvar)

    @staticmethod
    def backward(ctx: Any, dkl: Tensor) -> tuple[Any, ...]:
        if torch.is_grad_enabled():
            return None, *reference_grads(reference.kl_standard_normal, ctx.saved_tensors, (dkl,))
        return None, *ctx.kernels.kl_standard_normal_bwd(dkl, *ctx.saved_tensors)


class KLNormal(Function):
    @staticmethod
    def forward(ctx: Any, kernels: Kernels, mu_q: Tensor, logvar_q: Tensor, mu_p: Tensor, logvar_p: Tensor) -> Tensor:
        ctx.save_for_backward(mu_q, logvar_q, mu_p, logvar_p)
        ctx.kernels = kernels
        return kernels.kl_normal_fwd(mu_q, logvar_q, mu_p, logvar_p)

    @staticmethod
    def backward(ctx: Any, dkl: Tensor) -> tuple[Any, ...]:
        if torch.is_grad_enabled():
            return None, *reference_grads(reference.kl_normal, ctx.saved_tensors, (dkl,))
        return None, *ctx.kernels.kl_normal_bwd(dkl, *ctx.saved_tensors)


class ReparameterizeKL(Function):
    @staticmethod
    def forward(
        ctx: Any,
        kernels: Kernels,
        mu: Tensor,
        logvar: Tensor,
        seed: Tensor,
        example_offset: int,
        stream: int,
        per_dim: bool,
    ) -> tuple[Tensor, ...]:
        ctx.save_for_backward(mu, logvar, seed)
        ctx.kernels, ctx.where = kernels, (example_offset, stream)
        ctx.set_materialize_grads(False)
        z, kl, kl_per_dim = kernels.reparameterize_kl_fwd(mu, logvar, seed, example_offset, stream, per_dim)
        if not per_dim:
            return z, kl
        ctx.mark_non_differentiable(kl_per_dim)
        return z, kl, kl_per_dim

    @staticmethod
    def backward(ctx: Any, dz: Grad, dkl: Grad, *_: Grad) -> tuple[Any, ...]:
        mu, logvar, seed = ctx.saved_tensors
        example_offset, stream = ctx.where
        if torch.is_grad_enabled():

            def op(mu: Tensor, logvar: Tensor) -> tuple[Tensor, Tensor]:
                return reference.reparameterize_kl(mu, logvar, seed, example_offset=example_offset, stream=stream)

            dmu, dlogvar = reference_grads(op, (mu, logvar), (dz, dkl))
        else:
            dmu, dlogvar = ctx.kernels.reparameterize_kl_bwd(dz, dkl, mu, logvar, seed, example_offset, stream)
        return None, dmu, dlogvar, None, None, None, None


class ReparameterizeLogRatio(Function):
    @staticmethod
    def forward(
        ctx: Any,
        kernels: Kernels,
        mu: Tensor,
        logvar: Tensor,
        seed: Tensor,
        num_samples: int,
        sticking_the_landing: bool,
        example_offset: int,
        sample_offset: int,
    ) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(mu, logvar, seed)
        ctx.kernels = kernels
        ctx.where = (num_samples, sticking_the_landing, example_offset, sample_offset)
        ctx.set_materialize_grads(False)
        return kernels.reparameterize_log_ratio_fwd(mu, logvar, seed, num_samples, example_offset, sample_offset)

    @staticmethod
    def backward(ctx: Any, dz: Grad, dlog_ratio: Grad) -> tuple[Any, ...]:
        mu, logvar, seed = ctx.saved_tensors
        num_samples, sticking_the_landing, example_offset, sample_offset = ctx.where
        if torch.is_grad_enabled():

            def op(mu: Tensor, logvar: Tensor) -> tuple[Tensor, Tensor]:
                return reference.reparameterize_log_ratio(
                    mu,
                    logvar,
                    seed,
                    num_samples=num_samples,
                    sticking_the_landing=sticking_the_landing,
                    example_offset=example_offset,
                    sample_offset=sample_offset,
                )

            dmu, dlogvar = reference_grads(op, (mu, logvar), (dz, dlog_ratio))
        else:
            dmu, dlogvar = ctx.kernels.reparameterize_log_ratio_bwd(dz, dlog_ratio, mu, logvar, seed, *ctx.where)
        return None, dmu, dlogvar, None, None, None, None, None


class BernoulliNLL(Function):
    @staticmethod
    def forward(
        ctx: Any, kernels: Kernels, logits: Tensor, x: Tensor, binarize_seed: Grad, example_offset: int
    ) -> Tensor:
        ctx.save_for_backward(logits, x, binarize_seed)
        ctx.kernels, ctx.example_offset = kernels, example_offset
        return kernels.bernoulli_nll_fwd(logits, x, binarize_seed, example_offset)

    @staticmethod
    def backward(ctx: Any, dnll: Tensor) -> tuple[Any, ...]:
        logits, x, seed = ctx.saved_tensors
        if torch.is_grad_enabled():

            def op(logits: Tensor) -> Tensor:
                return reference.bernoulli_nll(logits, x, binarize_seed=seed, example_offset=ctx.example_offset)

            (dlogits,) = reference_grads(op, (logits,), (dnll,))
        else:
            dlogits = ctx.kernels.bernoulli_nll_bwd(dnll, logits, x, seed, ctx.example_offset)
        return None, dlogits, None, None, None


class GaussianNLL(Function):
    @staticmethod
    def forward(
        ctx: Any, kernels: Kernels, mu: Tensor, logvar: Tensor, x: Tensor, logvar_floor: float | None
    ) -> Tensor:
        ctx.save_for_backward(mu, logvar, x)
        ctx.kernels, ctx.logvar_floor = kernels, logvar_floor
        return kernels.gaussian_nll_fwd(mu, logvar, x, logvar_floor)

    @staticmethod
    def backward(ctx: Any, dnll: Tensor) -> tuple[Any, ...]:
        mu, logvar, x = ctx.saved_tensors
        if torch.is_grad_enabled():

            def op(mu: Tensor, logvar: Tensor) -> Tensor:
                return reference.gaussian_nll(mu, logvar, x, logvar_floor=ctx.logvar_floor)

            return None, *reference_grads(op, (mu, logvar), (dnll,)), None, None
        return None, *ctx.kernels.gaussian_nll_bwd(dnll, mu, logvar, x, ctx.logvar_floor), None, None
