"""The output layer and its likelihood in one: kept, chunked, recomputed, and as the epilogue of a Triton product."""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fastvae import _linear_nll, reference
from fastvae import functional as F
from tests.op_checks import BACKENDS, DEVICE, INTERPRETED, LAYOUTS, assert_accurate, device_of, load_backend, randn

K, B, H, D = 3, 4, 9, 33
Op = Callable[..., Tensor]


def exact_bernoulli(h: Tensor, weight: Tensor, bias: Tensor, x: Tensor) -> Tensor:
    return reference.bernoulli_nll(nn.functional.linear(h, weight, bias), x)


def exact_gaussian(h: Tensor, weight: Tensor, bias: Tensor, x: Tensor, logvar_floor: float | None = None) -> Tensor:
    mu, raw = nn.functional.linear(h, weight, bias).chunk(2, dim=-1)
    floored = raw if logvar_floor is None else logvar_floor + nn.functional.softplus(raw - logvar_floor)
    return reference.gaussian_nll(mu, floored, x)


OPS: dict[str, tuple[Op, Op, dict[str, Any]]] = {
    "bernoulli": (F.linear_bernoulli_nll, exact_bernoulli, {}),
    "gaussian": (F.linear_gaussian_nll, exact_gaussian, {}),
    "floor": (F.linear_gaussian_nll, exact_gaussian, {"logvar_floor": -1.0}),
}


def inputs(op: str, device: str, dtype: torch.dtype = torch.float32) -> tuple[list[Tensor], Tensor, Tensor]:
    """h, weight, bias; data that all samples share; an upstream gradient of every row."""
    outputs = D if op == "bernoulli" else 2 * D
    shapes = ((K, B, H), (outputs, H), (outputs,), (B, D), (K, B))
    *leaves, x, upstream = (randn(*s, seed=i, device=device, scale=0.5).to(dtype) for i, s in enumerate(shapes))
    return [t.requires_grad_() for t in leaves], torch.sigmoid(x), upstream


@pytest.fixture(params=BACKENDS)
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    load_backend(request.param)
    monkeypatch.setenv("FASTVAE_BACKEND", request.param)
    return device_of(request.param)


