"""The bugs that other Triton libraries shipped, one test each, on the likelihoods, the gather and the launchers.

Layouts, broadcasting, misaligned views and upstream gradients of stride 0 are in `test_ops_likelihood` as well, against
float64; the latent ops have theirs in `test_ops_latent`, autograd and dispatch in `test_functional`.
"""

from __future__ import annotations

import json
import math
import mmap
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fastvae import reference
from tests.op_checks import BACKENDS, DEVICE, device_of, load_backend, randn

Tensors = list[Tensor]
ROOT = Path(__file__).parent.parent
R, D = 9, 45


def inputs_on(device: str) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(mu, logvar, x, row weight, seed)."""
    mu, logvar = (randn(R, D, seed=i, device=device) for i in range(2))
    x = torch.randint(256, (R, D), generator=torch.Generator().manual_seed(2)).to(device, torch.uint8)
    return mu, logvar, x, randn(R, seed=3, device=device), torch.tensor([77], device=device)


def run_all(kernels: ModuleType, mu: Tensor, logvar: Tensor, x: Tensor, weight: Tensor, seed: Tensor) -> Tensors:
    """Every output of every likelihood op; the first dimension of all but the sums is the row."""
    rows = mu.shape[0]
    index = torch.arange(rows, device=mu.device)
    outputs = [
        kernels.bernoulli_nll_fwd(mu, x, None, 0),
        kernels.bernoulli_nll_bwd(weight, mu, x, None, 0),
        *kernels.bernoulli_nll_with_grad(mu, x, weight, None, 0, True),
        *kernels.bernoulli_nll_with_grad(mu, x, weight, seed, 0, False)[:2],
        kernels.gaussian_nll_fwd(mu, logvar, x),
        *kernels.gaussian_nll_bwd(weight, mu, logvar, x),
        *kernels.gaussian_nll_with_grad(mu, logvar, x, weight, False)[:3],
        *kernels.gaussian_nll_with_grad(mu, logvar, x, weight, True)[3],
        *kernels.gaussian_nll_with_grad(mu, logvar[0], x, weight, False)[:3],
        *kernels.gaussian_nll_with_grad(mu, logvar[0, 0], x, weight, False)[:3],
    ]
    for transform in ("scale", "binarize", "dequantize"):
        outputs += [kernels.gather_batch(x.contiguous(), index, transform, seed, 0, torch.float32)]
    return outputs


@pytest.mark.parametrize("columns", [D, 40], ids=["scalar", "vector"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_offsets_beyond_32_bits(backend: str, columns: int) -> None:
    """Rows 2^31 elements apart, and a data set of more than 2^31 elements: a wrapped offset reads zeros.

    40 columns are walked in units of 8, whose product with a row stride in those units must not wrap either.
    """
    kernels, device = load_backend(backend), device_of(backend)
    if device != "cpu":
        pytest.skip("reserves addresses without memory, which only the host can")
    if backend == "triton" and "GPU_EMULATOR" in os.environ:
        pytest.skip("an emulator's notes on every element would need the memory that is not there")
    # address space, not memory: only touched pages exist (0x4000 is MAP_NORESERVE)
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x4000
    storage = torch.frombuffer(mmap.mmap(-1, 4 * (3 * 2**31 + 64), flags=flags), dtype=torch.float32)
    mu, logvar, x, weight = (t[..., :columns].contiguous() if t.ndim > 1 else t for t in inputs_on(device)[:4])
    views = [storage[2**31 + 64 * i :].as_strided((2, columns), (2**31, 1)) for i in range(2)]
    apart = [view.copy_(t[:2]) for view, t in zip(views, (mu, logvar), strict=True)]
    nll = kernels.bernoulli_nll_fwd(apart[0], x[:2], None, 0)
    assert torch.equal(nll, kernels.bernoulli_nll_fwd(mu[:2], x[:2], None, 0))
    right = kernels.gaussian_nll_with_grad(mu[:2], logvar[:2], x[:2], weight[:2], True)
    got = kernels.gaussian_nll_with_grad(*apart, x[:2], weight[:2], True, out=(views[0], views[1]))
    assert all(torch.equal(a, b) for a, b in zip(got[:3], right[:3], strict=True))
    data = torch.frombuffer(mmap.mmap(-1, 2**31 + 128 * D, flags=flags), dtype=torch.uint8)[: (2**31 // D + 3) * D]
    data = data.view(-1, D)
    data[-1] = 255
    index = torch.tensor([data.shape[0] - 1, 0])
    assert kernels.gather_batch(data, index, "scale", None, 0, torch.float32).tolist() == [[1.0] * D, [0.0] * D]


def test_grids_have_one_axis(monkeypatch: pytest.MonkeyPatch) -> None:
    """Along y and z a grid may not exceed 65,535 programs."""
    kernels = load_backend("triton")
    grids: list[tuple[int, ...]] = []

    class Recorder:
        def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
            grids.append(grid)
            return lambda *_, **__: None

    bernoulli, gaussian = (sys.modules[f"{kernels.__name__}.{name}"] for name in ("bernoulli_nll", "gaussian_nll"))
    monkeypatch.setattr(bernoulli, "_bernoulli_nll_kernel", Recorder())
    monkeypatch.setattr(gaussian, "_gaussian_nll_kernel", Recorder())
    # nothing was written, so that there is nothing to sum
    for module in (bernoulli, gaussian):
        monkeypatch.setattr(module, "sum_partials", lambda first, second=None, **places: (first[0], second))
    for shape in [(70_000, 1, 784), (1, 140_000_000), (140_000_000, 1)]:
        mu = torch.zeros((), device=DEVICE).expand(shape)  # no memory behind it
        kernels.bernoulli_nll_fwd(mu, mu, None, 0)
        kernels.gaussian_nll_fwd(mu, mu, mu)
    assert len(grids) == 6
    assert all(len(grid) == 1 and 0 < grid[0] < 2**31 for grid in grids)


@pytest.mark.parametrize("backend", BACKENDS)
def test_padded_lanes_add_nothing(backend: str) -> None:
    """A padded logit of 0 would cost log 2 nats, a padded Gaussian log(2 pi) / 2."""
    kernels, device = load_backend(backend), device_of(backend)
    for elements in (1, 2, 3, 5, 17, 129, 259):
        zeros = torch.zeros(3, elements, device=device)
        weight = torch.ones(3, device=device)
        nll, dlogits, sums = kernels.bernoulli_nll_with_grad(zeros, zeros, weight, None, 0, True)
        torch.testing.assert_close(nll, torch.full_like(nll, elements * math.log(2.0)), rtol=1e-6, atol=0)
        assert torch.equal(dlogits, torch.full_like(zeros, 0.5))
        assert torch.equal(sums, torch.full_like(sums, 1.5))
        nll = kernels.gaussian_nll_fwd(zeros, zeros, zeros)
        torch.testing.assert_close(nll, torch.full_like(nll, elements * 0.5 * reference.LOG_2PI), rtol=1e-6, atol=0)
        dlogvar = kernels.gaussian_nll_bwd(weight, zeros, zeros.new_zeros(()), zeros)[1]
        assert dlogvar.item() == 1.5 * elements


@pytest.mark.parametrize("backend", BACKENDS)
def test_every_output_is_written(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory that an allocator hands out again holds anything: here NaN."""
    kernels, device = load_backend(backend), device_of(backend)

    def poisoned(allocate: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def empty(*args: Any, **kwargs: Any) -> Tensor:
            tensor = allocate(*args, **kwargs)
            return tensor.fill_(float("nan")) if tensor.is_floating_point() else tensor

        return empty

    inputs = inputs_on(device)
    monkeypatch.setattr(torch, "empty", poisoned(torch.empty))
    monkeypatch.setattr(torch, "empty_like", poisoned(torch.empty_like))
    monkeypatch.setattr(Tensor, "new_empty", poisoned(Tensor.new_empty))
    for output in run_all(kernels, *inputs):
        assert output.isfinite().all()


def test_accumulation_in_float32() -> None:
    """A bfloat16 sum of 0.69 stands still at 128."""
    kernels = load_backend("triton")
    logits = torch.zeros(1, 4096, dtype=torch.bfloat16, device=DEVICE)
    nll = kernels.bernoulli_nll_fwd(logits, logits, None, 0)
    torch.testing.assert_close(nll.cpu(), torch.tensor([4096 * math.log(2.0)]), rtol=1e-6, atol=0)
    weight = torch.ones(700, device=DEVICE)
    rows = torch.zeros(700, 8, dtype=torch.bfloat16, device=DEVICE)
    sums = kernels.bernoulli_nll_with_grad(rows, rows, weight, None, 0, True)[2]
    torch.testing.assert_close(sums, torch.full_like(sums, 350.0), rtol=1e-6, atol=0)


@pytest.mark.parametrize("backend", BACKENDS)
def test_bytes_do_not_wrap_around(backend: str) -> None:
    """All 256 values of a byte: 255 is 1, 128 is not negative."""
    kernels, device = load_backend(backend), device_of(backend)
    x = torch.arange(256, device=device).to(torch.uint8)[None]
    zeros, weight = torch.zeros(1, 256, device=device), torch.ones(1, device=device)
    expected = torch.arange(256, device=device).float() / 255.0
    dlogits = kernels.bernoulli_nll_bwd(weight, zeros, x, None, 0)
    torch.testing.assert_close(0.5 - dlogits[0], expected, rtol=0, atol=1e-7)
    dmu = kernels.gaussian_nll_bwd(weight, zeros, zeros, x)[0]
    torch.testing.assert_close(-dmu[0], expected, rtol=1e-6, atol=0)
    assert torch.equal(
        kernels.gather_batch(x, torch.zeros(1, dtype=torch.int64, device=device), "scale", None, 0, torch.float32)[0],
        expected,
    )


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("backend", BACKENDS)
def test_nan_and_infinity_stay_in_their_row(backend: str, bad: float) -> None:
    kernels, device = load_backend(backend), device_of(backend)
    mu, logvar, x, weight, seed = inputs_on(device)
    clean = run_all(kernels, mu, logvar, x, weight, seed)
    dirty_mu, dirty_logvar = mu.clone(), logvar.clone()
    dirty_mu[1, 3], dirty_logvar[4, 7] = bad, bad
    # numpy, under the interpreter, warns of what a GPU computes silently
    with np.errstate(all="ignore"):
        dirty = run_all(kernels, dirty_mu, dirty_logvar, x, weight, seed)
        nll = kernels.gaussian_nll_fwd(dirty_mu, dirty_logvar, x)
    rows = [0, 2, 3, 5, 6, 7, 8]
    for before, after in zip(clean, dirty, strict=True):
        if after.shape[:1] == (R,):
            assert torch.equal(before[rows], after[rows])
    data = x.double() / 255.0
    expected = (
        reference.bernoulli_nll(dirty_mu.double(), data).float(),
        reference.gaussian_nll(dirty_mu.double(), dirty_logvar.double(), data).float(),
    )
    for actual, right in zip((dirty[0], nll), expected, strict=True):
        torch.testing.assert_close(actual, right, rtol=1e-6, atol=0, equal_nan=True)


@pytest.mark.parametrize("backend", BACKENDS)
def test_inputs_are_left_alone(backend: str) -> None:
    """Autograd may still need them: only `out` is overwritten."""
    kernels, device = load_backend(backend), device_of(backend)
    inputs = inputs_on(device)
    copies = [t.clone() for t in inputs]
    run_all(kernels, *inputs)
    assert all(torch.equal(a, b) for a, b in zip(inputs, copies, strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
def test_misaligned_views_and_strided_upstream(backend: str) -> None:
    """Every tensor one element off any alignment, rows of odd stride, an upstream gradient of stride 3."""
    kernels, device = load_backend(backend), device_of(backend)
    mu, logvar, x, weight, seed = inputs_on(device)
    odd = [torch.empty(R, D + 2, dtype=t.dtype, device=device)[:, 1:-1].copy_(t) for t in (mu, logvar, x)]
    strided = torch.empty(R, 3, device=device)[:, 1].copy_(weight)
    for right, got in zip(
        run_all(kernels, mu, logvar, x, weight, seed), run_all(kernels, *odd, strided, seed), strict=True
    ):
        torch.testing.assert_close(got, right, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_runs_repeat_bit_for_bit(backend: str) -> None:
    kernels, inputs = load_backend(backend), inputs_on(device_of(backend))
    for first, second in zip(run_all(kernels, *inputs), run_all(kernels, *inputs), strict=True):
        assert torch.equal(first, second)


@pytest.mark.parametrize("rows_and_cols", [(4, 16), (8, 32), (16, 8)])
def test_noise_does_not_depend_on_the_tiles(rows_and_cols: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    kernels = load_backend("triton")
    mu, _, x, weight, seed = inputs_on(DEVICE)
    index = torch.arange(R, device=DEVICE)
    right = kernels.bernoulli_nll_with_grad(mu, x, weight, seed, 5, False)
    batch = kernels.gather_batch(x, index, "dequantize", seed, 5, torch.float32)
    rows, cols = rows_and_cols
    walk = sys.modules[f"{kernels.__name__}._rows"].Walk
    tiles = walk(rows, cols, 16, -(-R // rows), 1, 1, D // cols, 4)
    for name in ("bernoulli_nll", "gather_batch"):
        monkeypatch.setattr(sys.modules[f"{kernels.__name__}.{name}"], "row_walk", lambda *_: tiles)
    nll, dlogits, _ = kernels.bernoulli_nll_with_grad(mu, x, weight, seed, 5, False)
    torch.testing.assert_close(nll, right[0], rtol=1e-6, atol=0)
    assert torch.equal(dlogits, right[1])
    assert torch.equal(kernels.gather_batch(x, index, "dequantize", seed, 5, torch.float32), batch)


@pytest.mark.parametrize("backend", BACKENDS)
def test_draws_differ_between_seeds_and_examples(backend: str) -> None:
    """A constant seed, or a counter of 32 bits, would repeat them."""
    kernels, device = load_backend(backend), device_of(backend)
    x = torch.full((2, 256), 128, dtype=torch.uint8, device=device)
    index = torch.arange(2, device=device)
    draws = [
        kernels.gather_batch(x, index, "binarize", torch.tensor([seed], device=device), offset, torch.float32)
        for seed, offset in [(0, 0), (1, 0), (2**32, 0), (-1, 0), (0, 2), (0, 2**32), (0, 2**40)]
    ]
    rows = torch.cat(draws)
    assert torch.unique(rows, dim=0).shape[0] == rows.shape[0]


class _NoSync(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert "_local_scalar_dense" not in str(func), "a launcher waits for the device"
        assert "equal" not in str(func), "a launcher compares on the device"
        return func(*args, **(kwargs or {}))


def test_launchers_do_not_wait_for_the_device() -> None:
    kernels, inputs = load_backend("triton"), inputs_on(DEVICE)
    run_all(kernels, *inputs)
    with _NoSync():
        run_all(kernels, *inputs)


@pytest.mark.cuda
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_launches_go_to_the_tensors_device() -> None:
    kernels = load_backend("triton")
    with torch.cuda.device(0):
        outputs = run_all(kernels, *(t.to("cuda:1") for t in inputs_on("cuda:0")))
    for output, right in zip(outputs, run_all(kernels, *inputs_on("cuda:0")), strict=True):
        assert output.device == torch.device("cuda:1")
        assert torch.equal(output.cpu(), right.cpu())


@pytest.fixture(scope="module")
def compiled() -> dict[str, dict[str, Any]]:
    """By group of calls: how many kernels were compiled, and the PTX of every launch."""
    pytest.importorskip("triton")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join((str(ROOT), str(ROOT / "kernels" / "torch-ext")))
    command = [sys.executable, str(ROOT / "tests" / "compiled_launches.py")]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    groups: dict[str, dict[str, Any]] = json.loads(result.stdout)
    return groups


@pytest.mark.parametrize("group", ["batch sizes", "example offsets", "storage offsets", "gathered batches"])
def test_one_compilation_for_all(compiled: dict[str, dict[str, Any]], group: str) -> None:
    assert len(compiled[group]["ptx"]) > 1
    assert compiled[group]["compiled"] == 1


def test_no_atomics(compiled: dict[str, dict[str, Any]]) -> None:
    """Float atomics add in the order in which programs happen to run."""
    for group in compiled.values():
        for ptx in group["ptx"]:
            assert not re.search(r"\b(atom|red)\.", ptx)


def test_no_tensor_cores(compiled: dict[str, dict[str, Any]]) -> None:
    """`tl.dot` rounds float32 to TF32 unless it is told not to."""
    for group in compiled.values():
        for ptx in group["ptx"]:
            assert not re.search(r"mma|tf32", ptx)


def test_nothing_is_autotuned() -> None:
    """Tuning would launch a kernel many times, inside a graph capture too."""
    kernels = load_backend("triton")
    modules = [module for name, module in sys.modules.items() if name.startswith(f"{kernels.__name__}.")]
    assert len(modules) > 5
    assert not [
        v for module in modules for v in vars(module).values() if type(v).__name__ in ("Autotuner", "Heuristics")
    ]
