"""What `bench.kernels` measures: every op with a kernel, at the shapes of real models.

Beside each op stand the bytes that it cannot avoid: every input read once, every result written once, in the forward
and in the backward. Noise and whatever else can be recomputed is not counted. The one-pass losses (`*_loss`) have no
backward of their own, and the gather has none at all.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from bench import formulas
from bench.formulas import Function, Results
from bench.rivals import OURS
from fastvae import functional as F
from fastvae import reference

__all__ = ["OPS", "Case", "Op", "cases", "functions"]


@dataclass(frozen=True)
class Case:
    """An op at one shape and type."""

    op: str
    shape: str
    """Leading dimensions x event, such as 50x100x784."""
    dtype: str = "float32"
    data: str = ""
    """Type of the data, for the ops that take some."""

    @property
    def dims(self) -> list[int]:
        return [int(n) for n in self.shape.split("x")]

    @property
    def name(self) -> str:
        return "-".join(filter(None, (self.op, self.shape, self.dtype, self.data)))

    @property
    def options(self) -> dict[str, Any]:
        """Keyword arguments of the op."""
        return {"num_samples": self.dims[0]} if self.op == "reparameterize_log_ratio" else {}

    def inputs(self, device: str) -> list[Tensor]:
        """The op's tensors: leaves that need a gradient, then data."""
        return OPS[self.op].inputs(self, device)


@dataclass(frozen=True)
class Op:
    """One public op, as a function of tensors that returns a tuple of its differentiable results."""

    inputs: Callable[[Case, str], list[Tensor]]
    ours: Function
    reference: Function
    bytes: Callable[[Case, Sequence[Tensor]], dict[str, int | None]]
    """Least bytes of each mode that the op has: forward, backward, both. None: not bound by them."""
    exact: Callable[..., Results] | None = None
    """For ops that draw noise: the results from (noise, *inputs); the reference serves the others."""
    noise: Callable[[Sequence[Tensor], Results], Tensor] | None = None
    """The noise, of mean 0 and variance 1, that gave these results."""


# inputs


def _leaves(case: Case, device: str, *shapes: Sequence[int], scale: float = 0.5) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    values = [torch.randn(*shape, generator=generator) * scale for shape in shapes]
    return [v.to(device, getattr(torch, case.dtype)).requires_grad_() for v in values]


def _data(case: Case, device: str, *shape: int) -> Tensor:
    # no 0 and no 255: every pixel of a binarised batch is then uncertain, and its noise has variance 1
    bits = torch.randint(1, 255, shape, generator=torch.Generator().manual_seed(2), dtype=torch.uint8)
    return (bits if case.data == "uint8" else (bits / 255.0).to(getattr(torch, case.data))).to(device)


def _posterior(case: Case, device: str) -> list[Tensor]:
    dims = case.dims[1:] if case.op == "reparameterize_log_ratio" else case.dims
    return _leaves(case, device, dims, dims)


def _two_normals(case: Case, device: str) -> list[Tensor]:
    return _leaves(case, device, *[case.dims] * 4)


def _logits(case: Case, device: str) -> list[Tensor]:
    return [*_leaves(case, device, case.dims, scale=2.0), _data(case, device, *case.dims[-2:])]


def _normal(case: Case, device: str) -> list[Tensor]:
    return [*_leaves(case, device, case.dims, case.dims), _data(case, device, *case.dims[-2:])]


def _layer(case: Case, device: str) -> list[Tensor]:
    """Shape B x H x D: h `[B, H]`, weight `[D, H]`, bias `[D]`, data `[B, D]`."""
    batch, width, outputs = case.dims
    leaves = _leaves(case, device, (batch, width), (outputs, width), (outputs,), scale=width**-0.25)
    return [*leaves, _data(case, device, batch, outputs)]


def _hidden_layer(case: Case, device: str) -> list[Tensor]:
    """Shape B x I x O: x `[B, I]`, weight `[O, I]`, bias `[O]`."""
    batch, inputs, outputs = case.dims
    return _leaves(case, device, (batch, inputs), (outputs, inputs), (outputs,), scale=inputs**-0.25)


