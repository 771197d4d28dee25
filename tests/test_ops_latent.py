"""The latent ops of both kernel packages against float64: values and every gradient, in every dtype and layout."""

from __future__ import annotations

import mmap
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from fastvae import reference
from tests.op_checks import (
    BACKENDS,
    LAYOUTS,
    assert_accurate,
    device_of,
    exact_values_and_gradients,
    load_backend,
    randn,
    skip_unsupported,
    values_and_gradients,
)

EXAMPLE_OFFSET, SAMPLE_OFFSET = 2**33 + 5, 3
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# no leading dimension; one element per row; fewer elements than a quad; K x B rows; not collapsible; more than one tile
SHAPES = [(67,), (131, 1), (33, 3), (2, 5, 7), (2, 3, 5, 8), (3, 130), (2, 2100)]


def seed_on(device: str) -> Tensor:
    return torch.tensor([-1234567890123456789], device=device)


def listed(outputs: Tensor | tuple[Tensor, ...]) -> list[Tensor]:
    return [outputs] if isinstance(outputs, Tensor) else list(outputs)


@dataclass(frozen=True)
class Op:
    """One op as the tests see it: outputs and gradients from (package, seed, inputs), and what they must be."""

    name: str
    num_inputs: int
    reference: Callable[..., Any]
    forward: Callable[..., Any]
    backward: Callable[..., Any]

    def expected(self, seed: Tensor) -> Callable[..., Any]:
        return lambda *inputs: self.reference(seed, *inputs)


def _reparameterize(num_samples: int | None) -> Op:
    arguments = (num_samples, EXAMPLE_OFFSET, SAMPLE_OFFSET, reference.STREAM_PRIOR)
    keywords = dict(zip(("num_samples", "example_offset", "sample_offset", "stream"), arguments, strict=True))
    return Op(
        "reparameterize",
        2,
        lambda seed, mu, logvar: reference.reparameterize(mu, logvar, seed, **keywords),
        lambda kernels, seed, mu, logvar: kernels.reparameterize_fwd(mu, logvar, seed, *arguments),
        lambda kernels, seed, up, mu, logvar: _gradients(
            up[0], *kernels.reparameterize_bwd(up[0], logvar, seed, *arguments)
        ),
    )


def _gradients(dz: Tensor, dmu: Tensor | None, dlogvar: Tensor) -> tuple[Tensor, Tensor]:
    return dz if dmu is None else dmu, dlogvar


def _log_ratio(num_samples: int, sticking: bool) -> Op:
    offsets = (EXAMPLE_OFFSET, SAMPLE_OFFSET)
    keywords: dict[str, Any] = {"example_offset": offsets[0], "sample_offset": offsets[1], "num_samples": num_samples}
    return Op(
        "reparameterize_log_ratio",
        2,
        lambda seed, mu, logvar: reference.reparameterize_log_ratio(
            mu, logvar, seed, sticking_the_landing=sticking, **keywords
        ),
        lambda kernels, seed, mu, logvar: kernels.reparameterize_log_ratio_fwd(mu, logvar, seed, num_samples, *offsets),
        lambda kernels, seed, up, mu, logvar: kernels.reparameterize_log_ratio_bwd(
            *up, mu, logvar, seed, num_samples, sticking, *offsets
        ),
    )


OPS = {
    "reparameterize": _reparameterize(None),
    "reparameterize_3": _reparameterize(3),
    "log_ratio": _log_ratio(3, sticking=False),
    "log_ratio_stl": _log_ratio(3, sticking=True),
    "kl_standard_normal": Op(
        "kl_standard_normal",
        2,
        lambda seed, *inputs: reference.kl_standard_normal(*inputs),
        lambda kernels, seed, *inputs: kernels.kl_standard_normal_fwd(*inputs),
        lambda kernels, seed, up, *inputs: kernels.kl_standard_normal_bwd(up[0], *inputs),
    ),
    "kl_normal": Op(
        "kl_normal",
        4,
        lambda seed, *inputs: reference.kl_normal(*inputs),
        lambda kernels, seed, *inputs: kernels.kl_normal_fwd(*inputs),
        lambda kernels, seed, up, *inputs: kernels.kl_normal_bwd(up[0], *inputs),
    ),
    "reparameterize_kl": Op(
        "reparameterize_kl",
        2,
        lambda seed, mu, logvar: reference.reparameterize_kl(mu, logvar, seed, example_offset=EXAMPLE_OFFSET),
        lambda kernels, seed, *inputs: kernels.reparameterize_kl_fwd(*inputs, seed, EXAMPLE_OFFSET, 0, False)[:2],
        lambda kernels, seed, up, *inputs: kernels.reparameterize_kl_bwd(*up, *inputs, seed, EXAMPLE_OFFSET, 0),
    ),
}


