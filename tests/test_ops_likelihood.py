"""The likelihoods and the gather of both kernel packages against float64: values and every gradient.

Eager PyTorch, the measure of accuracy, is what a user would write: torch's own cross-entropy with logits, and the
Gaussian density spelled out, both widened to float32.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from types import ModuleType

import pytest
import torch
from torch import Tensor

from fastvae import reference
from tests.op_checks import (
    BACKENDS,
    INTERPRETED,
    LAYOUTS,
    assert_accurate,
    device_of,
    exact_values_and_gradients,
    load_backend,
    randn,
    skip_unsupported,
    unit_in_last_place,
    values_and_gradients,
)

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
DATA_DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.bool, torch.uint8]
# no leading dimension; one element per row; fewer than a 128-bit access; K x B rows; not collapsible; tails; no tails
SHAPES = [(67,), (131, 1), (33, 3), (2, 5, 7), (2, 3, 5, 8), (3, 130), (5, 784), (2, 1100), (70, 64)]
# one row in many pieces, with a tail
LONG = (1, 16_391)
EXAMPLE_OFFSET = 2**33 + 5


def data_like(shape: tuple[int, ...], dtype: torch.dtype, device: str, *, seed: int = 7) -> Tensor:
    """Data in [0, 1], or all the values of its integer type."""
    u = torch.rand(shape, generator=torch.Generator().manual_seed(seed))
    return (u * 255.99 if dtype == torch.uint8 else u > 0.5 if dtype == torch.bool else u).to(device, dtype)


def seed_on(device: str) -> Tensor:
    return torch.tensor([-1234567890123456789], device=device)


def eager_bernoulli(logits: Tensor, x: Tensor) -> Tensor:
    loss = torch.nn.functional.binary_cross_entropy_with_logits
    return loss(logits.float(), reference._unit_interval(x, torch.float32), reduction="none").sum(-1)


def eager_gaussian(mu: Tensor, logvar: Tensor, x: Tensor) -> Tensor:
    mu, logvar, x = mu.float(), logvar.float(), reference._unit_interval(x, torch.float32)
    return 0.5 * (math.log(2.0 * math.pi) + logvar + (x - mu) ** 2 * torch.exp(-logvar)).sum(-1)


def assert_all_accurate(actual: list[Tensor], exact: list[Tensor], eager: list[Tensor], what: str) -> None:
    for i, triple in enumerate(zip(actual, exact, eager, strict=True)):
        assert_accurate(*triple, f"{what} {i}")


def assert_sums_accurate(actual: Tensor, exact: Tensor, eager: Tensor) -> None:
    """`actual` `[D]`, the sums over the rows of gradients; the unit is that of a sum without cancellation."""
    rows, eager_rows = exact.reshape(-1, exact.shape[-1]), eager.reshape(-1, exact.shape[-1])
    error = (actual.double() - rows.sum(0)).abs().max().item()
    eager_error = (eager_rows.float().sum(0).double() - rows.sum(0)).abs().max().item()
    # numpy, in the interpreter, adds down a column one by one, where a GPU and torch add pairs
    units = 2 if INTERPRETED else 1
    allowed = 2 * eager_error + units * unit_in_last_place(torch.float32, rows.abs().sum(0).max().item())
    assert error <= allowed, f"column sums: error {error:.3g}, allowed {allowed:.3g}"


def check_bernoulli(
    kernels: ModuleType,
    logits: Tensor,
    x: Tensor,
    weight: Tensor,
    binarize_seed: Tensor | None = None,
    *,
    sums: Sequence[bool] = (False, True),
) -> None:
    """The two passes, the one pass, and the one pass with column sums, of which `weight` is the upstream gradient."""
    skip_unsupported(kernels, "bernoulli_nll", logits, x)
    where = (binarize_seed, EXAMPLE_OFFSET)
    data = x if binarize_seed is None else reference.binarize(x, binarize_seed, example_offset=EXAMPLE_OFFSET)
    exact, exact_grads = exact_values_and_gradients(
        lambda logits: reference.bernoulli_nll(logits, data), [logits], [weight]
    )
    eager, eager_grads = values_and_gradients(lambda logits: eager_bernoulli(logits, data), [logits], [weight])

    assert_all_accurate([kernels.bernoulli_nll_fwd(logits, x, *where)], exact, eager, "nll")
    dlogits = kernels.bernoulli_nll_bwd(weight, logits, x, *where)
    assert_all_accurate([dlogits], exact_grads, eager_grads, "dlogits")
    for summed in sums:
        nll, dlogits, column_sum = kernels.bernoulli_nll_with_grad(logits, x, weight, *where, summed)
        assert_all_accurate([nll, dlogits], exact + exact_grads, eager + eager_grads, f"one pass, {summed=}")
        assert dlogits.is_contiguous()
        assert (column_sum is not None) == summed
        if summed:
            assert_sums_accurate(column_sum, exact_grads[0], eager_grads[0])


def check_gaussian(
    kernels: ModuleType,
    mu: Tensor,
    logvar: Tensor,
    x: Tensor,
    weight: Tensor,
    *,
    sums: Sequence[bool] = (False, True),
    floor: float | None = None,
) -> None:
    skip_unsupported(kernels, "gaussian_nll", mu, logvar, x)
    inputs = [mu, logvar]
    exact, exact_grads = exact_values_and_gradients(
        lambda m, v: reference.gaussian_nll(m, v, x, logvar_floor=floor), inputs, [weight]
    )
    eager, eager_grads = values_and_gradients(
        lambda m, v: eager_gaussian(m, v if floor is None else reference.with_floor(v.float(), floor), x),
        inputs,
        [weight],
    )

    assert_all_accurate([kernels.gaussian_nll_fwd(mu, logvar, x, floor)], exact, eager, "nll")
    gradients = kernels.gaussian_nll_bwd(weight, mu, logvar, x, floor)
    assert_all_accurate(list(gradients), exact_grads, eager_grads, "gradient")
    for summed in sums if logvar.shape == mu.shape else (False,):
        nll, dmu, dlogvar, column_sum = kernels.gaussian_nll_with_grad(mu, logvar, x, weight, summed, floor)
        outputs = [nll, dmu, dlogvar]
        assert_all_accurate(outputs, exact + exact_grads, eager + eager_grads, f"one pass, {summed=}")
        assert (column_sum is not None) == summed
        if summed:
            for triple in zip(column_sum, exact_grads, eager_grads, strict=True):
                assert_sums_accurate(*triple)


@pytest.mark.parametrize("data", DATA_DTYPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_dtypes(backend: str, dtype: torch.dtype, data: torch.dtype) -> None:
    kernels, device = load_backend(backend), device_of(backend)
    mu, logvar = (randn(7, 52, seed=i, dtype=dtype, device=device) for i in range(2))
    x, weight = data_like((7, 52), data, device), randn(7, seed=3, device=device)
    check_bernoulli(kernels, 3.0 * mu, x, weight)
    check_gaussian(kernels, mu, logvar, x, weight)


@pytest.mark.parametrize("data", DATA_DTYPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_binarised_in_the_kernel(backend: str, dtype: torch.dtype, data: torch.dtype) -> None:
    """K samples share the draw of an example, however far its index is from 0."""
    kernels, device = load_backend(backend), device_of(backend)
    logits = randn(2, 3, 50, seed=0, dtype=dtype, device=device, scale=3.0)
    x = data_like((3, 50), data, device).expand(2, 3, 50)
    check_bernoulli(kernels, logits, x, randn(2, 3, seed=3, device=device), seed_on(device))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_layouts(backend: str, layout: str, dtype: torch.dtype) -> None:
    """Predictions, data and upstream gradients in one layout; then each in a layout of its own."""
    kernels, device = load_backend(backend), device_of(backend)
    lay_out: Callable[[Tensor], Tensor] = LAYOUTS[layout]
    mu, logvar = (lay_out(randn(3, 9, 24, seed=i, dtype=dtype, device=device)) for i in range(2))
    x = lay_out(data_like((3, 9, 24), torch.uint8, device))
    weight = lay_out(randn(3, 9, seed=3, device=device))
    check_bernoulli(kernels, mu, x, weight)
    check_gaussian(kernels, mu, logvar, x, weight)
    check_gaussian(kernels, logvar.contiguous(), mu, x.contiguous(), weight.contiguous())


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_shapes(backend: str, shape: tuple[int, ...]) -> None:
    """Odd sizes, with data that has no sample dimension and a weight of stride 0."""
    kernels, device = load_backend(backend), device_of(backend)
    mu, logvar = (randn(*shape, seed=i, device=device) for i in range(2))
    x = data_like(shape[1:] if len(shape) > 2 else shape, torch.uint8, device).expand(shape)
    weight = torch.tensor(-0.37, device=device).expand(shape[:-1])
    check_bernoulli(kernels, mu, x, weight)
    check_bernoulli(kernels, mu, x, weight, seed_on(device))
    check_gaussian(kernels, mu, logvar, x, weight)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_long_row_is_split(backend: str) -> None:
    kernels, device = load_backend(backend), device_of(backend)
    mu, logvar = (randn(*LONG, seed=i, device=device) for i in range(2))
    x, weight = data_like(LONG, torch.uint8, device), randn(*LONG[:-1], seed=3, device=device)
    check_bernoulli(kernels, mu, x, weight, sums=(False,))
    check_gaussian(kernels, mu, logvar, x, weight, sums=(False,))


@pytest.mark.parametrize("shared", ["per feature", "scalar"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(5, 24), (2, 3, 24), (70, 300)], ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_shared_logvar(backend: str, shape: tuple[int, ...], dtype: torch.dtype, shared: str) -> None:
    """Its gradient is the sum over the rows; those of the last shape are summed by several programs."""
    kernels, device = load_backend(backend), device_of(backend)
    sizes = shape[-1:] if shared == "per feature" else ()
    mu, logvar = randn(*shape, seed=0, dtype=dtype, device=device), randn(*sizes, seed=1, dtype=dtype, device=device)
    x, weight = data_like(shape, torch.float32, device), randn(*shape[:-1], seed=3, device=device)
    check_gaussian(kernels, mu, logvar, x, weight)
    if sizes:
        check_gaussian(kernels, mu, LAYOUTS["odd_offset"](logvar), x, weight)


@pytest.mark.parametrize("backend", BACKENDS)
def test_sure_and_wrong_logits(backend: str) -> None:
    """softplus has digits left where the data agrees with a large logit, and no overflow where it does not."""
    kernels, device = load_backend(backend), device_of(backend)
    magnitude = torch.linspace(0.0, 80.0, 40, device=device)
    logits = torch.stack((magnitude, -magnitude, magnitude, -magnitude))
    x = torch.tensor([1.0, 0.0, 0.0, 1.0], device=device)[:, None].expand(4, 40)
    exact = reference.bernoulli_nll(logits.double(), x.double())
    torch.testing.assert_close(kernels.bernoulli_nll_fwd(logits, x, None, 0).double(), exact, rtol=5e-7, atol=0)
    # the same without the logits near 0, which hide the small terms
    exact = reference.bernoulli_nll(logits[:, 4:].double(), x[:, 4:].double())
    sure = kernels.bernoulli_nll_fwd(logits[:, 4:], x[:, 4:], None, 0)
    torch.testing.assert_close(sure.double(), exact, rtol=1e-6, atol=0)
    # 2^5000: the factors of a row are not all multiplied
    unsure = torch.zeros(1, 5000, device=device)
    assert kernels.bernoulli_nll_fwd(unsure, unsure, None, 0).item() == pytest.approx(5000 * math.log(2.0), rel=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_log_variances_far_from_0(backend: str) -> None:
    if backend == "triton" and INTERPRETED:
        pytest.skip("exp keeps its last digits by an fma, which the interpreter rounds twice")
    kernels, device = load_backend(backend), device_of(backend)
    mu, x, weight = (randn(*shape, seed=i, device=device) for i, shape in enumerate([(5, 64), (5, 64), (5,)]))
    check_gaussian(kernels, mu, randn(5, 64, seed=3, device=device, scale=10.0), x, weight)


@pytest.mark.parametrize("shared", ["no", "per feature", "scalar"])
@pytest.mark.parametrize("shape", [(67,), (9, 300), (3, 7, 20), (2, 20000)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_log_variances_with_a_floor(backend: str, dtype: torch.dtype, shape: tuple[int, ...], shared: str) -> None:
    kernels, device = load_backend(backend), device_of(backend)
    mu, x = (randn(*shape, seed=i, dtype=dtype, device=device) for i in range(2))
    wide = {"no": shape, "per feature": shape[-1:], "scalar": ()}[shared]
    logvar = randn(*wide, seed=3, dtype=dtype, device=device, scale=4.0)
    check_gaussian(kernels, mu, logvar, x, randn(*shape[:-1], seed=4, device=device), floor=-1.0)


@pytest.mark.parametrize("sums", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_in_place(backend: str, dtype: torch.dtype, sums: bool) -> None:
    """dlogits over the logits; dmu and dlogvar over the two halves of the buffer that held mu and logvar."""
    kernels, device = load_backend(backend), device_of(backend)
    logits = randn(9, 300, seed=0, dtype=dtype, device=device)
    x, weight = data_like((9, 300), torch.uint8, device), randn(9, seed=3, device=device)
    skip_unsupported(kernels, "bernoulli_nll", logits, x)
    right = kernels.bernoulli_nll_with_grad(logits, x, weight, None, 0, sums)
    data = logits.clone()
    nll, dlogits, column_sum = kernels.bernoulli_nll_with_grad(data, x, weight, None, 0, sums, out=data)
    assert dlogits.data_ptr() == data.data_ptr()
    assert torch.equal(nll, right[0])
    assert torch.equal(data, right[1])
    assert not sums or torch.equal(column_sum, right[2])

    buffer = randn(9, 600, seed=0, dtype=dtype, device=device)
    mu, logvar = buffer.clone().chunk(2, dim=-1)
    right = kernels.gaussian_nll_with_grad(mu, logvar, x, weight, sums)
    halves = buffer.chunk(2, dim=-1)
    nll, dmu, dlogvar, _ = kernels.gaussian_nll_with_grad(*halves, x, weight, sums, out=halves)
    assert (dmu.data_ptr(), dlogvar.data_ptr()) == tuple(half.data_ptr() for half in halves)
    assert torch.equal(nll, right[0])
    assert torch.equal(buffer, torch.cat(right[1:3], dim=-1))


@pytest.mark.parametrize("shape", [(300,), (9, 300), (3, 7, 20)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_without_weights_it_is_the_mean(backend: str, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    """The bits that a weight of 1 / rows for each row gives."""
    kernels, device = load_backend(backend), device_of(backend)
    mu, logvar = (randn(*shape, seed=i, dtype=dtype, device=device) for i in range(2))
    x, rows = data_like(shape, torch.uint8, device), torch.Size(shape[:-1])
    weight = torch.full(rows, 1.0 / rows.numel(), device=device)
    skip_unsupported(kernels, "gaussian_nll", mu, logvar, x)
    for sums in (False, True):
        expected = kernels.bernoulli_nll_with_grad(mu, x, weight, None, 0, sums)
        got = kernels.bernoulli_nll_with_grad(mu, x, None, None, 0, sums)
        assert all(torch.equal(*pair) for pair in zip(got[: 2 + sums], expected[: 2 + sums], strict=True))
        expected = kernels.gaussian_nll_with_grad(mu, logvar, x, weight, sums)
        got = kernels.gaussian_nll_with_grad(mu, logvar, x, None, sums)
        assert all(torch.equal(*pair) for pair in zip(got[:3], expected[:3], strict=True))
        assert not sums or all(torch.equal(*pair) for pair in zip(got[3], expected[3], strict=True))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("num_elements", [1, 3, 20, 64, 300])
@pytest.mark.parametrize("data", [torch.uint8, torch.float32], ids=str)
@pytest.mark.parametrize("transform", ["scale", "binarize", "dequantize"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_gather_batch(backend: str, transform: str, data: torch.dtype, num_elements: int, dtype: torch.dtype) -> None:
    """The bits of the reference; an index may come from a slice, and repeat rows."""
    if transform == "dequantize" and data != torch.uint8:
        pytest.skip("only 8-bit data has gaps to fill")
    kernels, device = load_backend(backend), device_of(backend)
    rows = data_like((50, num_elements), data, device)
    index = torch.randint(50, (34,), generator=torch.Generator().manual_seed(5)).to(device)[::2]
    skip_unsupported(kernels, "gather_batch", rows, index)
    seed = None if transform == "scale" else seed_on(device)
    batch = kernels.gather_batch(rows, index, transform, seed, EXAMPLE_OFFSET, dtype)
    where = {"seed": seed, "example_offset": EXAMPLE_OFFSET, "dtype": dtype}
    expected = reference.gather_batch(rows, index, transform=transform, **where)
    assert batch.dtype == dtype
    # the interpreter truncates float32 to bfloat16
    torch.testing.assert_close(batch, expected, rtol=2**-7 if dtype == torch.bfloat16 else 0, atol=0)


@pytest.mark.parametrize("shape", [(0, 5), (3, 0), (0,), (2, 0, 4)], ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_empty(backend: str, shape: tuple[int, ...]) -> None:
    kernels, device = load_backend(backend), device_of(backend)
    mu, rows, D = torch.empty(shape, device=device), torch.zeros(shape[:-1], device=device), shape[-1]
    zeros = torch.zeros(D, device=device)
    assert torch.equal(kernels.bernoulli_nll_fwd(mu, mu, None, 0), rows)
    assert kernels.bernoulli_nll_bwd(rows, mu, mu, None, 0).shape == shape
    nll, dlogits, sums = kernels.bernoulli_nll_with_grad(mu, mu, rows, None, 0, True)
    assert (dlogits.shape, sums.shape) == (shape, (D,))
    assert torch.equal(nll, rows)
    assert torch.equal(sums, zeros)
    for logvar in (mu, zeros, zeros.new_zeros(())):
        assert torch.equal(kernels.gaussian_nll_fwd(mu, logvar, mu), rows)
        dmu, dlogvar = kernels.gaussian_nll_bwd(rows, mu, logvar, mu)
        assert dmu.shape == shape
        assert torch.equal(dlogvar, torch.zeros_like(logvar))
    assert kernels.gather_batch(
        mu.new_zeros(4, 6), torch.empty(0, dtype=torch.int64, device=device), "scale", None, 0, torch.float32
    ).shape == (0, 6)