def _samples_layer(case: Case, device: str) -> list[Tensor]:
    """Shape K x B x H x D: h `[K, B, H]`, weight and bias of D outputs (2 D for a Gaussian), data `[B, D]`."""
    *rows, width, elements = case.dims
    outputs = elements * (2 if case.op.startswith("linear_gaussian") else 1)
    leaves = _leaves(case, device, (*rows, width), (outputs, width), (outputs,), scale=width**-0.25)
    return [*leaves, _data(case, device, rows[-1], elements)]


def _data_set(case: Case, device: str) -> list[Tensor]:
    """A data set of 20,000 examples, and the index of a batch of them."""
    index = torch.randint(0, 20_000, case.dims[:1], generator=torch.Generator().manual_seed(3))
    return [_data(case, device, 20_000, case.dims[1]), index.to(device)]


# bytes


def _size(*tensors: Tensor) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)


def _rows(t: Tensor) -> int:
    """Of one float32 result per row."""
    return 4 * math.prod(t.shape[:-1])


def _modes(forward: int, backward: int) -> dict[str, int | None]:
    return {"forward": forward, "backward": backward, "both": forward + backward}


def _reparameterize_bytes(case: Case, t: Sequence[Tensor]) -> dict[str, int | None]:
    # mu, logvar -> z; dz, logvar -> dlogvar, as dmu is dz
    return _modes(3 * _size(t[0]), 3 * _size(t[0]))


def _kl_bytes(case: Case, t: Sequence[Tensor]) -> dict[str, int | None]:
    # parameters -> kl; dkl, parameters -> their gradients
    return _modes(_size(*t) + _rows(t[0]), 2 * _size(*t) + _rows(t[0]))


def _reparameterize_kl_bytes(case: Case, t: Sequence[Tensor]) -> dict[str, int | None]:
    # mu, logvar -> z, kl; dz, dkl, mu, logvar -> dmu, dlogvar
    return _modes(3 * _size(t[0]) + _rows(t[0]), 5 * _size(t[0]) + _rows(t[0]))


def _log_ratio_bytes(case: Case, t: Sequence[Tensor]) -> dict[str, int | None]:
    # mu, logvar -> K (z, log_ratio); K (dz, dlog_ratio), mu, logvar -> dmu, dlogvar
    samples = case.dims[0] * (_size(t[0]) + _rows(t[0]))
    return _modes(2 * _size(t[0]) + samples, 4 * _size(t[0]) + samples)


def _likelihood_bytes(case: Case, t: Sequence[Tensor]) -> dict[str, int | None]:
    # predictions, x -> nll; dnll, predictions, x -> gradients of the predictions
    forward = _size(*t) + _rows(t[0])
    return _modes(forward, forward + _size(*t[:-1]))


def _one_pass_bytes(case: Case, t: Sequence[Tensor]) -> dict[str, int | None]:
    # predictions, x -> nll, gradients of the predictions
    return {"both": _size(*t) + _size(*t[:-1]) + _rows(t[0])}


def _linear_bytes(case: Case, t: Sequence[Tensor]) -> dict[str, int | None]:
    # bound by the three matrix products
    return {"both": None}


def _products_bytes(case: Case, t: Sequence[Tensor]) -> dict[str, int | None]:
    return {"forward": None, "backward": None, "both": None}


def _gather_bytes(case: Case, t: Sequence[Tensor]) -> dict[str, int | None]:
    # index, rows of the data set -> float32
    elements = math.prod(case.dims)
    return {"forward": _size(t[1]) + elements * (t[0].element_size() + 4)}


# noise


def _normal_noise(t: Sequence[Tensor], results: Results) -> Tensor:
    return (results[0] - t[0]) * torch.exp(-0.5 * t[1])


def _exact_z(eps: Tensor, mu: Tensor, logvar: Tensor) -> Results:
    return (mu + torch.exp(0.5 * logvar) * eps,)


def _exact_z_kl(eps: Tensor, mu: Tensor, logvar: Tensor) -> Results:
    return *_exact_z(eps, mu, logvar), reference.kl_standard_normal(mu, logvar)