def check(
    op: Op,
    kernels: ModuleType,
    seed: Tensor,
    inputs: list[Tensor],
    layout: Callable[[Tensor], Tensor],
    *more_inputs: list[Tensor],
) -> None:
    """Values and gradients of `op`, with upstream gradients in `layout`, against float64 and eager.

    Several sets of inputs are judged together: how far eager is off in the one sum of a single row is luck.
    """
    skip_unsupported(kernels, op.name, *inputs)
    results = []
    for given in (inputs, *more_inputs):
        outputs = listed(op.forward(kernels, seed, *given))
        upstream = [
            layout(randn(*y.shape, seed=9 + i, dtype=y.dtype, device=y.device.type)) for i, y in enumerate(outputs)
        ]
        actual = [*outputs, *op.backward(kernels, seed, upstream, *given)]
        exact, exact_gradients = exact_values_and_gradients(op.expected(seed), given, upstream)
        eager, eager_gradients = values_and_gradients(op.expected(seed), given, upstream)
        results.append(list(zip(actual, exact + exact_gradients, eager + eager_gradients, strict=True)))
    for i, triples in enumerate(zip(*results, strict=True)):
        what = f"output {i}" if i < len(outputs) else f"gradient of input {i - len(outputs)}"
        assert_accurate(*(torch.stack(each) for each in zip(*triples, strict=True)), what)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_dtypes_and_layouts(backend: str, op: str, dtype: torch.dtype, layout: str) -> None:
    kernels, device = load_backend(backend), device_of(backend)
    inputs = [LAYOUTS[layout](randn(33, 24, seed=i, dtype=dtype, device=device)) for i in range(OPS[op].num_inputs)]
    check(OPS[op], kernels, seed_on(device), inputs, LAYOUTS[layout])


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_shapes(backend: str, op: str, shape: tuple[int, ...]) -> None:
    """Odd sizes, with inputs of different strides: the first is broadcast along its last leading dimension."""
    kernels, device = load_backend(backend), device_of(backend)
    sets = []
    for first in range(0, 100, 100 if len(shape) > 1 else 10):
        inputs = [randn(*shape, seed=first + i, device=device) for i in range(OPS[op].num_inputs)]
        sets.append([LAYOUTS["expanded"](inputs[0]), LAYOUTS["sliced"](inputs[1]), *inputs[2:]])
    check(OPS[op], kernels, seed_on(device), sets[0], LAYOUTS["transposed"], *sets[1:])


