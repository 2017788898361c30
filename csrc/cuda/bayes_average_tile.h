#pragma once

// A thread's classes of one tile: their logits and their state.

#include "cuda/bayes_average_share.h"

namespace swag::cuda {

template <class T, bool aligned, int threads>
struct TileClasses {
  using Mine = Share<T, aligned, threads>;
  static constexpr int size = Mine::size;
  int first, classes;

  __device__ __forceinline__ int at(int j) const { return first + j * Mine::step; }
  __device__ __forceinline__ bool held(int j) const { return at(j) < classes; }

  // Of classes that do not exist, others' logits. None is read again.
  __device__ __forceinline__ void load(const T* row, Mine& logits) const {
    if constexpr (aligned) {
      const uint4 raw = __ldcs(reinterpret_cast<const uint4*>(row + min(first, classes - size)));
      logits.words[0] = raw.x, logits.words[1] = raw.y, logits.words[2] = raw.z, logits.words[3] = raw.w;
    } else {
#pragma unroll
      for (int j = 0; j < size; ++j) logits.words[j] = Mine::word_of(row[min(at(j), classes - 1)]);
    }
  }
  __device__ __forceinline__ void load_state(const float* row, float (&values)[size]) const {
    if constexpr (aligned) {
#pragma unroll
      for (int j = 0; j < size; j += 4) {
        const Pack<float> pack = load_pack(row + min(first, classes - size) + j);
#pragma unroll
        for (int k = 0; k < 4; ++k) values[j + k] = pack.elements[k];
      }
    } else {
#pragma unroll
      for (int j = 0; j < size; ++j) values[j] = row[min(at(j), classes - 1)];
    }
  }
  __device__ __forceinline__ void store_state(float* row, const float (&values)[size]) const {
    if constexpr (aligned) {
      if (!held(0)) return;
#pragma unroll
      for (int j = 0; j < size; j += 4)
        store_pack(row + first + j, Pack<float>{{values[j], values[j + 1], values[j + 2], values[j + 3]}});
    } else {
#pragma unroll
      for (int j = 0; j < size; ++j)
        if (held(j)) row[at(j)] = values[j];
    }
  }
};

}  // namespace swag::cuda