def _exact_z_log_ratio(eps: Tensor, mu: Tensor, logvar: Tensor) -> Results:
    (z,) = _exact_z(eps, mu, logvar)
    return z, 0.5 * (eps.square() + logvar - z.square()).sum(-1)


def _grey(data: Tensor, index: Tensor) -> Tensor:
    return data[index].double() / 255.0


def _bernoulli_noise(t: Sequence[Tensor], draws: Results) -> Tensor:
    p = _grey(*t)
    return (draws[0] - p) * torch.rsqrt(p * (1 - p))


def _exact_draws(noise: Tensor, *t: Tensor) -> Results:
    p = _grey(*t)
    return (p + torch.sqrt(p * (1 - p)) * noise,)


# the table


def _one(function: Callable[..., Tensor]) -> Function:
    return lambda *args, **options: (function(*args, **options),)


def _loss(function: Callable[..., tuple[Tensor, Tensor]]) -> Function:
    return lambda *args: (function(*args)[0],)


def _mean(function: Callable[..., Tensor]) -> Function:
    return lambda *args: (function(*args).mean(),)


def _relu_layer(x: Tensor, weight: Tensor, bias: Tensor) -> Results:
    return (F.linear(x, weight, bias, "relu"),)


def _reference_layer(x: Tensor, weight: Tensor, bias: Tensor) -> Results:
    return (torch.nn.functional.linear(x, weight, bias).relu(),)


def _reference_linear(h: Tensor, weight: Tensor, bias: Tensor, x: Tensor) -> Results:
    return (reference.bernoulli_nll(torch.nn.functional.linear(h, weight, bias), x).mean(),)


def _reference_linear_nll(h: Tensor, weight: Tensor, bias: Tensor, x: Tensor) -> Results:
    return (reference.bernoulli_nll(torch.nn.functional.linear(h, weight, bias), x),)


def _reference_normal_layer(h: Tensor, weight: Tensor, bias: Tensor, x: Tensor) -> Tensor:
    mu, logvar = torch.nn.functional.linear(h, weight, bias).chunk(2, dim=-1)
    return reference.gaussian_nll(mu, logvar, x)


def _seeded(function: Callable[..., Any]) -> Function:
    def seeded(mu: Tensor, logvar: Tensor, **options: Any) -> Results:
        results = function(mu, logvar, torch.zeros(1, dtype=torch.int64, device=mu.device), **options)
        return results if isinstance(results, tuple) else (results,)

    return seeded


def _binarize(function: Callable[..., Tensor]) -> Function:
    def binarize(data: Tensor, index: Tensor) -> Results:
        return (function(data, index, transform="binarize", seed=index.new_zeros(1)),)

    return binarize


OPS = {
    "reparameterize": Op(
        _posterior,
        _one(F.reparameterize),
        _seeded(reference.reparameterize),
        _reparameterize_bytes,
        _exact_z,
        _normal_noise,
    ),
    "kl_standard_normal": Op(_posterior, _one(F.kl_standard_normal), _one(reference.kl_standard_normal), _kl_bytes),
    "kl_normal": Op(_two_normals, _one(F.kl_normal), _one(reference.kl_normal), _kl_bytes),
    "reparameterize_kl": Op(
        _posterior,
        F.reparameterize_kl,
        _seeded(reference.reparameterize_kl),
        _reparameterize_kl_bytes,
        _exact_z_kl,
        _normal_noise,
    ),
    "reparameterize_log_ratio": Op(
        _posterior,
        F.reparameterize_log_ratio,
        _seeded(reference.reparameterize_log_ratio),
        _log_ratio_bytes,
        _exact_z_log_ratio,
        _normal_noise,
    ),
    "bernoulli_nll": Op(_logits, _one(F.bernoulli_nll), _one(reference.bernoulli_nll), _likelihood_bytes),
    "bernoulli_nll_loss": Op(_logits, _loss(F.bernoulli_nll_loss), _mean(reference.bernoulli_nll), _one_pass_bytes),
    "gaussian_nll": Op(_normal, _one(F.gaussian_nll), _one(reference.gaussian_nll), _likelihood_bytes),
    "gaussian_nll_loss": Op(_normal, _loss(F.gaussian_nll_loss), _mean(reference.gaussian_nll), _one_pass_bytes),
    "linear": Op(_hidden_layer, _relu_layer, _reference_layer, _products_bytes),
    "linear_bernoulli_nll_loss": Op(_layer, _loss(F.linear_bernoulli_nll_loss), _reference_linear, _linear_bytes),
    "linear_gaussian_nll_loss": Op(
        _samples_layer, _loss(F.linear_gaussian_nll_loss), _mean(_reference_normal_layer), _linear_bytes
    ),
    "linear_bernoulli_nll": Op(_samples_layer, _one(F.linear_bernoulli_nll), _reference_linear_nll, _products_bytes),
    "linear_gaussian_nll": Op(
        _samples_layer, _one(F.linear_gaussian_nll), _one(_reference_normal_layer), _products_bytes
    ),
    "gather_batch": Op(_data_set, _one(F.gather_batch), _one(reference.gather_batch), _gather_bytes),
    "gather_batch_binarize": Op(
        _data_set,
        _binarize(F.gather_batch),
        _binarize(reference.gather_batch),
        _gather_bytes,
        _exact_draws,
        _bernoulli_noise,
    ),
}

