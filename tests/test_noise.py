"""The noise: Philox words bit by bit, and what they become, in the reference and on both backends."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from scipy import special, stats
from torch import Tensor

from fastvae import reference
from tests.op_checks import BACKENDS, device_of, load_backend

if importlib.util.find_spec("triton") is not None:
    import triton
    import triton.language as tl
    from fastvae_kernels._philox import philox as triton_philox

    @triton.jit
    def _triton_words(counter_ptr, key_ptr, words_ptr) -> None:  # type: ignore[no-untyped-def]  # triton types at launch
        one = tl.zeros((1, 1), tl.int64)
        example = tl.load(counter_ptr + 1) | (tl.load(counter_ptr + 2) << 32)
        key_lo, key_hi = tl.load(key_ptr).to(tl.uint32), tl.load(key_ptr + 1).to(tl.uint32)
        quad, sample = tl.load(counter_ptr) + one, tl.load(counter_ptr + 3) + one
        w0, w1, w2, w3 = triton_philox(quad, example + one, sample, 0, key_lo, key_hi)
        tl.store(words_ptr + one, w0.to(tl.int64))
        tl.store(words_ptr + 1 + one, w1.to(tl.int64))
        tl.store(words_ptr + 2 + one, w2.to(tl.int64))
        tl.store(words_ptr + 3 + one, w3.to(tl.int64))


Words = tuple[int, ...]
MASK32 = 0xFFFFFFFF

# counter, key and words of philox4x32 with 10 rounds in Random123's kat_vectors
KNOWN_ANSWERS = [
    ((0,) * 4, (0,) * 2, (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((MASK32,) * 4, (MASK32,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


def plain_words(counter: Words, key: Words) -> Words:
    """Philox4x32-10 in plain Python, from the paper."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        p0, p1 = 0xD2511F53 * c0, 0xCD9E8D57 * c2
        c0, c1, c2, c3 = (p1 >> 32) ^ c1 ^ k0, p1 & MASK32, (p0 >> 32) ^ c3 ^ k1, p0 & MASK32
        k0, k1 = (k0 + 0x9E3779B9) & MASK32, (k1 + 0xBB67AE85) & MASK32
    return c0, c1, c2, c3


def reference_words(counter: Words, key: Words) -> Words:
    c, k = torch.tensor(counter), torch.tensor(key)
    return tuple(int(w) for w in reference.philox_4x32((c[0], c[1], c[2], c[3]), (k[0], k[1])))


def triton_words(counter: Words, key: Words) -> Words:
    load_backend("triton")
    device = device_of("triton")
    words = torch.zeros(4, dtype=torch.int64, device=device)
    _triton_words[(1,)](torch.tensor(counter, device=device), torch.tensor(key, device=device), words)
    return tuple(words.tolist())


def numba_words(counter: Words, key: Words) -> Words:
    load_backend("numba")
    import numba
    from fastvae_cpu_kernels._philox import STRIDE, WORDS, to_words
    from fastvae_cpu_kernels._pointers import u32_scratch

    @numba.njit
    def first_words(counter: np.ndarray, seed: int) -> tuple[int, ...]:
        words = u32_scratch(WORDS)
        for j in range(4):
            words[j * STRIDE] = counter[j]
        to_words(words, 1, seed)
        return words[0], words[STRIDE], words[2 * STRIDE], words[3 * STRIDE]

    return tuple(first_words(np.array(counter, np.uint32), np.array(key, np.uint32).view(np.int64)[0]))


@pytest.mark.parametrize(("counter", "key", "words"), KNOWN_ANSWERS, ids=["zeros", "ones", "pi"])
@pytest.mark.parametrize("implementation", [plain_words, reference_words, triton_words, numba_words])
def test_published_known_answers(
    implementation: Callable[[Words, Words], Words], counter: Words, key: Words, words: Words
) -> None:
    assert implementation(counter, key) == words


@pytest.mark.parametrize("seed", [0, -1, 1234567890123456789, -(2**63)])
@pytest.mark.parametrize(("example_offset", "sample_offset"), [(0, 0), (2**32 - 2, 5), (2**40, 2**23)])
@pytest.mark.parametrize("backend", BACKENDS)
def test_words_are_those_of_plain_python(backend: str, seed: int, example_offset: int, sample_offset: int) -> None:
    kernels, device = load_backend(backend), device_of(backend)
    stream, key = 3, (seed & MASK32, (seed >> 32) & MASK32)
    words = kernels.philox_words(torch.tensor([seed], device=device), stream, 4, 21, example_offset, sample_offset)
    assert words.shape == (4, 4, 6)
    for b in range(4):
        example = b + example_offset
        for q in range(6):
            counter = (q, example & MASK32, example >> 32, sample_offset | stream << 24)
            assert tuple(words[:, b, q].tolist()) == plain_words(counter, key)


def noise(
    backend: str, shape: tuple[int, ...], *, seed: int = 7, num_samples: int | None = None, **counters: int
) -> Tensor:
    """eps itself: samples of the standard normal posterior."""
    kernels, device = load_backend(backend), device_of(backend)
    zero = torch.zeros((), device=device).expand(shape)
    offsets = {"example_offset": 0, "sample_offset": 0, "stream": 0, **counters}
    return kernels.reparameterize_fwd(zero, zero, torch.tensor([seed], device=device), num_samples, **offsets)


