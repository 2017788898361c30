#pragma once

// Standard normals from random words by Box and Muller (1958).
//
// F is float and U is uint32_t, or vectors of them. Only correctly rounded operations occur, and a product is added to
// something through fma alone, so that every compiler and every device gives the same bits. Against Box-Muller in float64 on
// the same uniforms a normal is off by at most 3.4 units in the last place (largest of 2.4e8, corners included).

#include "scalar.h"

namespace swag::core {

// u = min((float32(x) + 0.5) 2^-32, 1 - 2^-24), in (0, 1).
template <class F, class U>
SWAG_HD F uniform(U x) {
  return min((from_uint(x) + F(0.5f)) * F(0x1p-32f), F(0x1.fffffep-1f));
}

// Natural logarithm of u in (0, 1): u = m 2^e with m in [sqrt(1/2), sqrt(2)) and ln m = f + f^2 Q(f), f = m - 1.
// Relative error of Q below 2^-24.9, so the result keeps its accuracy as u tends to 1.
template <class U, class F>
SWAG_HD F log_unit(F u) {
  const U exponent = shift_right_signed(bits(u) - U(0x3f3504f3u), 23);
  const F f = from_bits(bits(u) - (exponent << 23)) - F(1.0f);
  const F e = from_int(exponent);
  F q = F(0x1.65f14cp-4f);
  q = fma(q, f, F(-0x1.2505c6p-3f));
  q = fma(q, f, F(0x1.317ca6p-3f));
  q = fma(q, f, F(-0x1.535c28p-3f));
  q = fma(q, f, F(0x1.98d3ap-3f));
  q = fma(q, f, F(-0x1.0004a8p-2f));
  q = fma(q, f, F(0x1.5556fp-2f));
  q = fma(q, f, F(-0x1.fffffap-2f));
  return fma(e, F(0x1.62e430p-1f), fma(f * f, q, f));
}

// cos and sin of 2 pi u for u in (0, 1): u = k/4 + t with |t| <= 1/8, which is exact, then polynomials in t^2.
template <class U, class F>
SWAG_HD void cos_sin_turn(F u, F& cosine, F& sine) {
  const F shifted = fma(u, F(4.0f), F(0x1.8p23f));  // the low bits of the mantissa are k, rounded to nearest
  const U k = bits(shifted);
  const F t = fma(shifted - F(0x1.8p23f), F(-0.25f), u);
  const F t2 = t * t;

  F s = F(-0x1.2db5a6p+6f);
  s = fma(s, t2, F(0x1.465facp+6f));
  s = fma(s, t2, F(-0x1.4abbbep+5f));
  s = fma(s, t2, F(-0x1.777a5cp-23f));  // 2 pi in two parts
  s = fma(s, t, t * F(0x1.921fb6p+2f));

  F c = F(0x1.d4f7eep+5f);
  c = fma(c, t2, F(-0x1.55b2b6p+6f));
  c = fma(c, t2, F(0x1.03c1bp+6f));
  c = fma(c, t2, F(-0x1.3bd3ccp+4f));
  c = fma(c, t2, F(1.0f));

  const auto even = (k & U(1u)) == U(0u);
  cosine = from_bits(bits(select(even, c, s)) ^ (((k + U(1u)) & U(2u)) << 30));
  sine = from_bits(bits(select(even, s, c)) ^ ((k & U(2u)) << 30));
}

// n0 = sqrt(-2 ln u0) cos(2 pi u1) and n1 with the sine.
template <class F, class U>
SWAG_HD void box_muller(U x0, U x1, F& n0, F& n1) {
  const F radius = sqrt(log_unit<U>(uniform<F>(x0)) * F(-2.0f));
  F cosine, sine;
  cos_sin_turn<U>(uniform<F>(x1), cosine, sine);
  n0 = radius * cosine;
  n1 = radius * sine;
}

}  // namespace swag::core