# rows of one chunk: all, two samples and a rest, part of one sample's examples
@pytest.mark.parametrize(("rows", "kept"), [(100, True), (2 * B + 1, False), (3, False)])
@pytest.mark.parametrize("op", OPS)
def test_value_and_gradients_for_any_row_weights(
    op: str, rows: int, kept: bool, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    call, exact, options = OPS[op]
    leaves, x, upstream = inputs(op, device)
    monkeypatch.setattr(_linear_nll, "CHUNK_BYTES", 4 * rows * len(leaves[2]))
    monkeypatch.setattr(_linear_nll, "KEEP_BYTES", 2**20 if kept else 0)
    wide = [t.detach().double().requires_grad_() for t in leaves]
    nlls = [call(*leaves, x, **options), exact(*wide, x.double(), **options), exact(*leaves, x, **options)]
    assert_accurate(*(t.detach() for t in nlls), "nll")
    with torch.no_grad():
        torch.testing.assert_close(call(*leaves, x, **options), nlls[0], rtol=1e-6, atol=1e-6)
    right, eager = (
        torch.autograd.grad(nll, given, upstream.to(nll.dtype)) for nll, given in zip(nlls[1:], (wide, leaves))
    )
    # twice: the first backward must leave what it read as it was
    for _ in range(2):
        got = torch.autograd.grad(nlls[0], leaves, upstream, retain_graph=True)
        for name, *grads in zip(("dh", "dweight", "dbias"), got, right, eager):
            assert_accurate(*grads, name, factor=4.0)
    for i, leaf in enumerate(leaves):
        alone = [t if t is leaf else t.detach() for t in leaves]
        (got_alone,) = torch.autograd.grad(call(*alone, x, **options), leaf, upstream)
        torch.testing.assert_close(got_alone, got[i])


@pytest.mark.parametrize("op", OPS)
def test_double_backward(op: str, device: str) -> None:
    call, exact, options = OPS[op]
    leaves, x, upstream = inputs(op, device)
    seconds = []
    for f in (call, exact):
        first = torch.autograd.grad(f(*leaves, x, **options), leaves, upstream, create_graph=True)
        seconds.append(torch.autograd.grad(sum(g.square().sum() for g in first), leaves))
    torch.testing.assert_close(*seconds, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("op", OPS)
def test_float64_transforms_and_gradients_of_the_data_take_the_reference(op: str, device: str) -> None:
    call, exact, options = OPS[op]
    leaves, x, _ = inputs(op, device, torch.float64)
    torch.testing.assert_close(call(*leaves, x, **options), exact(*leaves, x, **options), rtol=1e-12, atol=1e-12)
    leaves, x, _ = inputs(op, device)
    h, weight, bias = (t.detach() for t in leaves)
    derivatives = [torch.func.grad(lambda h, f=f: f(h, weight, bias, x, **options).sum())(h) for f in (call, exact)]
    torch.testing.assert_close(*derivatives)
    x.requires_grad_()
    derivatives = [torch.autograd.grad(f(h, weight, bias, x, **options).sum(), x)[0] for f in (call, exact)]
    torch.testing.assert_close(*derivatives)


@pytest.mark.parametrize("leading", [(7,), (2, 3, 7), (0,), (3, 0)], ids=str)
@pytest.mark.parametrize("op", OPS)
def test_leading_dimensions(op: str, leading: tuple[int, ...], device: str) -> None:
    call, exact, options = OPS[op]
    (_, weight, bias), _, _ = inputs(op, device)
    h, x = randn(*leading, H, seed=7, device=device), torch.rand(*leading[-1:], D, device=device)
    nll = call(h, weight, bias, x, **options)
    assert nll.shape == leading
    torch.testing.assert_close(nll, exact(h, weight, bias, x, **options))
    nll.sum().backward()


def test_the_edge_says_what_it_got() -> None:
    h, weight, bias = torch.zeros(4, 3), torch.zeros(5, 3), torch.zeros(5)
    with pytest.raises(ValueError, match=r"weight \[D, H\]"):
        F.linear_bernoulli_nll(h, weight.t(), bias, torch.zeros(4, 5))
    with pytest.raises(ValueError, match="must broadcast"):
        F.linear_bernoulli_nll(h, weight, bias, torch.zeros(4, 6))
    with pytest.raises(ValueError, match=r"weight \[2 D, H\]"):
        F.linear_gaussian_nll(h, weight, bias, torch.zeros(4, 5))
    with pytest.raises(ValueError, match=r"must broadcast .* \[4, 2\]"):
        F.linear_gaussian_nll(h, weight[:4], bias[:4], torch.zeros(4, 4))


# the Triton kernel whose epilogue is the likelihood


def check_epilogue(h: Tensor, weight: Tensor, bias: Tensor, x: Tensor) -> None:
    kernels = load_backend("triton")
    exact = exact_bernoulli(h.double(), weight.double(), bias.double(), x)
    # logits that are never rounded to 16 bits: as accurate as float32 throughout
    eager = exact_bernoulli(h.float(), weight.float(), bias.float(), x)
    assert_accurate(kernels.linear_bernoulli_nll_fwd(h, weight, bias, x), exact, eager, "nll")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "shape",
    # K, B, H, D: less than a block in every direction; columns split among programs; samples and odd sizes
    [(1, 5, 7, 9), (2, 33, 40, 300), (3, 30, 33, 129)],
    ids=str,
)
def test_epilogue(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    if INTERPRETED and dtype == torch.bfloat16:
        pytest.skip("triton's interpreter multiplies the bits of bfloat16 as integers")
    k, b, width, elements = shape
    h, weight, bias = (
        randn(*s, seed=i, dtype=dtype) for i, s in enumerate([(k, b, width), (elements, width), (elements,)])
    )
    data = torch.randint(0, 256, (b, elements), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    for x in (data, data > 127, data.float() / 255.0):
        check_epilogue(h, weight, bias, x.to(DEVICE).expand(k, b, elements))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_epilogue_layouts(layout: str) -> None:
    lay_out = LAYOUTS[layout]
    h, weight, bias = lay_out(randn(2, 5, 8, seed=0)), lay_out(randn(24, 8, seed=1)), lay_out(randn(24, seed=2))
    check_epilogue(h, weight, bias, lay_out(torch.sigmoid(randn(2, 5, 24, seed=3))))


def test_float32_is_multiplied_in_full_unless_torch_says_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    kernels = load_backend("triton")
    module = sys.modules[kernels.linear_bernoulli_nll_fwd.__module__]
    seen: list[str] = []

    class Launcher:
        def __getitem__(self, grid: Any) -> Any:
            return lambda *args, PRECISION, **kwargs: seen.append(PRECISION)

    monkeypatch.setattr(module, "_linear_bernoulli_nll_kernel", Launcher())
    before = torch.get_float32_matmul_precision()
    try:
        for precision in ("highest", "high", "medium"):
            torch.set_float32_matmul_precision(precision)
            kernels.linear_bernoulli_nll_fwd(*(torch.zeros(s, device=DEVICE) for s in ((3, 4), (5, 4), (5,), (3, 5))))
    finally:
        torch.set_float32_matmul_precision(before)
    assert seen == ["ieee", "tf32", "tf32"]


def test_the_choice_of_the_epilogue(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU, on tensor cores, for more than a chunk."""

    def chosen(device: str, num_samples: int, dtype: torch.dtype) -> bool:
        h = SimpleNamespace(
            shape=(num_samples, 100, 500), dtype=dtype, device=torch.device(device), element_size=lambda: dtype.itemsize
        )
        return _linear_nll.Bernoulli(None).in_one_kernel(h, SimpleNamespace(shape=(784, 500)))  # type: ignore[arg-type]

    assert chosen("cuda", 5000, torch.bfloat16)
    assert not chosen("cuda", 1, torch.bfloat16)
    assert not chosen("cpu", 5000, torch.bfloat16)
    assert not chosen("cuda", 5000, torch.float32)
    monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda: "high")
    assert chosen("cuda", 5000, torch.float32)