# latents of an MLP, of a large batch, of a large model; latent maps (4 x 32 x 32) of an image autoencoder
LATENTS = ("128x20", "4096x64", "65536x128", "32x4096")
# MNIST MLP at two batch sizes, importance samples, images of 64 x 64 x 3 and 256 x 256 x 3
PIXELS = ("128x784", "4096x784", "50x100x784", "64x12288", "8x196608")

LATENT_SHAPES = {
    "reparameterize": LATENTS,
    "kl_standard_normal": LATENTS,
    "kl_normal": LATENTS,
    "reparameterize_kl": LATENTS,
    "reparameterize_log_ratio": ("50x100x50", "5x4096x64"),
}
# inputs x outputs of hidden layers
LAYER_SHAPES = {"linear": ("128x784x400", "4096x784x400", "5000x200x200")}
PIXEL_SHAPES = {
    "bernoulli_nll": PIXELS,
    "bernoulli_nll_loss": PIXELS,
    "gaussian_nll": PIXELS,
    "gaussian_nll_loss": PIXELS,
    "linear_bernoulli_nll_loss": ("128x400x784", "4096x400x784"),
    "linear_gaussian_nll_loss": ("128x400x784", "4096x400x784"),
    "linear_bernoulli_nll": ("50x20x200x784", "50x100x200x784"),
    "linear_gaussian_nll": ("50x20x200x784",),
}
BATCH_SHAPES = {"gather_batch": ("128x784", "4096x784"), "gather_batch_binarize": ("128x784", "4096x784")}


def cases(device: str) -> Iterator[Case]:
    """All cases for a device, float32; on CUDA also in bfloat16, with 8-bit data where there is data."""
    dtypes = ("float32", "bfloat16") if device == "cuda" else ("float32",)
    for dtype in dtypes:
        for op, shapes in (LATENT_SHAPES | LAYER_SHAPES).items():
            yield from (Case(op, shape, dtype) for shape in shapes)
        for op, shapes in PIXEL_SHAPES.items():
            if dtype == "float32":
                yield from (Case(op, shape, dtype, "float32") for shape in shapes)
            # every case is compiled: two shapes show what 8-bit data saves
            yield from (Case(op, shape, dtype, "uint8") for shape in (shapes if dtype == "bfloat16" else shapes[:2]))
    for op, shapes in BATCH_SHAPES.items():
        yield from (Case(op, shape, "float32", "uint8") for shape in shapes)


def functions(case: Case) -> dict[str, Function]:
    """What every provider computes for this case, torch.compile aside."""
    op = OPS[case.op]
    found = {OURS: op.ours, "reference": op.reference}
    found |= {provider: table[case.op] for provider, table in formulas.PROVIDERS.items() if case.op in table}
    return {provider: partial(function, **case.options) for provider, function in found.items()}
