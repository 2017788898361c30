#pragma once

// K vectors side by side under the names of simd.h. A template of csrc/core that runs on packs has its instructions
// interleaved, so that one vector's latency is hidden behind the others' work.

#include "simd.h"

namespace swag::SWAG_ISA {

template <class V, int K>
struct pack {
  V v[K];
  pack() = default;
  template <class Scalar>
  SWAG_INLINE explicit pack(Scalar x) {
    for (int i = 0; i < K; ++i) v[i] = V(x);
  }
};

template <int K, class Op>
SWAG_INLINE auto each_of(Op op) {
  pack<decltype(op(0)), K> result;
  for (int i = 0; i < K; ++i) result.v[i] = op(i);
  return result;
}

#define SWAG_PACK_UNARY(name)                                 \
  template <class V, int K>                                   \
  SWAG_INLINE auto name(const pack<V, K>& a) {                \
    return each_of<K>([&](int i) { return name(a.v[i]); });   \
  }
#define SWAG_PACK_BINARY(name)                                              \
  template <class V, int K>                                                 \
  SWAG_INLINE auto name(const pack<V, K>& a, const pack<V, K>& b) {         \
    return each_of<K>([&](int i) { return name(a.v[i], b.v[i]); });         \
  }
SWAG_PACK_UNARY(sqrt)
SWAG_PACK_UNARY(bits)
SWAG_PACK_UNARY(from_bits)
SWAG_PACK_UNARY(from_int)
SWAG_PACK_UNARY(from_uint)
SWAG_PACK_BINARY(min)
SWAG_PACK_BINARY(operator+)
SWAG_PACK_BINARY(operator-)
SWAG_PACK_BINARY(operator*)
SWAG_PACK_BINARY(operator^)
SWAG_PACK_BINARY(operator&)
SWAG_PACK_BINARY(operator==)
#undef SWAG_PACK_UNARY
#undef SWAG_PACK_BINARY

template <class V, int K>
SWAG_INLINE auto operator<<(const pack<V, K>& a, int n) {
  return each_of<K>([&](int i) { return a.v[i] << n; });
}
template <class V, int K>
SWAG_INLINE auto shift_right_signed(const pack<V, K>& a, int n) {
  return each_of<K>([&](int i) { return shift_right_signed(a.v[i], n); });
}
template <class V, int K>
SWAG_INLINE auto fma(const pack<V, K>& a, const pack<V, K>& b, const pack<V, K>& c) {
  return each_of<K>([&](int i) { return fma(a.v[i], b.v[i], c.v[i]); });
}
template <class M, class V, int K>
SWAG_INLINE auto select(const pack<M, K>& m, const pack<V, K>& a, const pack<V, K>& b) {
  return each_of<K>([&](int i) { return select(m.v[i], a.v[i], b.v[i]); });
}
template <class V, int K>
SWAG_INLINE pack<V, K> mul(const pack<V, K>& a, const pack<V, K>& b, pack<V, K>& high) {
  return each_of<K>([&](int i) { return mul(a.v[i], b.v[i], high.v[i]); });
}

}  // namespace swag::SWAG_ISA
