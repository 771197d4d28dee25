"""The Numba kernels as machinery: threads, layouts, the cache on disk, vectorised code. Their values: test_ops_*."""

from __future__ import annotations

import ctypes
import importlib
import inspect
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fastvae_cpu_kernels as kernels
import llvmlite.binding
import numba
import pytest
import torch
from fastvae_cpu_kernels import _gemm, _jit, _layout, _pieces, _pointers, _products, _threads, adam
from fastvae_cpu_kernels._region import Job, region_of
from torch import Tensor

from fastvae import reference
from tests.op_checks import assert_accurate

PACKAGE = Path(_jit.__file__).parent
SEED = torch.tensor([-(2**62) + 12345])


def every_op(*leading: int, D: int, samples: int = 3) -> dict[str, Callable[[], object]]:
    """Every entry point of the package on random tensors `[*leading, D]`."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    a, b, c, d, e = (normal(*leading, D) for _ in range(5))
    row, weight = normal(*leading), normal(*leading)
    x = torch.randint(0, 256, (*leading, D), dtype=torch.uint8, generator=generator)
    dz, dr = normal(samples, *leading, D), normal(samples, *leading)
    shared = normal(D)
    data = torch.randint(0, 256, (64, D), dtype=torch.uint8, generator=generator)
    index = torch.randint(0, 64, (leading[-1],), generator=generator)

    def adam() -> tuple[Tensor, ...]:
        p, m, v = a.clone(), b.clone(), c.abs()
        for weight_decay in (0, 0.01):  # an integer is compiled for no differently
            kernels.adam_([p], [d], [m], [v], [torch.tensor(3.0)], torch.tensor(0.1), (0.9, 0.99), 1e-8, weight_decay)
        return p, m, v

    def scaled() -> Tensor:
        kernels.scale_(out := a.clone(), torch.tensor(0.7))
        return out

    return {
        "adam_": adam,
        "scale_": scaled,
        "activation_bwd_": lambda: kernels.activation_bwd_(a.flatten(0, -2).clone(), b.flatten(0, -2), "tanh"),
        "reparameterize_fwd": lambda: kernels.reparameterize_fwd(a, b, SEED, samples, 5, 2, 0),
        "reparameterize_bwd": lambda: kernels.reparameterize_bwd(dz, b, SEED, samples, 5, 2, 0),
        "kl_standard_normal_fwd": lambda: kernels.kl_standard_normal_fwd(a, b),
        "kl_standard_normal_bwd": lambda: kernels.kl_standard_normal_bwd(row, a, b),
        "kl_normal_fwd": lambda: kernels.kl_normal_fwd(a, b, c, d),
        "kl_normal_bwd": lambda: kernels.kl_normal_bwd(row, a, b, c, d),
        "reparameterize_kl_fwd": lambda: kernels.reparameterize_kl_fwd(a, b, SEED, 5, 0, True),
        "reparameterize_kl_bwd": lambda: kernels.reparameterize_kl_bwd(e, row, a, b, SEED, 5, 0),
        "log_ratio_fwd": lambda: kernels.reparameterize_log_ratio_fwd(a, b, SEED, samples, 5, 2),
        "log_ratio_bwd": lambda: kernels.reparameterize_log_ratio_bwd(dz, dr, a, b, SEED, samples, False, 5, 2),
        "log_ratio_landing": lambda: kernels.reparameterize_log_ratio_bwd(dz, dr, a, b, SEED, samples, True, 5, 2),
        "bernoulli_nll_fwd": lambda: kernels.bernoulli_nll_fwd(a, x, None, 0),
        "bernoulli_nll_bwd": lambda: kernels.bernoulli_nll_bwd(row, a, x, None, 0),
        "bernoulli_with_grad": lambda: kernels.bernoulli_nll_with_grad(a, x, weight, SEED, 5, True),
        "gaussian_nll_fwd": lambda: kernels.gaussian_nll_fwd(a, b, x),
        "gaussian_nll_bwd": lambda: kernels.gaussian_nll_bwd(row, a, b, x),
        "gaussian_with_grad": lambda: kernels.gaussian_nll_with_grad(a, b, x, weight, True),
        "gaussian_per_feature": lambda: kernels.gaussian_nll_bwd(row, a, shared, x),
        "gaussian_scalar": lambda: kernels.gaussian_nll_bwd(row, a, torch.tensor(0.3), x),
        "gather_batch": lambda: kernels.gather_batch(data, index, "binarize", SEED, 5, torch.float32),
    }


def flat(result: object) -> list[Tensor]:
    if isinstance(result, Tensor):
        return [result]
    return [t for part in result for t in flat(part)] if isinstance(result, tuple) else []


# --- threads ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def always_share(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    before = torch.get_num_threads()
    monkeypatch.setattr(_threads, "_WORTH_SHARING_NS", -1)
    monkeypatch.setattr(_threads._Patience, "share", lambda self: True)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("always_share")
@pytest.mark.parametrize("shape", [(150, 37), (2, 5, 9001)], ids=str)
def test_results_do_not_depend_on_the_number_of_threads(shape: tuple[int, ...]) -> None:
    for name, op in every_op(*shape[:-1], D=shape[-1]).items():
        results = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(flat(op()))
        for other in results[1:]:
            assert all(map(torch.equal, results[0], other)), name


@pytest.mark.usefixtures("always_share")
def test_two_threads_take_tiles() -> None:
    """Those of OpenMP, and the caller is one of them; each tile is done once, with the arguments that were given."""
    libc = ctypes.CDLL(None)
    thread, sleep = libc.pthread_self, libc.usleep
    thread.restype, thread.argtypes = ctypes.c_size_t, []
    sleep.restype, sleep.argtypes = ctypes.c_int, [ctypes.c_uint]
    i64_at, f64_at = _pointers.i64_at, _pointers.f64_at

    @numba.njit(nogil=True)
    def kernel(first: int, last: int, out: tuple[int, int], scale: float, offset: int) -> None:
        for tile in range(first, last):
            i64_at(out[0])[tile] = thread()
            f64_at(out[1])[tile] += scale * tile + offset
            sleep(1000)

    threads, values = torch.zeros(64, dtype=torch.int64), torch.zeros(64, dtype=torch.float64)
    out = threads.data_ptr(), values.data_ptr()
    kernel(0, 0, out, 0.5, -3)
    torch.set_num_threads(2)
    _threads.run(kernel, _layout.Plan(torch.Size(()), 1, 1, 61, 61, 1, 1, 61), 1e6, out, 0.5, -3)
    assert not threads[61:].any()
    # the caller has the first share, and would help with the second
    assert threads[0] == thread()
    assert len(threads[:20].unique()) == len(threads[35:61].unique()) == 1
    assert threads[60] != threads[0]
    assert torch.equal(values[:61], 0.5 * torch.arange(61, dtype=torch.float64) - 3)


def test_a_shared_call_knows_what_it_would_have_taken_alone(
    always_share: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The CPU time of all threads; what else the process does meanwhile is to wait for the last chunk."""
    learnt: list[tuple[float, float]] = []
    monkeypatch.setattr(_threads._Patience, "learn", lambda self, *seconds: learnt.append(seconds))
    torch.set_num_threads(2)
    mu = torch.randn(20000, 512)
    for _ in range(3):
        kernels.kl_standard_normal_fwd(mu, mu)
    learnt.clear()
    # so that this thread's CPU time comes to a whole second meanwhile
    while time.thread_time() % 1.0 < 0.9995:
        pass
    wall, cpu = time.perf_counter(), time.process_time()
    kernels.kl_standard_normal_fwd(mu, mu)
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    ((together, alone),) = learnt
    assert 0.2 * cpu < alone < 1.05 * cpu
    assert 0.5 * wall < together < wall


