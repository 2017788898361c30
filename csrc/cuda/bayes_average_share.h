#pragma once

// Which classes of a row a thread takes at once, and their logits.

#include <type_traits>

#include "core/average.h"
#include "cuda/device.h"

namespace swag::cuda {

// Neighbours if that makes an aligned load of 16 bytes, else every `threads`-th class, so that those of neighbouring threads
// lie together.
template <class T, bool aligned, int threads>
struct Share {
  static constexpr int size = aligned ? Pack<T>::size : 4;
  static constexpr int step = aligned ? 1 : threads;
  static constexpr int all = size * threads;
  __device__ __forceinline__ static int first(int thread) { return aligned ? thread * size : thread; }

  uint32_t words[4];  // T elements, as many to a word as it holds if aligned, else one

  __device__ __forceinline__ float at(int j) const {
    if constexpr (std::is_same<T, float>::value) {
      return __uint_as_float(words[j]);
    } else {
      const uint32_t word = words[aligned ? j / 2 : j];
      const bool high = aligned && j % 2;
      if constexpr (std::is_same<T, bfloat16>::value)  // in one instruction
        return __uint_as_float(high ? word & 0xffff0000u : word << 16);
      else
        return to_float(T{static_cast<uint16_t>(high ? word >> 16 : word)});
    }
  }
  __device__ __forceinline__ void load(const T* p) {
    if constexpr (aligned) {
      const uint4 raw = *reinterpret_cast<const uint4*>(p);
      words[0] = raw.x, words[1] = raw.y, words[2] = raw.z, words[3] = raw.w;
    } else {
#pragma unroll
      for (int j = 0; j < size; ++j) words[j] = word_of(p[j * step]);
    }
  }
  // Logits from the `left`-th on are -inf.
  __device__ __forceinline__ void load(const T* p, int left) {
    const uint32_t none = word_of(round_to<T>(core::minus_infinity)), both = sizeof(T) == 2 ? none << 16 | none : none;
    if constexpr (aligned) {
      if (left > 0)
        load(p);
      else
        words[0] = words[1] = words[2] = words[3] = both;
    } else {
#pragma unroll
      for (int j = 0; j < size; ++j) words[j] = j * step < left ? word_of(p[j * step]) : none;
    }
  }

  __device__ __forceinline__ static uint32_t word_of(float x) { return __float_as_uint(x); }
  template <class Half>
  __device__ __forceinline__ static uint32_t word_of(Half x) {
    return x.bits;
  }
};

}  // namespace swag::cuda
