"""The Numba kernels on several threads: the same results, shared while that pays."""

from __future__ import annotations

import ctypes
import os
import signal
import time
import warnings
from collections import defaultdict

import fastvae_cpu_kernels as kernels
import numba
import pytest
import torch
from fastvae_cpu_kernels import _layout, _pointers, _threads, adam
from fastvae_cpu_kernels._region import Job, region_of

from tests.numba_ops import every_op, flat


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
    """The CPU time that all threads worked; the process also waits for the last chunk, awake."""
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
    torch.set_num_threads(1)
    single = time.thread_time()
    kernels.kl_standard_normal_fwd(mu, mu)
    single = time.thread_time() - single
    assert 0.6 * single < alone < 1.05 * cpu
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

    assert [pauses(together) for together in (0.5, 0.9, *[1.9] * 8)] == [0, 0, 1, 2, 4, 8, 16, 32, 64, 64]
    # one that pays is not enough, many are
    assert pauses(0.5) == 0
    assert pauses(1.9) == 64
    assert not any(pauses(0.5) for _ in range(100))
    # what lost a tenth of a call loses less than a call alone would, until it has done so again and again
    assert [pauses(together) for together in (1.9, *[1.0] * 4, 1000.0)] == [1, 0, 0, 1, 2, 512]


@pytest.mark.usefixtures("always_share")
def test_a_large_layer_does_not_pause_for_a_small_one(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.set_num_threads(2)
    monkeypatch.setattr(_threads, "_patience", defaultdict(_threads._Patience))
    small, large = torch.zeros(3000, 64), torch.zeros(30000, 64)
    for _ in range(2):
        kernels.kl_standard_normal_fwd(small, small)
        kernels.kl_standard_normal_fwd(large, large)
    assert len(_threads._patience) == 2
