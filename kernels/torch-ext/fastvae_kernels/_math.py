"""Fast mathematics on bounded ranges: normals from words, exp(x) and exp(x / 2), expm1(x) - x, log(1 + x), 1 / x.

Polynomials (minimax, fitted by Lawson's iteration on Chebyshev points) instead of libdevice's general functions: no
slow path, no local stack, and the same code on NVIDIA, on AMD and in the interpreter. `PRECISE` is for float32 results;
a result that is rounded to bfloat16 or float16 takes shorter polynomials, with errors near 3e-5.
"""

# triton ships no types, and types jitted functions at launch
# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call, import-untyped"

import triton
import triton.language as tl

from ._philox import interleave, philox


@triton.jit
def _radius(word, PRECISE: tl.constexpr):
    """sqrt(-2 ln u), u = (word + 1/2) / 2^32 in (0, 1]."""
    u = tl.fma(word.to(tl.float32), 2.3283064365386963e-10, 1.1641532182693481e-10)
    # u = 2^e (1 + f) with f in [sqrt(1/2) - 1, sqrt(2) - 1): exact near u = 1, where the radius is small
    bits = u.to(tl.int32, bitcast=True)
    exponent = (bits - 0x3F3504F3) & -0x800000  # e * 2^23
    f = (bits - exponent).to(tl.float32, bitcast=True) - 1.0
    # -2 ln(1 + f) = f q(f), relative error 2e-7 or 5e-5
    if PRECISE:
        q = tl.fma(f, 0.20213767886161804, -0.3244515061378479)
        q = tl.fma(f, q, 0.34501662850379944)
        q = tl.fma(f, q, -0.39800330996513367)
        q = tl.fma(f, q, 0.4993981719017029)
        q = tl.fma(f, q, -0.6667011976242065)
        q = tl.fma(f, q, 1.0000072717666626)
        q = tl.fma(f, q, -1.9999998807907104)
    else:
        q = tl.fma(f, -0.35316070914268494, 0.541891872882843)
        q = tl.fma(f, q, -0.6727777123451233)
        q = tl.fma(f, q, 0.9989013075828552)
        q = tl.fma(f, q, -1.9999324083328247)
    # -2 ln(2) / 2^23 per unit of `exponent`
    return tl.sqrt(tl.fma(exponent.to(tl.float32), -1.6525916635146132e-07, f * q))


@triton.jit
def _box_muller(radius_word, angle_word, PRECISE: tl.constexpr):
    """r cos(2 pi v) and r sin(2 pi v) for v = angle_word / 2^32.

    By the half angle, s = sqrt(2) sin(pi v) and c = sqrt(2) cos(pi v): cos(2 pi v) = 1 - s^2, sin(2 pi v) = s c. One
    polynomial each covers the whole circle, v in [-1/2, 1/2), without a reduction to quadrants.
    """
    r = _radius(radius_word, PRECISE)
    if PRECISE:
        # a half turn changes the sign of both results: v in [-1/4, 1/4) keeps s^2 below 1, and its rounding error small
        turned = angle_word << 1
        sign = (angle_word ^ turned) & 0x80000000
        r = (r.to(tl.uint32, bitcast=True) ^ sign).to(tl.float32, bitcast=True)
        v = turned.to(tl.int32, bitcast=True).to(tl.float32) * 1.1641532182693481e-10
        w = v * v
        s = tl.fma(w, -0.8329890370368958, 3.6059067249298096)
        s = tl.fma(w, s, -7.308242321014404)
        s = tl.fma(w, s, 4.442883014678955)
        c = tl.fma(w, -1.8471531867980957, 5.738282203674316)
        c = tl.fma(w, c, -6.978844165802002)
        c = tl.fma(w, c, 1.4142135381698608)
    else:
        v = angle_word.to(tl.int32, bitcast=True).to(tl.float32) * 2.3283064365386963e-10
        w = v * v
        s = tl.fma(w, -0.7896912693977356, 3.597200632095337)
        s = tl.fma(w, s, -7.3077616691589355)
        s = tl.fma(w, s, 4.442878723144531)
        c = tl.fma(w, -1.7283486127853394, 5.715238571166992)
        c = tl.fma(w, c, -6.977642059326172)
        c = tl.fma(w, c, 1.4142041206359863)
    s = v * s
    rs = r * s
    return tl.fma(-s, rs, r), rs * c


@triton.jit
def _normal_quad(quad, example, sample, stream, key_lo, key_hi, PRECISE: tl.constexpr):
    w0, w1, w2, w3 = philox(quad, example, sample, stream, key_lo, key_hi)
    n0, n1 = _box_muller(w0, w1, PRECISE)
    n2, n3 = _box_muller(w2, w3, PRECISE)
    return n0, n1, n2, n3


