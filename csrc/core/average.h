#pragma once

// The maths of averaging class probabilities over samples. F is float and U is uint32_t, or vectors of them.

#include "normal.h"
#include "scalar.h"

namespace swag::core {

constexpr float minus_infinity = -__builtin_inff();
constexpr float exp_underflow = -87.33654f;  // e^x is subnormal below

// e^x for exp_underflow <= x <= 88, NaN for NaN. x = n ln 2 + r with |r| <= ln(2)/2, then a polynomial in r (Cephes' expf).
// Off by at most 1.1 units in the last place (tests/swag_kernels/test_bayes_average.py).
template <class U, class F>
SWAG_HD F exp_normal(F x) {
  const F shifted = muladd(x, F(0x1.715476p+0f), F(0x1.8p23f));  // the low bits of the mantissa are n
  const F n = shifted - F(0x1.8p23f);
  F r = muladd(n, F(-0x1.63p-1f), x);
  r = muladd(n, F(0x1.bd0106p-13f), r);
  F q = F(1.9875691500e-4f);
  q = muladd(q, r, F(1.3981999507e-3f));
  q = muladd(q, r, F(8.3334519073e-3f));
  q = muladd(q, r, F(4.1665795894e-2f));
  q = muladd(q, r, F(1.6666665459e-1f));
  q = muladd(q, r, F(0.5f));
  q = muladd(q * r, r, r) + F(1.0f);
  return q * from_bits((bits(shifted) << 23) + bits(F(1.0f)));
}

// e^x for x <= 88; 0 below exp_underflow.
template <class U, class F>
SWAG_HD F exp(F x) {
  return select(x < F(exp_underflow), F(0.0f), exp_normal<U>(x));
}

// Natural logarithm of a positive normal number, NaN for NaN.
template <class U, class F>
SWAG_HD F log(F x) {
  return select(x == x, log_unit<U>(x), x);
}

// A difference of logits that may be -inf, as a factor of its own exponential, which is 0.
template <class F>
SWAG_HD F bounded(F difference) {
  return max(F(exp_underflow), difference);  // NaN stays NaN
}

// What a set of logits x contributes to the logarithm and the entropy of its softmax.
struct SoftmaxSums {
  float max = minus_infinity;
  float sum = 0;       // Σ e^(x − max)
  float weighted = 0;  // Σ e^(x − max) (x − max)

  SWAG_HD float shift() const { return max == minus_infinity ? 0.0f : max; }  // so that −inf − shift is −inf
};

// Entropy −Σ p log p in nats from the members of SoftmaxSums and log_sum = log(sum); NaN if there was no finite logit.
template <class F>
SWAG_HD F softmax_entropy(F max, F sum, F weighted, F log_sum) {
  const F entropy = (max - max) + (log_sum - weighted / sum);
  return select(entropy < F(1e-30f), F(0.0f), entropy);  // all that bounded() can have added
}

// The sums of the union of two sets: each one is brought to the common maximum.
SWAG_HD SoftmaxSums merge(const SoftmaxSums& a, const SoftmaxSums& b) {
  SoftmaxSums all;
  all.max = a.max > b.max ? a.max : b.max;
  const float da = bounded(a.max - all.shift()), db = bounded(b.max - all.shift());
  const float ea = exp_normal<uint32_t>(da), eb = exp_normal<uint32_t>(db);
  all.sum = muladd(ea, a.sum, eb * b.sum);
  all.weighted = muladd(ea, muladd(da, a.sum, a.weighted), eb * muladd(db, b.sum, b.weighted));
  return all;
}

// Sum of squared deviations of two sets of draws together (Chan, Golub and LeVeque 1979): m2 of both sets added up, the
// difference of their means, and weight = n_a n_b / (n_a + n_b).
template <class F>
SWAG_HD F combine_m2(F m2, F delta, F weight) {
  return muladd(delta * delta, weight, m2);
}

}  // namespace swag::core
