"""The matrix products of the Numba kernels."""

from __future__ import annotations

import os
import re
import subprocess
import sys

import fastvae_cpu_kernels as kernels
import numba
import pytest
import torch
from fastvae_cpu_kernels import _gemm, _jit, _products, _threads
from torch import Tensor

from tests.op_checks import assert_accurate

needs_avx512 = pytest.mark.skipif(not _gemm.available(), reason="written for AVX-512")


@needs_avx512
@pytest.mark.usefixtures("always_share")
@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize(
    ("B", "inputs", "outputs"),
    [
        (8, 5, 24),
        (9, 1030, 50),
        (33, 20, 1111),
        (48, 48, 48),
        (100, 130, 64),
        (128, 784, 400),
        # large batches, in blocks of examples
        (511, 30, 20),
        (769, 300, 45),
    ],
)
@pytest.mark.parametrize("activation", ["none", "relu", "tanh"])
def test_products_of_a_layer(threads: int, B: int, inputs: int, outputs: int, activation: str) -> None:
    """Also between values that must not be looked at, and from places that no vector is aligned to."""
    torch.set_num_threads(threads)
    generator = torch.Generator().manual_seed(0)

    def inside(*shape: int) -> Tensor:
        """A random matrix amid NaN."""
        values = torch.randn(shape, generator=generator)
        around = torch.full((values.numel() + 34,), float("nan"))
        return around[17:-17].view(shape).copy_(values)

    x, dy, weight, bias = inside(B, inputs), inside(B, outputs), inside(outputs, inputs), inside(outputs)
    how = _products.split(x, weight)
    assert how is not None
    assert how.features == (1 if 256 * threads <= B else min(threads, -(-outputs // 8)))
    assert how.examples == max(1, B // (256 * threads) * threads)
    apply = getattr(torch, activation, lambda y: y)
    y = kernels.linear_fwd(x, weight, bias, activation)
    exact = torch.nn.functional.linear(x.double(), weight.double(), bias.double())
    assert_accurate(y, apply(exact), apply(torch.nn.functional.linear(x, weight, bias)), factor=4.0)
    dweight = inside(outputs, inputs)
    around = dweight._base
    assert around is not None
    for needs_dx in (True, False):
        dweight.fill_(float("nan"))
        dx = kernels.linear_bwd(dy, x, weight, needs_dx, dweight)
        assert_accurate(dweight, dy.double().t() @ x.double(), dy.t() @ x, factor=4.0)
        assert around.isnan().sum() == 34
        assert (dx is not None) == needs_dx
        if dx is not None:
            assert_accurate(dx, dy.double() @ weight.double(), dy @ weight, factor=4.0)
    below, sums = apply(x), torch.empty(inputs)
    slope = {"none": torch.ones_like(x), "relu": (x > 0).float(), "tanh": 1.0 - below.square()}[activation]
    dx = kernels.hidden_bwd(dy, below, weight, activation, dweight, sums)
    assert_accurate(dx, (dy.double() @ weight.double()) * slope, (dy @ weight) * slope, factor=4.0)
    assert_accurate(sums, ((dy.double() @ weight.double()) * slope).sum(0), ((dy @ weight) * slope).sum(0), factor=4.0)


@needs_avx512
@pytest.mark.skipif(sys.platform != "linux", reason="mprotect of this system")
def test_nothing_is_read_beyond_a_matrix() -> None:
    """Of the last vector of columns no lane that is not there: what follows may be another's page."""
    program = (
        "import ctypes, mmap, torch, fastvae_cpu_kernels as k\n"
        "page, size = mmap.PAGESIZE, 4 * 8 * 20\n"
        "memory = mmap.mmap(-1, 2 * page)\n"
        "start = ctypes.addressof(ctypes.c_char.from_buffer(memory))\n"
        "assert ctypes.CDLL(None).mprotect(ctypes.c_void_p(start + page), ctypes.c_size_t(page), 0) == 0\n"
        "x = torch.frombuffer(memory, dtype=torch.float32, count=8 * 20, offset=page - size).view(8, 20)\n"
        "dweight = torch.empty(16, 20)\n"
        "k.linear_bwd(torch.ones(8, 16), x.fill_(1.0), torch.ones(16, 20), False, dweight)\n"
        "assert (dweight == 8.0).all()\n"
    )
    env = os.environ | {"PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    subprocess.run([sys.executable, "-c", program], env=env, check=True)


@needs_avx512
def test_the_cut_at_zero_keeps_nan() -> None:
    x, weight, bias = torch.ones(16, 4), torch.ones(8, 4), torch.arange(-7.0, 1.0)
    x[3, 1] = float("nan")
    expected = (x @ weight.t() + bias).relu()
    torch.testing.assert_close(kernels.linear_fwd(x, weight, bias, "relu"), expected, rtol=0, atol=0, equal_nan=True)


@needs_avx512
@pytest.mark.usefixtures("always_share")
def test_a_product_is_the_same_whoever_makes_it(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.set_num_threads(3)
    generator = torch.Generator().manual_seed(0)
    x, weight, bias = (torch.randn(shape, generator=generator) for shape in ((128, 400), (60, 400), (60,)))
    shared = kernels.linear_fwd(x, weight, bias, "relu")
    assert torch.equal(kernels.linear_fwd(x, weight, bias, "relu"), shared)
    monkeypatch.setattr(_threads._Patience, "share", lambda self: False)
    assert torch.equal(kernels.linear_fwd(x, weight, bias, "relu"), shared)


@needs_avx512
def test_who_makes_what() -> None:
    before = torch.get_num_threads(), torch.get_float32_matmul_precision()
    x, weight = torch.zeros(128, 784), torch.zeros(400, 784)
    try:
        torch.set_num_threads(2)
        assert _products.split(x, weight) == (2, 1, 2)
        assert _products.split(x[:, ::2], weight[:, ::2].contiguous()) is None
        assert _products.split(x[:, ::2].contiguous(), weight[:, ::2]) is None
        # not a tile of examples
        assert _products.split(x[:7], weight) is None
        # little work, few features
        assert _products.split(x[:16], weight[:32]) == (1, 1, 1)
        assert _products.split(torch.zeros(128, 8192), torch.zeros(8, 8192)) == (1, 1, 1)
        # a large batch, by examples; its gradient in smaller parts
        assert _products.split(torch.zeros(511, 784), weight) == (2, 1, 2)
        assert _products.split(torch.zeros(512, 784), weight) == (1, 2, 4)
        assert _products.split(torch.zeros(4096, 784), weight) == (1, 16, 4)
        # one that may be rounded is oneDNN's to make
        torch.set_float32_matmul_precision("medium")
        assert _products.split(x, weight) is None
        torch.set_float32_matmul_precision("highest")
        torch.set_num_threads(1)
        assert _products.split(x, weight) == (1, 1, 1)
        assert _products.split(torch.zeros(4096, 784), weight) == (1, 16, 1)
    finally:
        torch.set_num_threads(before[0])
        torch.set_float32_matmul_precision(before[1])


@needs_avx512
@pytest.mark.usefixtures("always_share")
@pytest.mark.parametrize("B", [100, 600])
def test_one_gradient_without_the_other(B: int) -> None:
    torch.set_num_threads(2)
    generator = torch.Generator().manual_seed(0)
    dy, x, weight = (torch.randn(shape, generator=generator) for shape in ((B, 40), (B, 70), (40, 70)))
    dweight = torch.empty_like(weight)
    dx = kernels.linear_bwd(dy, x, weight, True, dweight)
    assert dx is not None
    alone = kernels.linear_bwd(dy, x, weight, True, None)
    assert alone is not None
    assert torch.equal(alone, dx)
    again = torch.full_like(weight, float("nan"))
    assert kernels.linear_bwd(dy, x, weight, False, again) is None
    assert torch.equal(again, dweight)


def test_no_tile_is_one_vector_wide_if_it_need_not_be() -> None:
    widths: list[list[int]] = []
    for columns in (784, 400, 64, 49, 48, 40, 16, 5):
        widths.append([])
        while columns:
            widths[-1].append(_gemm.width_of.py_func(columns))
            columns -= widths[-1][-1]
    assert widths == [[48] * 15 + [32, 32], [48] * 7 + [32, 32], [32, 32], [32, 17], [48], [40], [16], [5]]


@needs_avx512
def test_a_long_sum_loses_no_digits() -> None:
    """A million equal terms in one float32 accumulator would be 1 percent off."""
    B, value = 2**20, torch.tensor(0.1)
    dweight = torch.empty(8, 8)
    kernels.linear_bwd(value.expand(B, 8).contiguous(), torch.ones(B, 8), torch.ones(8, 8), False, dweight)
    torch.testing.assert_close(dweight.double(), (B * value.double()).expand(8, 8), rtol=1e-4, atol=0)


@needs_avx512
def test_tanh_is_accurate_near_zero_and_saturates() -> None:
    x = torch.cat([torch.logspace(-38, 1.5, 8000), torch.tensor([0.0, 1e-45, 88.0, 1e30, float("inf")])])
    x = torch.cat([x, -x]).unsqueeze(1)
    y = kernels.linear_fwd(x, torch.ones(8, 1), torch.zeros(8), "tanh")
    exact = x.double().tanh().expand_as(y)
    assert ((y.double() - exact).abs() <= 2 * 2.0**-23 * exact.abs() + 2.0**-149).all()
    x[3] = float("nan")
    assert kernels.linear_fwd(x, torch.ones(8, 1), torch.zeros(8), "tanh")[3].isnan().all()


@needs_avx512
def test_a_tile_stays_in_registers() -> None:
    """A step of k is 24 multiply-adds of whole vectors, and nothing is put aside in it."""
    _, dispatcher, arguments = _jit._routines[_gemm._tile]
    compiled = numba.njit(**_jit._ROUTINE)(dispatcher.py_func)
    compiled.compile(arguments)
    (assembly,) = compiled.inspect_asm().values()
    steps = [block for block in re.split(r"\n(?=\S+:)", assembly) if len(re.findall("vfmadd.*zmm", block)) == 24]
    assert steps
    assert not any(re.search(r"vmov[au]ps\s+%zmm\d+, .*\(", block) for block in steps)
