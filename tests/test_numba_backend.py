"""The Numba kernels as machinery: layouts, vectorised code, the cache on disk. Their values: test_ops_*."""

from __future__ import annotations

import gc
import importlib
import inspect
import itertools
import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fastvae_cpu_kernels as kernels
import llvmlite.binding
import numba
import pytest
import torch
from fastvae_cpu_kernels import _jit, _layout, _pieces, _pointers
from torch import Tensor

from fastvae import reference
from tests.numba_ops import SEED, every_op, flat

PACKAGE = Path(_jit.__file__).parent


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


def test_tensors_of_other_devices_are_refused() -> None:
    here, elsewhere = torch.zeros(64, 512), torch.zeros(64, 512, device="meta")
    assert kernels.supports("kl_standard_normal", here, here) is None
    assert "not meta" in str(kernels.supports("kl_standard_normal", here, elsewhere))
    assert "on a CPU" in str(kernels.supports("linear", here, torch.zeros(512, 512, device="meta")))


def test_in_place_is_out_of_place() -> None:
    mu, logvar, x, weight = torch.randn(70, 1100), torch.randn(70, 1100), torch.rand(70, 1100), torch.rand(70)
    nll, *expected, sums = kernels.gaussian_nll_with_grad(mu, logvar, x, weight, True)
    again, *result, sums_again = kernels.gaussian_nll_with_grad(mu, logvar, x, weight, True, out=(mu, logvar))
    assert result[0] is mu
    assert result[1] is logvar
    assert all(map(torch.equal, [nll, *expected, *sums], [again, *result, *sums_again]))


# --- compiled code ----------------------------------------------------------------------------------------------------


def alone(loop: Callable[..., object], absent: str) -> str:
    """Assembly of a kernel of one loop: inputs in memory, what the loop writes in scratch; None for what is absent."""
    py_func = loop.py_func  # type: ignore[attr-defined]
    outputs = set(re.findall(r"(\w+)\[[^]]*\](?:, \w+\[[^]]*\])* \+?= ", inspect.getsource(py_func)))
    arguments, before, after = [], [], []
    for name, parameter in inspect.signature(py_func).parameters.items():
        element = "u32" if parameter.annotation == "Words" else "f32"
        if name == absent:
            arguments.append("None")
        elif parameter.annotation == "int":
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
        ("bernoulli_nll._nll_piece", ["exp", "div"]),
        ("bernoulli_nll._nll_piece without grad", ["exp"]),
        ("bernoulli_nll._grad_piece", ["exp", "div"]),
        ("gaussian_nll._nll_piece", ["exp"]),
        ("gaussian_nll._grad_piece", ["exp"]),
        ("gaussian_nll._nll_and_grad_piece", ["exp"]),
        ("kl_standard_normal._kl_piece", ["exp"]),
        ("kl_standard_normal._kl_grad_piece", ["exp"]),
        ("kl_normal._kl_piece", ["exp"]),
        ("kl_normal._kl_grad_piece", ["exp"]),
        ("reparameterize_kl._fwd_piece", ["exp"]),
        ("reparameterize_kl._bwd_piece", ["exp"]),
        ("_samples._sigma_piece", ["exp"]),
        ("_samples._add_grad_with_path", ["div"]),
        ("_philox._draw_normals", ["sqrt"]),
        ("_philox._ten_rounds", ["pmuludq"]),
    ],
)
def test_hot_loops_are_vectorised(name: str, hot: list[str]) -> None:
    """The exponential (whose exponent is shifted), root, division and product of a loop work on whole vectors.

    A branch, a call or a conversion in the loop would leave only the scalar instruction, and eight times the time.
    """
    module, _, rest = name.partition(".")
    function, _, absent = rest.partition(" without ")
    assembly = alone(getattr(importlib.import_module(f"fastvae_cpu_kernels.{module}"), function), absent)
    packed = {"exp": "pslld", "div": "divps", "sqrt": "sqrtps", "pmuludq": "pmuludq"}
    vector = "[yz]mm" if llvmlite.binding.get_host_cpu_features().get("avx2") else "xmm"
    for instruction in hot:
        assert re.search(rf"\bv?{packed[instruction]}\s.*{vector}", assembly), f"{name}: no vectors of {instruction}"