@pytest.mark.parametrize("backend", BACKENDS)
def test_noise_is_independent_of_blocks_and_shapes(backend: str) -> None:
    """An element is the same in rows of any length, at any place of a tile, whole or split, alone or among samples."""
    whole = noise(backend, (40, 300))
    assert torch.equal(noise(backend, (40, 7)), whole[:, :7])
    assert torch.equal(noise(backend, (3, 64), example_offset=19), whole[19:22, :64])
    assert torch.equal(noise(backend, (1, 2500), example_offset=39)[:, :300], whole[39:])
    # rows are numbered in 64 bits, and of any width drawn as on their own
    beyond = noise(backend, (8, 20), example_offset=2**32 - 5)
    assert torch.equal(noise(backend, (3, 20), example_offset=2**32), beyond[5:])
    for width in (44, 164, 220, 244):
        rows = noise(backend, (24, width))
        assert all(torch.equal(noise(backend, (1, width), example_offset=b)[0], rows[b]) for b in range(24))
    assert torch.equal(noise(backend, (40, 300), num_samples=2)[0], whole)


@pytest.mark.parametrize("tile", [128, 4096])
def test_noise_is_independent_of_the_tile(tile: int, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = noise("triton", (5, 130))
    monkeypatch.setattr("fastvae_kernels._tiles._SMALL_TILE", tile)
    assert torch.equal(noise("triton", (5, 130)), whole)


@pytest.mark.parametrize("backend", BACKENDS)
def test_ranks_and_chunks_of_samples_draw_what_one_device_would(backend: str) -> None:
    whole = noise(backend, (12, 20), num_samples=6)
    ranks = [noise(backend, (4, 20), num_samples=6, example_offset=4 * rank) for rank in range(3)]
    chunks = [noise(backend, (12, 20), num_samples=2, sample_offset=2 * chunk) for chunk in range(3)]
    assert torch.equal(torch.cat(ranks, dim=1), whole)
    assert torch.equal(torch.cat(chunks, dim=0), whole)
    assert torch.equal(noise(backend, (6, 12, 20)), whole)


Normals = npt.NDArray[np.float64]
# |z| of a standard normal statistic; two-sided probability 7e-6
SIGMAS = 4.5


def sample(backend: str, **counters: Any) -> Normals:
    """10^7 normals; what Triton's interpreter can draw in a few seconds is a thousandth."""
    shape = (2500, 4000) if backend == "numba" else (16, 600)
    return noise(backend, shape, **counters).double().cpu().numpy()


@pytest.fixture(scope="module", params=BACKENDS)
def normals(request: pytest.FixtureRequest) -> tuple[str, Normals]:
    return request.param, sample(request.param)


def test_moments(normals: tuple[str, Normals]) -> None:
    x = normals[1].ravel()
    # the variances of x, x^2 - 1, x^3 and x^4 - 3 are 1, 2, 15 and 96
    for power, (mean, variance) in enumerate(((0, 1), (1, 2), (0, 15), (3, 96)), start=1):
        assert abs((x**power).mean() - mean) < SIGMAS * np.sqrt(variance / x.size)


def test_distribution(normals: tuple[str, Normals]) -> None:
    """As many in each of equally probable bins: chi-squared."""
    u = special.ndtr(normals[1].ravel())
    bins = min(10_000, u.size // 100)
    counts = np.bincount((u * bins).astype(np.int64), minlength=bins)
    assert 1e-5 < stats.chisquare(counts).pvalue < 1 - 1e-5


def test_tails(normals: tuple[str, Normals]) -> None:
    x = normals[1].ravel()
    for side in (x, -x):
        for threshold in (2.0, 3.0, 4.0, 5.0):
            tail = stats.binomtest(int((side > threshold).sum()), x.size, special.ndtr(-threshold))
            assert tail.pvalue > 1e-5
    # the smallest radius word gives u = 2^-33
    assert np.abs(x).max() <= np.sqrt(66 * np.log(2))


def assert_independent(x: Normals, y: Normals) -> None:
    """Neither correlated, nor in their magnitudes, nor in any of 32 x 32 equally probable cells."""
    n = x.size
    assert abs((x * y).sum()) < SIGMAS * np.sqrt(n)
    assert abs(((x**2 - 1) * (y**2 - 1)).sum()) < SIGMAS * 2 * np.sqrt(n)
    cells = 32 if n > 10**6 else 8
    cell = (special.ndtr(x) * cells).astype(np.int64) * cells + (special.ndtr(y) * cells).astype(np.int64)
    assert stats.chisquare(np.bincount(cell.ravel(), minlength=cells**2)).pvalue > 1e-5


@pytest.mark.parametrize("lag", [1, 2, 3, 4])
def test_latents_are_independent(normals: tuple[str, Normals], lag: int) -> None:
    """Within a quad, where one word's radius serves two normals, and across quads."""
    x = normals[1]
    assert_independent(x[:, :-lag], x[:, lag:])


def test_examples_are_independent(normals: tuple[str, Normals]) -> None:
    assert_independent(normals[1][:-1], normals[1][1:])


@pytest.mark.parametrize("counter", [{"seed": 8}, {"stream": 4}, {"sample_offset": 1}], ids=str)
def test_steps_streams_and_samples_are_independent(normals: tuple[str, Normals], counter: dict[str, int]) -> None:
    """The seed of a step is that of the step before plus 1."""
    backend, x = normals
    assert_independent(x, sample(backend, **counter))
