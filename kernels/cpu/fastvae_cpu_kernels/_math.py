"""Elementary functions that LLVM vectorises: polynomials and exponent bits, no branches, no calls.

Errors are below 1.6 ulp of float32 (`expm1_minus`: of its terms). The coefficients are minimax in the relative error of
the function, fitted in float64. NaN goes in and comes out; infinities give the limits.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from ._jit import term
from ._pointers import bits_of, float_of

__all__ = [
    "HALF",
    "ONE",
    "TWO",
    "ZERO",
    "exp",
    "exp_and_square",
    "exp_of_negative",
    "expm1",
    "expm1_minus",
    "log1p",
    "log_unit",
    "normal_pair",
    "tanh",
]

ZERO, HALF, ONE, TWO = (np.float32(value) for value in (0.0, 0.5, 1.0, 2.0))

# exp(r) = 1 + r + r^2 (E0 + E1 r + ...) for |r| <= ln(2) / 2
E0, E1, E2, E3, E4 = (np.float32(c) for c in (0.5, 0.16666578, 0.041666854, 0.0083631445, 0.0013901286))
# log(1 + f) = f - f^2 / 2 + f^3 (G0 + G1 f + ...) for sqrt(1/2) <= 1 + f <= sqrt(2)
G0, G1, G2, G3, G4, G5, G6, G7 = (
    np.float32(c)
    for c in (0.33333331, -0.25000304, 0.20001201, -0.16641581, 0.14209945, -0.12989278, 0.12655695, -0.079742089)
)
# sin(a) = a + a^3 (S0 + ...), cos(a) = 1 - a^2 / 2 + a^4 (C0 + ...) for |a| <= pi / 4 (Cephes)
S0, S1, S2 = (np.float32(c) for c in (-1.6666654611e-1, 8.3321608736e-3, -1.9515295891e-4))
C0, C1, C2 = (np.float32(c) for c in (4.166664568298827e-2, -1.388731625493765e-3, 2.443315711809948e-5))

LOG2_E = np.float32(1.4426950408889634)
# ln 2 in two parts: n * LN2_HIGH is exact for |n| < 2^9
LN2_HIGH, LN2_LOW = np.float32(0.693145751953125), np.float32(1.42860682030941723212e-6)
# adding 1.5 * 2^23 rounds to an integer, which is in the low bits of the sum; unlike a conversion it is defined for NaN
ROUND_TO_BITS = np.float32(12582912.0)
EXP_MIN, EXP_MAX = np.float32(-87.33), np.float32(89.0)
# there n is -127, and no bits are left for 2^n
UNDERFLOW = np.float32(-88.0)
# beyond, tanh is 1
TANH_MAX = np.float32(10.0)
SQRT_HALF_BITS, SIGNIFICAND_BITS = np.int32(0x3F3504F3), np.int32(0x007FFFFF)
TWO_TO_MINUS_32, TWO_TO_MINUS_33 = np.float32(2.0**-32), np.float32(2.0**-33)
# a word of which two bits, the quadrant, were shifted out
QUADRANT_ANGLE = np.float32(2.0 * math.pi * 2.0**-34)


@term
def _divided(x: Any) -> Any:
    """(n, r) with x = n ln 2 + r; n as int32, in the low bits."""
    rounded = x * LOG2_E + ROUND_TO_BITS
    n = rounded - ROUND_TO_BITS
    r = x - n * LN2_HIGH
    return bits_of(rounded), r - n * LN2_LOW


@term
def _reduced(x: Any) -> Any:
    """(2^(n - 1), r) with x = n ln 2 + r, for x clamped to where exp(x) runs from 0 to infinity.

    Half the power, as 2^128 would overflow too early; for n = -126 it is 0.
    """
    x = EXP_MAX if x > EXP_MAX else x
    n, r = _divided(EXP_MIN if x < EXP_MIN else x)
    return float_of(np.int32((n + np.int32(126)) << np.int32(23))), r


@term
def _beyond_linear(r: Any) -> Any:
    """exp(r) - 1 - r."""
    return r * r * (E0 + r * (E1 + r * (E2 + r * (E3 + r * E4))))


@term
def exp(x: Any) -> Any:
    """exp(x); below 2^-126 it is 0."""
    half, r = _reduced(x)
    return (TWO + TWO * (r + _beyond_linear(r))) * half


@term
def exp_of_negative(x: Any) -> Any:
    """exp(x) for x <= 0, in fewer steps; below 2^-126.5 it is 0."""
    n, r = _divided(UNDERFLOW if x < UNDERFLOW else x)
    return (ONE + (r + _beyond_linear(r))) * float_of(np.int32((n + np.int32(127)) << np.int32(23)))


@term
def expm1(x: Any) -> Any:
    """exp(x) - 1."""
    half, r = _reduced(x)
    return TWO * (half * (r + _beyond_linear(r)) + (half - HALF))


@term
def expm1_minus(x: Any) -> Any:
    """expm1(x) - x. Where x is small nothing cancels: half = 1/2, r = x, and the bracket is 0."""
    half, r = _reduced(x)
    x = EXP_MAX if x > EXP_MAX else x
    return TWO * (half * _beyond_linear(r) + ((half - HALF) + (half * r - HALF * x)))


@term
def exp_and_square(x: Any) -> Any:
    """(exp(x), expm1(2 x), expm1(2 x) - 2 x) of one exponential: expm1(2 x) = h^2 + 2 h, with h = expm1(x)."""
    half, r = _reduced(x)
    beyond_linear = _beyond_linear(r)
    x = EXP_MAX if x > EXP_MAX else x
    h = TWO * (half * (r + beyond_linear) + (half - HALF))
    h_minus = TWO * (half * beyond_linear + ((half - HALF) + (half * r - HALF * x)))
    return (TWO + TWO * (r + beyond_linear)) * half, h * (h + TWO), h * h + TWO * h_minus


@term
def tanh(x: Any) -> Any:
    """tanh(x)."""
    a = abs(x)
    twice = expm1(TWO * (TANH_MAX if a > TANH_MAX else a))
    y = twice / (twice + TWO)
    return y if x >= ZERO else -y


@term
def _log_parts(u: Any) -> Any:
    """(n, f) with u = 2^n (1 + f) and sqrt(1/2) <= 1 + f <= sqrt(2), for normal u."""
    bits = np.int32(bits_of(u) - SQRT_HALF_BITS)
    exponent = np.int32(bits >> np.int32(23))
    return np.float32(exponent), float_of(np.int32((bits & SIGNIFICAND_BITS) + SQRT_HALF_BITS)) - ONE


@term
def _log_from(n: Any, f: Any) -> Any:
    """log(2^n (1 + f))."""
    # in halves: one chain of eight dependent additions would be bound by latency
    s = f * f
    low = (G0 + G1 * f) + s * (G2 + G3 * f)
    high = (G4 + G5 * f) + s * (G6 + G7 * f)
    cubic = f * (low + (s * s) * high)
    return n * LN2_HIGH + (f + (s * (cubic - HALF) + n * LN2_LOW))


@term
def log_unit(u: Any) -> Any:
    """log(u) for normal u in (0, 1]."""
    n, f = _log_parts(u)
    return _log_from(n, f)


@term
def log1p(q: Any) -> Any:
    """log(1 + q) for q in [0, 2^100]."""
    u = ONE + q
    n, f = _log_parts(u)
    # what the sum has lost: all the digits of a small q
    return _log_from(n, f + (q - (u - ONE)) * float_of(bits_of(ONE) - (np.int32(n) << np.int32(23))))


@term
def normal_pair(radius_word: Any, angle_word: Any) -> Any:
    """Two standard normals from two uint32 words, by Box-Muller; the angle is reduced by its bits."""
    u = np.float32(radius_word) * TWO_TO_MINUS_32 + TWO_TO_MINUS_33
    radius = np.float32(math.sqrt(-TWO * log_unit(u)))
    quadrant = np.uint32(np.uint32(angle_word + np.uint32(1 << 29)) >> np.uint32(30))
    a = np.float32(np.int32(np.uint32(angle_word << np.uint32(2)))) * QUADRANT_ANGLE
    s = a * a
    sine = a + a * s * (S0 + s * (S1 + s * S2))
    cosine = (ONE - HALF * s) + s * s * (C0 + s * (C1 + s * C2))
    odd = np.uint32(quadrant & np.uint32(1)) != np.uint32(0)
    along = sine if odd else cosine
    across = cosine if odd else sine
    # cos is negative in quadrants 1 and 2, sin in 2 and 3
    along_sign = np.int32(np.uint32(np.uint32(quadrant + np.uint32(1)) & np.uint32(2)) << np.uint32(30))
    across_sign = np.int32(np.uint32(quadrant & np.uint32(2)) << np.uint32(30))
    return radius * float_of(bits_of(along) ^ along_sign), radius * float_of(bits_of(across) ^ across_sign)
