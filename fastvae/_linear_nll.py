"""Output layer and likelihood in one, with a gradient for any upstream weight of each row, in bounded memory.

    nll_r = -log p(x_r | o_r),   o = h W^T + b,   G_r = d nll_r / d o_r;   for upstream weights w_r

    dh = w (G W)        dW = G^T (w h)        db = G^T w

The output `[..., outputs]` is made in chunks of rows by the fastest matrix product (`_linear.py`), in the precision
that torch is set to, and each chunk becomes nll, or its own gradient in place, before the next is made. The upstream
weights (importance weights need all samples' nll) are known only after the forward. Where one buffer of G fits
`KEEP_BYTES` the forward makes and keeps it, and the backward folds w into the small matrices h and G W. Where it does
not, the backward makes the chunks again.

On a GPU a Triton kernel can take the likelihood as the epilogue of the product, and no output reaches memory at all. It
runs where that traffic counts, see `Bernoulli.in_one_kernel`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from fastvae import reference
from fastvae._autograd import Grad, Kernels, reference_grads
from fastvae._linear import exact_linear, linear, linear_grads

CHUNK_BYTES = 16 * 2**20
"""Size of a chunk of the output: thousands of rows of an image model, as many as a matrix product wants."""

KEEP_BYTES = 64 * 2**20
"""Size of the gradient that a forward may keep for its backward."""


@dataclass(frozen=True)
class Bernoulli:
    """The output is logits `[..., D]`."""

    kernels: Kernels

    def in_one_kernel(self, h: Tensor, weight: Tensor) -> bool:
        """Whether the forward is left to the Triton kernel: on a GPU, for more logits than one chunk, on tensor cores.

        A rule from arithmetic, not from measurement. On tensor cores the product takes about as long as moving its
        logits to memory and back, which the kernel saves. In full float32 the product takes ten times as long, and the
        vendor's is the better one.
        """
        tensor_cores = h.dtype != torch.float32 or torch.get_float32_matmul_precision() != "highest"
        return h.device.type != "cpu" and tensor_cores and _output_bytes(h, weight) > CHUNK_BYTES

    def nll(self, out: Tensor, x: Tensor) -> Tensor:
        nll: Tensor = self.kernels.bernoulli_nll_fwd(out, x, None, 0)
        return nll

    def nll_and_grad(self, out: Tensor, x: Tensor, row_weight: Tensor) -> tuple[Tensor, Tensor]:
        """nll, and row_weight * G in the place of `out`."""
        nll, grad, _ = self.kernels.bernoulli_nll_with_grad(out, x, row_weight, None, 0, False, out=out)
        return nll, grad

    def exact(self, out: Tensor, x: Tensor) -> Tensor:
        return reference.bernoulli_nll(out, x)


@dataclass(frozen=True)
class Gaussian:
    """The output is means and log-variances `[..., 2 D]`, the latter raw if there is a floor."""

    kernels: Kernels
    floor: float | None

    def in_one_kernel(self, h: Tensor, weight: Tensor) -> bool:
        return False

    def nll(self, out: Tensor, x: Tensor) -> Tensor:
        nll: Tensor = self.kernels.gaussian_nll_fwd(*out.chunk(2, dim=-1), x, self.floor)
        return nll

    def nll_and_grad(self, out: Tensor, x: Tensor, row_weight: Tensor) -> tuple[Tensor, Tensor]:
        """nll, and row_weight * G in the place of `out`."""
        nll, grad, _ = self.one_pass(out, x, row_weight, column_sums=False)
        return nll, grad

    def one_pass(self, out: Tensor, x: Tensor, row_weight: Grad, *, column_sums: bool) -> tuple[Tensor, Tensor, Grad]:
        """The same and, if asked for, the sums of the gradient over the rows; row_weight None is 1 / rows."""
        halves = out.chunk(2, dim=-1)
        nll, *grads, sums = self.kernels.gaussian_nll_with_grad(
            *halves, x, row_weight, column_sums, out=halves, floor=self.floor
        )
        # operators do not write in place
        grad = out if grads[0] is halves[0] else torch.cat(grads, dim=-1)
        return nll, grad, None if sums is None else torch.cat(sums)

    def exact(self, out: Tensor, x: Tensor) -> Tensor:
        mu, logvar = out.chunk(2, dim=-1)
        return reference.gaussian_nll(mu, logvar, x, logvar_floor=self.floor)


Likelihood = Bernoulli | Gaussian


def _output_bytes(h: Tensor, weight: Tensor) -> int:
    return h.shape[0] * h.shape[1] * weight.shape[0] * h.element_size()


def _chunks(h: Tensor, outputs: int) -> Iterator[tuple[slice, slice]]:
    """Parts of the rows `[K, B]` of h `[K, B, H]` whose outputs fit a chunk: whole samples if one does."""
    num_samples, num_examples = h.shape[:2]
    rows = max(1, CHUNK_BYTES // max(1, outputs * h.element_size()))
    samples, examples = (rows // num_examples, num_examples) if rows >= num_examples > 0 else (1, rows)
    for k in range(0, num_samples, samples):
        for b in range(0, num_examples, examples):
            yield slice(k, k + samples), slice(b, b + examples)


def forward(likelihood: Likelihood, h: Tensor, weight: Tensor, bias: Tensor, x: Tensor) -> Tensor:
    """nll `[K, B]` for h `[K, B, H]` and x `[K, B, D]`, without a gradient."""
    if likelihood.in_one_kernel(h, weight):
        fused: Tensor = likelihood.kernels.linear_bernoulli_nll_fwd(h, weight, bias, x)
        return fused
    nll = h.new_empty(h.shape[:2], dtype=torch.float32)
    for part in _chunks(h, len(bias)):
        nll[part] = likelihood.nll(linear(likelihood.kernels, h[part], weight, bias), x[part])
    return nll


class LinearNLL(Function):
    """h `[K, B, H]` (leading dimensions flattened), weight `[outputs, H]`, bias `[outputs]`, x `[K, B, D]`."""

    @staticmethod
    def forward(ctx: Any, likelihood: Likelihood, h: Tensor, weight: Tensor, bias: Tensor, x: Tensor) -> Tensor:
        ctx.likelihood = likelihood
        if _output_bytes(h, weight) > KEEP_BYTES:
            ctx.save_for_backward(h, weight, bias, x, None)
            return forward(likelihood, h, weight, bias, x)
        one = h.new_ones((), dtype=torch.float32).expand(h.shape[:2])
        nll, grad = likelihood.nll_and_grad(linear(likelihood.kernels, h, weight, bias), x, one)
        ctx.save_for_backward(h, weight, bias, x, grad)
        return nll

    @staticmethod
    def backward(ctx: Any, dnll: Tensor) -> tuple[Any, ...]:
        h, weight, bias, x, grad = ctx.saved_tensors
        likelihood, needed = ctx.likelihood, ctx.needs_input_grad[1:4]
        if torch.is_grad_enabled():
            grads = reference_grads(
                lambda *layer: likelihood.exact(exact_linear(*layer), x), (h, weight, bias), (dnll,)
            )
        elif grad is not None:
            grads = _weighted(likelihood, needed, dnll, h, weight, grad)
        else:
            grads = _recomputed(likelihood, needed, dnll, h, weight, bias, x)
        return None, *grads, None


def _weighted(
    likelihood: Likelihood, needed: tuple[bool, bool, bool], dnll: Tensor, h: Tensor, weight: Tensor, grad: Tensor
) -> tuple[Grad, Grad, Grad]:
    """dh, dW, db, those that are needed, from G."""
    w = dnll.to(h.dtype).unsqueeze(-1)
    dh, dweight = linear_grads(likelihood.kernels, grad, w * h, weight, needed[:2])
    dbias = grad.flatten(0, -2).t() @ w.flatten() if needed[2] else None
    return None if dh is None else w * dh, dweight, dbias


def _recomputed(
    likelihood: Likelihood,
    needed: tuple[bool, bool, bool],
    dnll: Tensor,
    h: Tensor,
    weight: Tensor,
    bias: Tensor,
    x: Tensor,
) -> tuple[Grad, Grad, Grad]:
    """The same from chunks that are made again, w folded in by the kernel; sums over chunks in float32."""
    dh = torch.empty_like(h) if needed[0] else None
    dweight = weight.new_zeros(weight.shape, dtype=torch.float32) if needed[1] else None
    dbias = bias.new_zeros(bias.shape, dtype=torch.float32) if needed[2] else None
    for part in _chunks(h, len(bias)):
        out = linear(likelihood.kernels, h[part], weight, bias)
        _, grad = likelihood.nll_and_grad(out, x[part], dnll[part])
        dh_part, dweight_part = linear_grads(likelihood.kernels, grad, h[part], weight, needed[:2])
        if dh is not None and dh_part is not None:
            dh[part] = dh_part
        if dweight is not None and dweight_part is not None:
            dweight += dweight_part
        if dbias is not None:
            dbias += grad.flatten(0, -2).sum(0, dtype=torch.float32)
    return dh, None if dweight is None else dweight.to(weight.dtype), None if dbias is None else dbias.to(bias.dtype)
