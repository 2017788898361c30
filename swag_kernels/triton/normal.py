"""Philox words to standard normals inside a kernel: csrc/core/normal.h in Triton, with the same bits on a GPU.

Only correctly rounded operations occur, and a product is added to something through ``fma`` alone. Kernels that call
this are compiled with ``enable_fp_fusion=False``, so that no configuration fuses what another does not.
"""

import triton
import triton.language as tl


@triton.jit
def _uniform(x):
    """u = min((float32(x) + 0.5) 2^-32, 1 - 2^-24), in (0, 1)."""
    return tl.minimum((x.to(tl.float32) + 0.5) * 2.3283064365386963e-10, 0.9999999403953552)


@triton.jit
def _log_unit(u):
    """Natural logarithm of u in (0, 1): u = m 2^e with m in [sqrt(1/2), sqrt(2)) and ln m = f + f^2 Q(f), f = m - 1."""
    bits = u.to(tl.int32, bitcast=True)
    exponent = (bits - 0x3F3504F3) >> 23
    f = (bits - (exponent << 23)).to(tl.float32, bitcast=True) - 1.0
    q = tl.full(u.shape, 0.08738832175731659, tl.float32)
    q = tl.fma(q, f, -0.14307741820812225)
    q = tl.fma(q, f, 0.14916352927684784)
    q = tl.fma(q, f, -0.16570311784744263)
    q = tl.fma(q, f, 0.19962239265441895)
    q = tl.fma(q, f, -0.25001776218414307)
    q = tl.fma(q, f, 0.3333394527435303)
    q = tl.fma(q, f, -0.49999991059303284)
    return tl.fma(exponent.to(tl.float32), 0.6931471824645996, tl.fma(f * f, q, f))


@triton.jit
def _cos_sin_turn(u):
    """cos and sin of 2 pi u for u in (0, 1): u = k/4 + t with |t| <= 1/8, then polynomials in t^2."""
    shifted = tl.fma(u, 4.0, 12582912.0)  # the low bits of the mantissa are k, rounded to nearest
    k = shifted.to(tl.int32, bitcast=True)
    t = tl.fma(shifted - 12582912.0, -0.25, u)
    t2 = t * t

    s = tl.full(u.shape, -75.4273910522461, tl.float32)
    s = tl.fma(s, t2, 81.59342956542969)
    s = tl.fma(s, t2, -41.341670989990234)
    s = tl.fma(s, t2, -1.7484555314695172e-07)  # 2 pi in two parts
    s = tl.fma(s, t, t * 6.2831854820251465)

    c = tl.full(u.shape, 58.62105941772461, tl.float32)
    c = tl.fma(c, t2, -85.42452239990234)
    c = tl.fma(c, t2, 64.93914794921875)
    c = tl.fma(c, t2, -19.739208221435547)
    c = tl.fma(c, t2, 1.0)

    even = (k & 1) == 0
    cosine = tl.where(even, c, s).to(tl.int32, bitcast=True) ^ (((k + 1) & 2) << 30)
    sine = tl.where(even, s, c).to(tl.int32, bitcast=True) ^ ((k & 2) << 30)
    return cosine.to(tl.float32, bitcast=True), sine.to(tl.float32, bitcast=True)


@triton.jit
def box_muller(x0, x1):
    """sqrt(-2 ln u0) times the cosine and the sine of 2 pi u1 (Box and Muller 1958)."""
    radius = tl.sqrt_rn(_log_unit(_uniform(x0)) * -2.0)
    cosine, sine = _cos_sin_turn(_uniform(x1))
    return radius * cosine, radius * sine


@triton.jit
def normals(quad, sample, tensor, stream, seed_low, seed_high):
    """The four normals of the counter (quad, sample, tensor, stream), 32-bit words, under the key of two words."""
    seed = (seed_high.to(tl.uint32, bitcast=True).to(tl.uint64) << 32) | seed_low.to(tl.uint32, bitcast=True).to(
        tl.uint64
    )
    x0, x1, x2, x3 = tl.philox(seed, quad, sample, tensor, stream)
    n0, n1 = box_muller(x0, x1)
    n2, n3 = box_muller(x2, x3)
    return n0, n1, n2, n3