def test_a_routine_is_compiled_once_for_all_kernels_and_processes(tmp_path: Path) -> None:
    script = (
        "import torch, fastvae_cpu_kernels as k, numba.core.event as event\n"
        "zero, one, seed = torch.zeros(1, 1), torch.ones(1, 1), torch.tensor([0])\n"
        "with event.install_recorder('numba:compile') as recorder:\n"
        "    k.gaussian_nll_fwd(zero, one, zero)\n"
        "    k.reparameterize_fwd(zero, one, seed, None, 0, 0, 0)\n"
        "    k.reparameterize_kl_fwd(zero, one, seed, 0, 0, False)\n"
        "    k.bernoulli_nll_fwd(zero, one, seed, 0)\n"
        "    k.gather_batch(one, seed, 'binarize', seed, 0, torch.float32)\n"
        "print(*(e.data['dispatcher'].py_func.__name__ for _, e in recorder.buffer if e.is_start))\n"
    )
    env = {**os.environ, "NUMBA_CACHE_DIR": str(tmp_path)}

    def compiled() -> list[str]:
        return subprocess.check_output([sys.executable, "-c", script], env=env, text=True).split()

    names = compiled()
    # the first is called through a loop, the last by another routine
    for routine in ("load_piece", "draw_rows", "binarize_piece", "draw_uniforms"):
        assert names.count(routine) == 1, routine
    assert names.count("_fwd_kernel") == 2
    assert not compiled()


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


def _rows_apart(t: Tensor) -> Tensor:
    """The same values, with a gap after each row."""
    wide = t.new_zeros(*t.shape[:-1], t.shape[-1] + 1)
    wide[..., :-1] = t
    return wide[..., :-1]


def _samples_apart(t: Tensor) -> Tensor:
    """With a gap after each sample `[B, L]`, if there are several."""
    wide = t.new_zeros(*t.shape[:-2], t.shape[-2] + 1, t.shape[-1])
    wide[..., :-1, :] = t
    return wide[..., :-1, :]


@pytest.mark.parametrize("shape", [(70, 20), (5, 3), (2, 5, 8), (3, 2, 7)], ids=str)
def test_rows_that_follow_each_other_are_walked_as_one(shape: tuple[int, ...]) -> None:
    """With the results of rows that do not, whichever tensor they are of."""
    mu, logvar, dz = (torch.randn(*shape) for _ in range(3))
    dr = torch.randn(*shape[:-1])

    def results(mu: Tensor, logvar: Tensor, dz: Tensor) -> list[Tensor]:
        ratio = kernels.reparameterize_log_ratio_fwd(mu, logvar, SEED, 1, 5, 2)
        return [
            kernels.reparameterize_fwd(mu, logvar, SEED, None, 5, 2, 0),
            kernels.reparameterize_bwd(dz, logvar, SEED, None, 5, 2, 0)[1],
            *kernels.reparameterize_bwd(dz[None], logvar, SEED, 1, 5, 2, 0),
            *ratio,
            *kernels.reparameterize_log_ratio_bwd(dz[None], dr[None], mu, logvar, SEED, 1, False, 5, 2),
        ]

    expected = results(*map(_rows_apart, (mu, logvar, dz)))
    for one in (_rows_apart, _samples_apart):
        for layouts in itertools.product((torch.clone, one), repeat=3):
            got = results(*(layout(t) for layout, t in zip(layouts, (mu, logvar, dz), strict=True)))
            torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-6)


def test_the_garbage_collector_is_as_it_was_after_a_compilation() -> None:
    @_jit.kernel
    def nothing(n: int) -> None:
        pass

    assert gc.isenabled()
    nothing(1)
    assert gc.isenabled()