@pytest.mark.parametrize("missing", [0, 1])
@pytest.mark.parametrize("op", ["reparameterize_kl", "log_ratio", "log_ratio_stl"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_missing_upstream_gradient_is_zero(backend: str, op: str, missing: int) -> None:
    kernels, device = load_backend(backend), device_of(backend)
    seed, inputs = seed_on(device), [randn(6, 20, seed=i, device=device) for i in range(2)]
    outputs = OPS[op].forward(kernels, seed, *inputs)
    upstream: list[Tensor | None] = [randn(*y.shape, seed=9, device=device) for y in outputs]
    upstream[missing] = None
    gradients = OPS[op].backward(kernels, seed, upstream, *inputs)
    _, exact = exact_values_and_gradients(OPS[op].expected(seed), inputs, upstream)
    _, eager = values_and_gradients(OPS[op].expected(seed), inputs, upstream)
    for triple in zip(gradients, exact, eager, strict=True):
        assert_accurate(*triple)


@pytest.mark.parametrize("shape", [(5, 20), (2, 3, 9), (70, 130), (1, 1)], ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_kl_per_dimension(backend: str, shape: tuple[int, ...]) -> None:
    """The by-product is the sum over all rows, and changes nothing else."""
    kernels, device = load_backend(backend), device_of(backend)
    mu, logvar = (randn(*shape, seed=i, device=device) for i in range(2))
    z, kl, per_dim = kernels.reparameterize_kl_fwd(mu, logvar, seed_on(device), 0, 0, True)
    plain_z, plain_kl, none = kernels.reparameterize_kl_fwd(mu, logvar, seed_on(device), 0, 0, False)
    terms = 0.5 * (mu.double().square() + torch.expm1(logvar.double()) - logvar.double())
    assert none is None
    assert torch.equal(z, plain_z)
    torch.testing.assert_close(kl, plain_kl, rtol=1e-6, atol=0)
    torch.testing.assert_close(per_dim, terms.flatten(0, -2).sum(0).float(), rtol=2e-6, atol=0)


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients_into_the_halves_of_one_buffer(backend: str) -> None:
    kernels, device = load_backend(backend), device_of(backend)
    seed, (mu, logvar, dz) = seed_on(device), (randn(7, 20, seed=i, device=device) for i in range(3))
    dkl = randn(7, seed=4, device=device)
    buffer = torch.full((7, 40), float("nan"), device=device)
    dmu, dlogvar = kernels.reparameterize_kl_bwd(dz, dkl, mu, logvar, seed, 0, 0, out=buffer.chunk(2, dim=-1))
    assert dmu.data_ptr() == buffer.data_ptr()
    assert torch.equal(buffer, torch.cat(kernels.reparameterize_kl_bwd(dz, dkl, mu, logvar, seed, 0, 0), dim=-1))
    assert torch.equal(torch.cat((dmu, dlogvar), dim=-1), buffer)


@pytest.mark.parametrize("shape", [(0, 5), (3, 0), (0,), (2, 0, 4)], ids=str)
@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_empty(backend: str, op: str, shape: tuple[int, ...]) -> None:
    kernels, device = load_backend(backend), device_of(backend)
    seed = seed_on(device)
    inputs = [torch.empty(shape, device=device) for _ in range(OPS[op].num_inputs)]
    expected, outputs = (listed(f(*inputs)) for f in (OPS[op].expected(seed), partial(OPS[op].forward, kernels, seed)))
    for y, right in zip(outputs, expected, strict=True):
        assert torch.equal(y, right)
    for gradient in OPS[op].backward(kernels, seed, expected, *inputs):
        assert gradient.shape == shape


@pytest.mark.parametrize("backend", BACKENDS)
def test_kl_keeps_its_digits_near_the_prior(backend: str) -> None:
    """exp(logvar) - 1 - logvar would have none left at a standard deviation of 1 +- 1e-4."""
    kernels, device = load_backend(backend), device_of(backend)
    logvar = randn(4, 50, seed=0, device=device, scale=2e-4)
    mu = torch.zeros_like(logvar)
    kl = kernels.kl_standard_normal_fwd(mu, logvar)
    torch.testing.assert_close(kl.double(), 0.25 * logvar.double().square().sum(-1), rtol=1e-4, atol=0)


@pytest.mark.parametrize("backend", BACKENDS)
def test_log_variances_beyond_float32(backend: str) -> None:
    """exp(88.7) is the largest of float32: what is larger is infinite, and nothing comes back from there."""
    kernels, device = load_backend(backend), device_of(backend)
    logvar = torch.tensor([88.0, 90.0, 176.0, 180.0, 200.0, 1000.0, 3e38], device=device)[:, None]
    mu, seed = torch.zeros_like(logvar), seed_on(device)
    with np.errstate(all="ignore"):
        z, kl, _ = kernels.reparameterize_kl_fwd(mu, logvar, seed, 0, 0, False)
        eps = kernels.reparameterize_fwd(mu, mu, seed, None, 0, 0, 0)
    variance = logvar.double().exp()
    torch.testing.assert_close(z, variance.sqrt().float() * eps, rtol=2e-6, atol=0)
    torch.testing.assert_close(kl, (0.5 * (variance - 1.0 - logvar)).float().squeeze(1), rtol=2e-6, atol=0)


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_nan_and_infinity_stay_in_their_row(backend: str, op: str) -> None:
    kernels, device = load_backend(backend), device_of(backend)
    seed = seed_on(device)
    clean = [randn(6, 20, seed=i, device=device) for i in range(OPS[op].num_inputs)]
    dirty = [t.clone() for t in clean]
    dirty[0][1, 3], dirty[1][2, 5], dirty[1][5, 0] = float("nan"), float("nan"), 60.0
    # at -inf the reference's log-ratio is 0 * inf, the kernels' is -inf
    dirty[1][4, 7] = -30.0 if "log_ratio" in op else -torch.inf
    # numpy, under triton's interpreter, warns of what a GPU computes silently
    with np.errstate(all="ignore"):
        outputs, clean_outputs = (listed(OPS[op].forward(kernels, seed, *inputs)) for inputs in (dirty, clean))
    exact = listed(OPS[op].expected(seed)(*(t.double() for t in dirty)))
    for y, right, before in zip(outputs, exact, clean_outputs, strict=True):
        torch.testing.assert_close(y, right.float(), rtol=1e-5, atol=1e-5, equal_nan=True)
        rows, untouched = y.shape.index(6), torch.tensor([0, 3], device=device)
        assert torch.equal(y.index_select(rows, untouched), before.index_select(rows, untouched))


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_offsets_beyond_32_bits(backend: str, op: str) -> None:
    """Rows 2^31 elements apart; an offset that wrapped would read the zeros before or between them."""
    kernels, device = load_backend(backend), device_of(backend)
    if device != "cpu":
        pytest.skip("reserves addresses without memory, which only the host can")
    # address space, not memory: only touched pages exist
    reserved = mmap.mmap(-1, 4 * (3 * 2**31 + 64), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x4000)
    storage = torch.frombuffer(reserved, dtype=torch.float32)
    inputs = [storage[2**31 + 20 * i :].as_strided((2, 20), (2**31, 1)) for i in range(OPS[op].num_inputs)]
    for i, t in enumerate(inputs):
        t.copy_(randn(2, 20, seed=i))
    check(OPS[op], kernels, seed_on(device), inputs, LAYOUTS["contiguous"])