@pytest.mark.usefixtures("always_share")
def test_no_chunk_is_taken_twice() -> None:
    """Ten times a million of them, each less work than taking it."""
    f64_at = _pointers.f64_at

    @numba.njit(nogil=True)
    def kernel(first: int, last: int, counts: int) -> None:
        for tile in range(first, last):
            f64_at(counts)[tile] += 1.0

    counts = torch.zeros(10**6, dtype=torch.float64)
    kernel(0, 0, counts.data_ptr())
    region, parallel = region_of(kernel), _threads._openmp()
    assert region is not None
    assert parallel is not None
    for rounds in range(1, 11):
        parallel(region.address, Job(region, len(counts), 2, 1, (counts.data_ptr(),)).memory, 2, 0)
        assert (counts == rounds).all()


needs_avx512 = pytest.mark.skipif(not _gemm.available(), reason="written for AVX-512")


@needs_avx512
@pytest.mark.usefixtures("always_share")
@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize(
    ("B", "inputs", "outputs"),
    [(8, 5, 24), (9, 1030, 50), (33, 20, 1111), (48, 48, 48), (100, 130, 64), (128, 784, 400)],
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
    assert _products.parts_of(x, weight) == min(threads, -(-outputs // _gemm.LANES))
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
def test_which_products_are_ours() -> None:
    before = torch.get_num_threads(), torch.get_float32_matmul_precision()
    x, weight = torch.zeros(128, 784), torch.zeros(400, 784)
    try:
        torch.set_num_threads(2)
        assert _products.parts_of(x, weight) == 2
        assert _products.parts_of(x[:, ::2], weight[:, ::2].contiguous()) == 0
        assert _products.parts_of(x[:, ::2].contiguous(), weight[:, ::2]) == 0
        # many multiplications, a long sum, not a vector of examples
        assert _products.parts_of(x.expand(8, 128, 784).flatten(0, 1), weight) == 0
        assert _products.parts_of(torch.zeros(8, 4097), torch.zeros(16, 4097)) == 0
        assert _products.parts_of(x[:7], weight) == 0
        # little work, few features
        assert _products.parts_of(x, weight[:16]) == 1
        assert _products.parts_of(torch.zeros(128, 4096), torch.zeros(15, 4096)) == 1
        # one that may be rounded is oneDNN's to make
        torch.set_float32_matmul_precision("medium")
        assert _products.parts_of(x, weight) == 0
        torch.set_float32_matmul_precision("highest")
        torch.set_num_threads(1)
        assert _products.parts_of(x, weight) == 1
    finally:
        torch.set_num_threads(before[0])
        torch.set_float32_matmul_precision(before[1])


def test_a_threads_share_of_adam_is_a_part_of_each_parameter() -> None:
    """Half the tiles are those of the first half of each, so that they are where its product left the gradient."""
    sizes = 10 * adam._TILE, 4 * adam._TILE - 3
    places = tuple((100 * n, 0, 0, 0, n, size) for n, size in enumerate(sizes))
    table, _ = adam._tables(places)
    assert table[:, 5].sum() == sum(sizes)
    rows = [(counter, (address - 100 * counter) // 4) for address, _, _, _, counter, _ in table.tolist()]
    half = rows[: len(rows) // 2]
    assert sorted(row for row in half if row[0] == 0) == [(0, i * adam._TILE) for i in range(5)]
    assert sorted(row for row in half if row[0] == 1) == [(1, i * adam._TILE) for i in range(2)]


def test_every_kernel_can_be_shared(always_share: None, monkeypatch: pytest.MonkeyPatch) -> None:
    shared = []
    monkeypatch.setattr(_threads, "region_of", lambda kernel: shared.append(region_of(kernel)) or shared[-1])
    torch.set_num_threads(2)
    for name, op in every_op(2, 5, D=9001).items():
        op()
        shared.clear()
        op()
        assert shared, name
        assert None not in shared, name


@pytest.mark.usefixtures("always_share")
@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this platform")
def test_a_forked_child_works_alone() -> None:
    torch.set_num_threads(2)
    mu = torch.randn(500, 64)
    expected = kernels.kl_standard_normal_fwd(mu, mu)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # forking a process with threads is what is tested
        child = os.fork()
    if child == 0:
        signal.alarm(20)
        same = torch.equal(kernels.kl_standard_normal_fwd(mu, mu), expected)
        os._exit(0 if same else 1)
    assert os.waitpid(child, 0)[1] == 0


def test_sharing_pauses_for_longer_and_longer_until_what_it_lost_is_little() -> None:
    patience = _threads._Patience()

    def pauses(together: float) -> int:
        """How many calls are not shared after one that took so long, and would have taken 1 alone."""
        patience.learn(together, 1.0)
        return next(calls for calls in range(1000) if patience.share())

    assert [pauses(together) for together in (0.5, 0.9, 1.9, 1.9, 1.9, 1.9, 1.9, 1.9)] == [0, 0, 2, 4, 8, 16, 20, 20]
    # one that pays is not enough, many are
    assert pauses(0.5) == 0
    assert pauses(1.9) == 20
    assert not any(pauses(0.5) for _ in range(100))
    assert [pauses(together) for together in (1.9, 0.95, 1000.0)] == [2, 1, 512]


# --- shapes and layouts -----------------------------------------------------------------------------------------------


def test_tiles_are_all_of_a_size() -> None:
    for rows, tiles in ((128, 4), (4096, 100), (3, 1)):
        plan = _layout.plan(torch.Size((rows, 784)))
        assert plan.tiles == tiles
        assert 0 <= plan.height * tiles - rows < tiles


@pytest.mark.parametrize("shape", [(0, 5), (4, 0), (2, 0, 7)], ids=str)
def test_empty_tensors(shape: tuple[int, ...]) -> None:
    for name, op in every_op(*shape[:-1], D=shape[-1]).items():
        assert all(not t.any() for t in flat(op())), f"{name}: not zero"


def test_rows_of_a_million() -> None:
    D = 10**6
    generator = torch.Generator().manual_seed(1)
    mu, logvar, dz = (torch.randn(2, D, generator=generator) for _ in range(3))
    x = torch.rand(2, D, generator=generator)
    weight = torch.tensor([1.0, -2.0])
    z, kl, _ = kernels.reparameterize_kl_fwd(mu, logvar, SEED, 0, 0, False)
    wide = (mu.double(), logvar.double())
    torch.testing.assert_close(kl.double(), reference.kl_standard_normal(*wide), rtol=2e-7, atol=0)
    # in float32, as the rounding of a uniform just below 1 is part of the noise
    torch.testing.assert_close(z, reference.reparameterize(mu, logvar, SEED), rtol=1e-5, atol=1e-5)
    nll, dlogits, sums = kernels.bernoulli_nll_with_grad(mu, x, weight, None, 0, True)
    torch.testing.assert_close(nll.double(), reference.bernoulli_nll(wide[0], x.double()), rtol=2e-7, atol=0)
    torch.testing.assert_close(dlogits, weight[:, None] * (torch.sigmoid(mu) - x), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(sums, dlogits.sum(0), rtol=1e-6, atol=1e-6)
    nll = kernels.gaussian_nll_fwd(mu, logvar, x)
    torch.testing.assert_close(nll.double(), reference.gaussian_nll(*wide, x.double()), rtol=2e-7, atol=0)
    dmu, _ = kernels.reparameterize_kl_bwd(dz, weight, mu, logvar, SEED, 0, 0)
    torch.testing.assert_close(dmu, dz + weight[:, None] * mu, rtol=1e-6, atol=1e-6)


def _layouts(t: Tensor) -> dict[str, Tensor]:
    """Views with the values of `t` `[2, 3, D]`."""
    wide = t.new_full((2, 3, 2 * t.shape[-1]), float("nan"))
    wide[..., ::2] = t
    shifted = t.new_full((t.numel() + 1,), float("nan"))
    shifted[1:] = t.flatten()
    padded = t.new_full((2, 3, t.shape[-1] + 3), float("nan"))
    padded[..., 2:-1] = t
    return {
        "every second column": wide[..., ::2],
        "odd offset": shifted[1:].view(t.shape),
        "columns of a wider tensor": padded[..., 2:-1],
        "transposed leading dimensions": t.transpose(0, 1).contiguous().transpose(0, 1),
        "transposed event": t.transpose(-1, -2).contiguous().transpose(-1, -2),
    }


def test_any_strides_in_and_out() -> None:
    mu, logvar, dz = (torch.randn(2, 3, 37) for _ in range(3))
    dkl = torch.randn(2, 3)
    expected = kernels.reparameterize_kl_bwd(dz, dkl, mu, logvar, SEED, 0, 0)
    for name in _layouts(mu):
        inputs = [_layouts(t)[name] for t in (dz, mu, logvar)]
        out = tuple(_layouts(torch.zeros(2, 3, 37))[name] for _ in range(2))
        result = kernels.reparameterize_kl_bwd(inputs[0], dkl.T.contiguous().T, *inputs[1:], SEED, 0, 0, out)
        assert all(map(torch.equal, result, expected)), name
        assert all(r.data_ptr() == o.data_ptr() for r, o in zip(result, out)), name


def test_four_dimensions_that_do_not_collapse_are_copied() -> None:
    mu = torch.randn(2, 4, 3, 8)
    view = mu.transpose(0, 1).contiguous().transpose(0, 1)
    assert _layout.walkable(view) is not view
    assert torch.equal(kernels.kl_standard_normal_fwd(view, view), kernels.kl_standard_normal_fwd(mu, mu))


def test_in_place_is_out_of_place() -> None:
    mu, logvar, x, weight = torch.randn(70, 1100), torch.randn(70, 1100), torch.rand(70, 1100), torch.rand(70)
    nll, *expected, sums = kernels.gaussian_nll_with_grad(mu, logvar, x, weight, True)
    again, *result, sums_again = kernels.gaussian_nll_with_grad(mu, logvar, x, weight, True, (mu, logvar))
    assert result[0] is mu
    assert result[1] is logvar
    assert all(map(torch.equal, [nll, *expected, *sums], [again, *result, *sums_again]))


# --- compiled code ----------------------------------------------------------------------------------------------------


def alone(loop: Callable[..., object]) -> str:
    """Assembly of a kernel of one loop: inputs in memory, what the loop writes in scratch, as in the real kernels."""
    py_func = loop.py_func  # type: ignore[attr-defined]
    outputs = set(re.findall(r"(\w+)\[[^]]*\](?:, \w+\[[^]]*\])* \+?= ", inspect.getsource(py_func)))
    arguments, before, after = [], [], []
    for name, parameter in inspect.signature(py_func).parameters.items():
        element = "u32" if name in ("words", "counters") else "f32"
        if parameter.annotation == "int":
            arguments.append(name)
        elif parameter.annotation == "bool":
            arguments.append(f"{name} != 0")
        elif name in ("weight", "dkl", "dr"):
            arguments.append(f"f32_at({name})[0]")
        elif element == "u32" or name not in outputs:
            arguments.append(f"{element}_at({name})")
        else:
            before += [f"    s_{name} = f32_scratch(512)", f"    store_piece(f32_at({name}), s_{name}, count)"]
            arguments.append(f"s_{name}")
            after += [f"    store_piece(s_{name}, f32_at({name}), count)"]
    names = ", ".join(inspect.signature(py_func).parameters)
    body = [f"def kernel({names}):", *before, f"    total = loop({', '.join(arguments)})", *after, "    return total"]
    scope: dict[str, Any] = {**vars(_pointers), "u32_at": _pointers._pointer_at(numba.uint32)}
    exec("\n".join(body), scope | {"store_piece": _pieces.store_piece, "loop": loop}, scope)
    compiled = numba.njit(**_jit._KERNEL)(scope["kernel"])
    compiled.compile((numba.int64,) * len(inspect.signature(py_func).parameters))
    (assembly,) = compiled.inspect_asm().values()
    return str(assembly)


@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="reads x86 assembly")
@pytest.mark.parametrize(
    ("name", "hot"),
    [
        ("bernoulli_nll._nll_piece", ["rint"]),
        ("bernoulli_nll._grad_piece", ["rint", "div"]),
        ("bernoulli_nll._nll_and_grad_piece", ["rint", "div"]),
        ("gaussian_nll._nll_piece", ["rint"]),
        ("gaussian_nll._grad_piece", ["rint"]),
        ("gaussian_nll._nll_and_grad_piece", ["rint"]),
        ("kl_standard_normal._kl_piece", ["rint"]),
        ("kl_standard_normal._kl_grad_piece", ["rint"]),
        ("kl_normal._kl_piece", ["rint"]),
        ("kl_normal._kl_grad_piece", ["rint"]),
        ("reparameterize_kl._fwd_piece", ["rint"]),
        ("reparameterize_kl._bwd_piece", ["rint"]),
        ("_samples._sigma_piece", ["rint"]),
        ("_samples._add_grad_with_path", ["div"]),
        ("_philox._draw_normals", ["sqrt"]),
        ("_philox.to_words", ["pmuludq"]),
    ],
)
def test_hot_loops_are_vectorised(name: str, hot: list[str]) -> None:
    """The exponential (which rounds), the root, the division and the product of a loop work on whole vectors.

    A branch, a call or a conversion in the loop would leave only the scalar instruction, and eight times the time.
    """
    module, function = name.split(".")
    assembly = alone(getattr(importlib.import_module(f"fastvae_cpu_kernels.{module}"), function))
    packed = {"rint": "(?:round|rndscale)ps", "div": "divps", "sqrt": "sqrtps", "pmuludq": "pmuludq"}
    vector = "[yz]mm" if llvmlite.binding.get_host_cpu_features().get("avx2") else "xmm"
    for instruction in hot:
        assert re.search(rf"\bv?{packed[instruction]}\s.*{vector}", assembly), f"{name}: no vectors of {instruction}"


@needs_avx512
def test_a_tile_stays_in_registers() -> None:
    """A step of k is 24 multiply-adds of whole vectors, and nothing is put aside in it."""
    compiled = numba.njit(**_jit._KERNEL)(_gemm.product.py_func)
    compiled.compile((numba.int64,) * 10)
    (assembly,) = compiled.inspect_asm().values()
    steps = [block for block in re.split(r"\n(?=\S+:)", assembly) if len(re.findall("vfmadd.*zmm", block)) == 24]
    assert steps
    assert not any(re.search(r"vmov[au]ps\s+%zmm\d+, .*\(", block) for block in steps)


def test_the_cache_is_used_by_other_processes_and_by_no_other_source(tmp_path: Path) -> None:
    """An edit of `_math.py`, which Numba does not see behind a kernel of another file, must be seen."""
    package = tmp_path / "fastvae_cpu_kernels"
    shutil.copytree(PACKAGE, package, ignore=shutil.ignore_patterns("__pycache__"))
    script = (
        "import sys, torch, fastvae_cpu_kernels as k\n"
        "assert 'numba' not in sys.modules\n"
        "print(k.kl_standard_normal_fwd(torch.zeros(1, 1), torch.ones(1, 1)).item())\n"
        "from fastvae_cpu_kernels.kl_standard_normal import _kl_fwd_kernel\n"
        "print(sum(_kl_fwd_kernel.stats.cache_hits.values()))\n"
    )

    def run(**environment: str) -> tuple[float, int]:
        env = {**os.environ, "PYTHONPATH": str(tmp_path), "NUMBA_CACHE_DIR": "", **environment}
        out = subprocess.run([sys.executable, "-c", script], env=env, capture_output=True, text=True, check=True)
        value, hits = out.stdout.split()
        return float(value), int(hits)

    value, hits = run()
    assert value == pytest.approx((torch.e - 2) / 2)
    assert hits == 0
    assert run() == (value, 1)

    source = package / "_math.py"
    source.write_text(source.read_text().replace("0.5, 1.0, 2.0))", "0.25, 1.0, 2.0))"))
    changed, hits = run()
    assert changed != value
    assert hits == 0

    # a directory that cannot be written to: the user's cache, and without one no cache
    shutil.rmtree(package / "__pycache__")
    (package / "__pycache__").write_text("not a directory")
    assert run(HOME=str(tmp_path), XDG_CACHE_HOME=str(tmp_path / "cache")) == (changed, 0)
    assert list((tmp_path / "cache").rglob("*.nbi"))
    (tmp_path / "file").write_text("not a directory")
    assert run(HOME=str(tmp_path / "file"), XDG_CACHE_HOME=str(tmp_path / "file")) == (changed, 0)
