"""Random numbers as a pure function of (seed, stream, example, sample, element): Philox4x32-10.

Source: Salmon et al., Parallel random numbers: as easy as 1, 2, 3, 2011. One call gives the four 32-bit words of a
quad, that is of the elements 4q .. 4q + 3 of one (example, sample):

    counter = (q, example mod 2^32, example div 2^32, sample | stream << 24)        key = (seed mod 2^32, seed div 2^32)

so that a number depends on neither block sizes nor the device that draws it.
"""

# triton ships no types, and types jitted functions at launch
# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call, import-untyped"

import torch
import triton
import triton.language as tl

from ._layout import device_guard

# the streams that kernels draw from by themselves; the others arrive as an argument
STREAM_NOISE = tl.constexpr(0)
STREAM_BINARIZE = tl.constexpr(1)
STREAM_DEQUANTIZE = tl.constexpr(2)


@triton.jit
def load_key(seed_ptr):
    """The two key words of the int64 seed in device memory: a host scalar would be frozen by a CUDA graph."""
    seed = tl.load(seed_ptr)
    return seed.to(tl.uint32), (seed >> 32).to(tl.uint32)


@triton.jit
def philox(quad, example, sample, stream, key_lo, key_hi):
    """Four uint32 words for each quad; `quad` `[1, Q]`, `example` (int64) and `sample` `[R, 1]` broadcast.

    The words of the first rounds that depend on the row alone keep the shape `[R, 1]`, and are computed once per row.
    """
    c0 = tl.cast(quad, tl.uint32)
    c1 = tl.cast(example, tl.uint32)
    c2 = tl.cast(example >> 32, tl.uint32)
    c3 = tl.cast(sample, tl.uint32) | (tl.cast(stream, tl.uint32) << 24)
    k0 = key_lo
    k1 = key_hi
    for _ in tl.static_range(10):
        # the whole 64-bit product is one instruction, its two words are its two registers
        p0 = c0.to(tl.uint64) * 0xD2511F53
        p1 = c2.to(tl.uint64) * 0xCD9E8D57
        c0 = (p1 >> 32).to(tl.uint32) ^ c1 ^ k0
        c2 = (p0 >> 32).to(tl.uint32) ^ c3 ^ k1
        c1 = p1.to(tl.uint32)
        c3 = p0.to(tl.uint32)
        k0 = tl.add(k0, 0x9E3779B9, sanitize_overflow=False)
        k1 = tl.add(k1, 0xBB67AE85, sanitize_overflow=False)
    return c0, c1, c2, c3


@triton.jit
def interleave(a, b, c, d):
    """`[R, 4 Q]` from four `[R, Q]`: element 4q + i is element q of the i-th, so that a thread keeps its quads.

    From four `[R, Q / 2, 2]`, pairs of quads joined, likewise.
    """
    quads = tl.join(tl.join(a, c), tl.join(b, d))
    return tl.reshape(quads, (a.shape[0], 4 * a.numel // a.shape[0]))


@triton.jit
def _unit(word):
    """A uniform number in [0, 1) on the grid of 2^-24 from the upper 24 bits of a word."""
    return (word >> 8).to(tl.int32).to(tl.float32) * 5.9604644775390625e-08


@triton.jit
def uniform(quad, example, sample, stream, key_lo, key_hi):
    """Uniform noise in [0, 1) `[R, 4 Q]`, one word per element; arguments as in `philox`."""
    a, b, c, d = philox(quad, example, sample, stream, key_lo, key_hi)
    return interleave(_unit(a), _unit(b), _unit(c), _unit(d))


@triton.jit
def _philox_words_kernel(
    seed_ptr,  # [1]
    words_ptr,  # [4, num_examples, num_quads]
    num_examples,
    num_quads,
    example_offset: tl.int64,
    sample_offset: tl.int64,
    stream: tl.int64,
    BLOCK_Q: tl.constexpr,
):
    example = (tl.program_id(0) + tl.zeros((1, 1), tl.int64)).to(tl.int64)
    key_lo, key_hi = load_key(seed_ptr)
    for first in range(0, num_quads, BLOCK_Q):
        quad = first + tl.arange(0, BLOCK_Q)[None, :]
        a, b, c, d = philox(quad, example + example_offset, sample_offset, stream, key_lo, key_hi)
        word_ptr = words_ptr + example * num_quads + quad
        plane = num_examples.to(tl.int64) * num_quads
        tl.store(word_ptr, a.to(tl.int64), quad < num_quads)
        tl.store(word_ptr + plane, b.to(tl.int64), quad < num_quads)
        tl.store(word_ptr + 2 * plane, c.to(tl.int64), quad < num_quads)
        tl.store(word_ptr + 3 * plane, d.to(tl.int64), quad < num_quads)


def philox_words(
    seed: torch.Tensor, stream: int, num_examples: int, num_elements: int, example_offset: int, sample_offset: int
) -> torch.Tensor:
    """The raw words, int64 `[4, num_examples, ceil(num_elements / 4)]`: for the tests of the generator."""
    num_quads = triton.cdiv(num_elements, 4)
    words = torch.empty(4, num_examples, num_quads, dtype=torch.int64, device=seed.device)
    if words.numel():
        with device_guard(words):
            _philox_words_kernel[(num_examples,)](
                seed, words, num_examples, num_quads, example_offset, sample_offset, stream, BLOCK_Q=128
            )
    return words