@triton.jit
def normal(
    first, example, sample, stream, key_lo, key_hi, COLS: tl.constexpr, PAIRS: tl.constexpr, PRECISE: tl.constexpr
):
    """Standard normal noise `[R, COLS]` for the elements from `first` on, a multiple of 8; four per Philox call.

    PAIRS keeps two neighbouring quads in a thread, the eight elements of a 128-bit access to 16-bit values, so that no
    noise has to change threads.
    """
    if PAIRS and COLS >= 8:
        quad = first // 4 + 2 * tl.arange(0, COLS // 8)[None, :]
        a0, a1, a2, a3 = _normal_quad(quad, example, sample, stream, key_lo, key_hi, PRECISE)
        b0, b1, b2, b3 = _normal_quad(quad + 1, example, sample, stream, key_lo, key_hi, PRECISE)
        return interleave(tl.join(a0, b0), tl.join(a1, b1), tl.join(a2, b2), tl.join(a3, b3))
    else:
        quad = first // 4 + tl.arange(0, COLS // 4)[None, :]
        n0, n1, n2, n3 = _normal_quad(quad, example, sample, stream, key_lo, key_hi, PRECISE)
        return interleave(n0, n1, n2, n3)


@triton.jit
def exponentials(x, PRECISE: tl.constexpr):
    """exp(x / 2) and exp(x), by 2^y and 2^(2y) of y = x log2(e) / 2."""
    y = x * 0.7213475108146667
    root = tl.exp2(y)
    if PRECISE:
        # what the product lost, exact in one fma, and what the constant lost matter from |x| = 5 on: a relative error
        # of 3e-7 at x = 11. At x = +-inf it would be NaN
        lost = tl.fma(x, 9.629814e-09, tl.fma(x, 0.7213475108146667, -y))
        lost = tl.where(tl.abs(x) < 256.0, lost, 0.0)
        # the square of the root would double its errors
        return root * tl.fma(lost, 0.6931471824645996, 1.0), tl.exp2(2.0 * y) * tl.fma(lost, 1.3862943649291992, 1.0)
    else:
        return root, root * root


@triton.jit
def exponential(x, PRECISE: tl.constexpr):
    """exp(x), as `exponentials` makes it."""
    y = x * 1.4426950216293335
    if PRECISE:
        lost = tl.fma(x, 1.92596299e-08, tl.fma(x, 1.4426950216293335, -y))
        lost = tl.where(tl.abs(x) < 128.0, lost, 0.0)
        return tl.exp2(y) * tl.fma(lost, 0.6931471824645996, 1.0)
    else:
        return tl.exp2(y)


@triton.jit
def exp_half(x, PRECISE: tl.constexpr):
    """exp(x / 2)."""
    root, _ = exponentials(x, PRECISE)
    return root


@triton.jit
def expm1_terms(x, exp_x, PRECISE: tl.constexpr):
    """(expm1(x), expm1(x) - x >= 0), given exp(x); near 0, where these differences cancel, by a series x^2 p(x)."""
    # relative error 2e-8 up to 0.5, or 1e-7 up to 0.35
    if PRECISE:
        near = tl.abs(x) < 0.5
        p = tl.fma(x, 0.0001987562864087522, 0.0013981997035443783)
        p = tl.fma(x, p, 0.008333452045917511)
        p = tl.fma(x, p, 0.04166579619050026)
        p = tl.fma(x, p, 0.1666666567325592)
    else:
        near = tl.abs(x) < 0.35
        p = tl.fma(x, 0.0013901530764997005, 0.008363733068108559)
        p = tl.fma(x, p, 0.04166686162352562)
        p = tl.fma(x, p, 0.16666573286056519)
    series = x * x * tl.fma(x, p, 0.5)
    expm1_x = tl.where(near, x + series, exp_x - 1.0)
    return expm1_x, tl.where(near, series, exp_x - 1.0 - x)


@triton.jit
def inverse(u, PRECISE: tl.constexpr):
    """1 / u for u >= 1."""
    root = tl.rsqrt(u)
    r = root * root
    if PRECISE:
        # one step of Newton's method takes the square of an approximate root to the last digit of float32
        r += r * (1.0 - u * r)
    return r


@triton.jit
def log1p(q):
    """log(1 + q) for q >= 0, to the last digits of float32, in half of the instructions of `tl.log`."""
    u = 1.0 + q
    # u = 2^n m with m in [sqrt(1/2), sqrt(2)); `exponent` is n * 2^23
    bits = u.to(tl.int32, bitcast=True)
    exponent = (bits - 0x3F3504F3) & -0x800000
    m = (bits - exponent).to(tl.float32, bitcast=True)
    # f = m - 1 + what the sum 1 + q lost: all the digits of a small q
    f = tl.fma(q - (u - 1.0), (0x3F800000 - exponent).to(tl.float32, bitcast=True), m - 1.0)
    # log(1 + f) = f + f^2 p(f), a minimax fit with relative error 3e-8
    p = tl.fma(f, 0.08734843134880066, -0.14307521283626556)
    p = tl.fma(f, p, 0.14917974174022675)
    p = tl.fma(f, p, -0.16570508480072021)
    p = tl.fma(f, p, 0.19962072372436523)
    p = tl.fma(f, p, -0.25001755356788635)
    p = tl.fma(f, p, 0.33333951234817505)
    p = tl.fma(f, p, -0.49999991059303284)
    # ln(2) / 2^23 per unit of `exponent`
    return tl.fma(exponent.to(tl.float32), 8.262958405176417e-08, tl.fma(f * f, p, f))
