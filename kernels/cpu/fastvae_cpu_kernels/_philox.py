"""Noise as a pure function of (seed, stream, example, sample, element): Philox4x32-10, word for word the reference's.

The counter is (element / 4, example low, example high, sample | stream << 24), the key is the seed; the four words
serve elements 4 q to 4 q + 3. Counters of several rows are drawn together: a row of 20 latents has only five of them.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from ._jit import kernel, loop, routine, term
from ._math import HALF, ONE, normal_pair
from ._pointers import Floats, Words, f32_scratch, i64_at, shifted, u32_scratch

__all__ = ["MAX_NORMALS", "STRIDE", "draw_rows", "draw_uniforms", "philox_words", "slots_per_draw", "to_words"]

# counters drawn at a time, and their normals, which stay in the first-level cache. With twice as many 4096 x 64 took
# 4 % less, but tensors that no cache holds took 20 to 45 % more
MAX_COUNTERS = 128
MAX_NORMALS = 4 * MAX_COUNTERS
# all loops run in whole vectors, whatever is drawn beyond the count: the rest of a row of 5 counters would cost more
LANES = 16
# from one word of a counter to the next; `fill_counters` runs over the last of them
STRIDE = MAX_COUNTERS + LANES
WORDS = 4 * STRIDE

M0, M1 = np.uint64(0xD2511F53), np.uint64(0xCD9E8D57)
W0, W1 = np.uint64(0x9E3779B9), np.uint64(0xBB67AE85)
LOW, HIGH = np.uint64(0xFFFFFFFF), np.uint64(32)
TWO_TO_MINUS_24 = np.float32(2.0**-24)


@term
def _round(c: Any, k0: Any, k1: Any) -> Any:
    """Of words that are the lower halves of uint64, as the product of two of these is one vector instruction."""
    p0, p1 = (c[0] & LOW) * M0, (c[2] & LOW) * M1
    return (p1 >> HIGH) ^ c[1] ^ k0, p1, (p0 >> HIGH) ^ c[3] ^ k1, p0


@term
def _whole(count: int) -> int:
    """`count`, rounded up to whole vectors."""
    return (count + (LANES - 1)) // LANES * LANES


@loop
def fill_counters(
    counters: Words, count: int, quads: int, first_quad: int, example: int, sample: int, stream: int
) -> None:
    """Writes `count` counters, of rows that are examples one after the other, `quads` of each; and up to 15 more.

    One loop for all rows: a loop for each would cost more than the counters of a short one.
    """
    low, high = np.uint32(example), np.uint32(example >> 32)
    last = np.uint32(sample | (stream << 24))
    width, part = np.int32(quads), ONE / np.float32(quads)
    for t in range(_whole(count)):
        # t // quads: at least 1 / 256 away from an integer
        row = np.int32((np.float32(np.int32(t)) + HALF) * part)
        counters[t] = np.uint32(np.int32(first_quad) + np.int32(np.int32(t) - np.int32(row * width)))
        counters[STRIDE + t] = np.uint32(low + np.uint32(row))
        counters[2 * STRIDE + t] = high
        counters[3 * STRIDE + t] = last


@term
def _load(counters: Words, t: int) -> Any:
    return (
        np.uint64(counters[t]),
        np.uint64(counters[STRIDE + t]),
        np.uint64(counters[2 * STRIDE + t]),
        np.uint64(counters[3 * STRIDE + t]),
    )


@term
def _store(c: Any, counters: Words, t: int) -> None:
    counters[t] = np.uint32(c[0])
    counters[STRIDE + t] = np.uint32(c[1])
    counters[2 * STRIDE + t] = np.uint32(c[2])
    counters[3 * STRIDE + t] = np.uint32(c[3])


@term
def _advance(state: Any) -> Any:
    """One round of four counters, and the next keys: each round waits for the one before, so others go in between."""
    a, b, c, d, k0, k1 = state
    a, b, c, d = _round(a, k0, k1), _round(b, k0, k1), _round(c, k0, k1), _round(d, k0, k1)
    return a, b, c, d, (k0 + W0) & LOW, (k1 + W1) & LOW


@loop
def _ten_rounds(a: Words, b: Words, c: Words, d: Words, count: int, seed: int) -> None:
    """Turns the counters at four places, `count` at each, into words, in place."""
    for t in range(count):
        k0, k1 = np.uint64(seed) & LOW, np.uint64(seed) >> HIGH
        state = _load(a, t), _load(b, t), _load(c, t), _load(d, t), k0, k1
        # written out, as LLVM would not unroll so long a loop, and not vectorise around it
        state = _advance(_advance(_advance(_advance(_advance(state)))))
        state = _advance(_advance(_advance(_advance(_advance(state)))))
        _store(state[0], a, t)
        _store(state[1], b, t)
        _store(state[2], c, t)
        _store(state[3], d, t)


@term
def to_words(counters: Words, count: int, seed: int) -> None:
    """Turns `count` counters into words, in place."""
    part = _whole((count + 3) // 4)
    _ten_rounds(counters, shifted(counters, part), shifted(counters, 2 * part), shifted(counters, 3 * part), part, seed)


@loop
def _draw_normals(words: Words, count: int, eps: Floats) -> None:
    """Standard normals from the words of `count` counters: `eps[4 t : 4 t + 4]` from counter t."""
    # normals first, then their order: in one loop the shuffles cost three times as much
    normals = f32_scratch(WORDS)
    whole = _whole(count)
    for t in range(whole):
        normals[t], normals[STRIDE + t] = normal_pair(words[t], words[STRIDE + t])
        normals[2 * STRIDE + t], normals[3 * STRIDE + t] = normal_pair(words[2 * STRIDE + t], words[3 * STRIDE + t])
    for t in range(whole):
        for j in range(4):
            eps[4 * t + j] = normals[j * STRIDE + t]


@term
def slots_per_draw(count: int) -> int:
    """How many rows of `count` elements `draw_rows` can draw at a time."""
    return max(1, MAX_COUNTERS // max(1, (count + 3) // 4))


@routine
def draw_rows(
    eps: Floats,
    first_slot: int,
    slots: int,
    samples: int,
    K: int,
    B: int,
    first: int,
    count: int,
    seed: int,
    stream: int,
    example_offset: int,
    sample_offset: int,
    samples_are_examples: int,
) -> None:
    """Normals of `slots` rows, elements `first` (a multiple of 4) onwards, `4 ceil(count / 4)` apart in `eps`.

    Slot t is draw t % samples of row t // samples; row r is example r % B of sample r // B. Further draws are further
    samples of the same example or, where the rows have no example dimension, further examples.
    """
    words = u32_scratch(WORDS)
    quads = (count + 3) // 4
    row, draw = first_slot // samples, first_slot % samples
    k, b = row // B, row % B
    if samples == 1 and b + slots <= B and (b + example_offset) % (1 << 32) + slots <= 1 << 32:
        fill_counters(words, slots * quads, quads, first // 4, b + example_offset, k + sample_offset, stream)
    else:
        for i in range(slots):
            example, sample = b + example_offset, draw * K + k + sample_offset
            if samples_are_examples:
                example, sample = draw + example_offset, sample_offset
            fill_counters(shifted(words, i * quads), quads, quads, first // 4, example, sample, stream)
            draw += 1
            if draw == samples:
                draw, b = 0, b + 1
            if b == B:
                b, k = 0, k + 1
    to_words(words, slots * quads, seed)
    _draw_normals(words, slots * quads, eps)


@routine
def draw_uniforms(u: Floats, first: int, count: int, seed: int, example: int, stream: int) -> None:
    """Uniforms in [0, 1) on the grid of 2^-24, for elements `first` (a multiple of 4) onwards of an example."""
    words = u32_scratch(WORDS)
    quads = (count + 3) // 4
    fill_counters(words, quads, quads, first // 4, example, 0, stream)
    to_words(words, quads, seed)
    for t in range(_whole(quads)):
        for j in range(4):
            word = words[j * STRIDE + t]
            u[4 * t + j] = np.float32(np.int32(np.uint32(word >> np.uint32(8)))) * TWO_TO_MINUS_24


@kernel
def _write_words(
    out: int,
    seed_address: int,
    stream: int,
    num_examples: int,
    quads: int,
    example_offset: int,
    sample_offset: int,
) -> None:
    counters = u32_scratch(WORDS)
    words, seed = i64_at(out), i64_at(seed_address)[0]
    for example in range(num_examples):
        for first_quad in range(0, quads, MAX_COUNTERS):
            count = min(MAX_COUNTERS, quads - first_quad)
            fill_counters(counters, count, count, first_quad, example + example_offset, sample_offset, stream)
            to_words(counters, count, seed)
            for j in range(4):
                for t in range(count):
                    words[(j * num_examples + example) * quads + first_quad + t] = np.int64(counters[j * STRIDE + t])


def philox_words(
    seed: Tensor, stream: int, num_examples: int, num_elements: int, example_offset: int, sample_offset: int
) -> Tensor:
    """The words behind the noise of one sample, int64 `[4, num_examples, ceil(num_elements / 4)]`; for tests."""
    quads = (num_elements + 3) // 4
    words = torch.empty(4, num_examples, quads, dtype=torch.int64)
    _write_words(words.data_ptr(), seed.data_ptr(), stream, num_examples, quads, example_offset, sample_offset)
    return words
