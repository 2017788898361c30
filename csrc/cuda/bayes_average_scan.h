#pragma once

// A part of a row scanned by one warp, each logit loaded once and held in registers.

#include "cuda/bayes_average_share.h"
#include "cuda/bayes_average_softmax.h"

namespace swag::cuda {

constexpr int kPacks = 16;  // of 16 bytes, of a lane in a part: all under way at once if aligned
constexpr int kGroup = 32;  // logits that a lane brings to a common maximum

template <class T>
constexpr int kPart = 32 * kPacks * Pack<T>::size;  // classes

// What a lane has seen of its part.
template <class Mine>
struct LanePiece : Piece {
  int best = -1;  // where it has the maximum: the first class of the first such pack

  template <int packs>
  __device__ __forceinline__ void add(int begin, const Mine (&from)[packs]) {
    float x[packs][Mine::size], top = max;
#pragma unroll
    for (int i = 0; i < packs; ++i) {
#pragma unroll
      for (int j = 0; j < Mine::size; ++j) x[i][j] = from[i].at(j);
      float highest = x[i][0];
#pragma unroll
      for (int j = 1; j < Mine::size; ++j) highest = fmaxf(highest, x[i][j]);
      if (highest > top) {
        top = highest;
        best = begin + i * Mine::all;
      }
    }
    raise(top);
    const float shift = this->shift();
#pragma unroll
    for (int i = 0; i < packs; ++i) {
      float pack_sum = 0, pack_weighted = 0;
#pragma unroll
      for (int j = 0; j < Mine::size; ++j) {
        const float difference = x[i][j] - shift, factor = exp_of_difference(difference);
        pack_sum += factor;
        pack_weighted = core::fma(factor, as_factor(difference), pack_weighted);
      }
      sum += pack_sum;
      weighted += pack_weighted;
    }
  }
};

// Classes `first` to last - 1, at most kPart. The lanes that have the maximum read its pack again to find its place.
template <class T, bool aligned>
__device__ __forceinline__ Piece scan_part(const T* row, int first, int last, int lane) {
  using Mine = Share<T, aligned, 32>;
  constexpr int packs = kGroup / Mine::size, step = packs * Mine::all, groups = kPart<T> / step;
  const int own = first + Mine::first(lane), left = last - own;
  LanePiece<Mine> piece;
  if constexpr (aligned) {
    Mine loaded[groups][packs];
    if (first + kPart<T> <= last) {
#pragma unroll
      for (int i = 0; i < kPacks; ++i) loaded[i / packs][i % packs].load(row + own + i * Mine::all);
    } else {
#pragma unroll
      for (int i = 0; i < kPacks; ++i) loaded[i / packs][i % packs].load(row + own + i * Mine::all, left - i * Mine::all);
    }
#pragma unroll
    for (int g = 0; g < groups; ++g)
      if (first + g * step < last) piece.add(g * step, loaded[g]);
  } else {
#pragma unroll 1
    for (int c = 0; c < kPart<T> && first + c < last; c += step) {
      Mine loaded[packs];
      if (first + c + step <= last) {
#pragma unroll
        for (int i = 0; i < packs; ++i) loaded[i].load(row + own + c + i * Mine::all);
      } else {
#pragma unroll
        for (int i = 0; i < packs; ++i) loaded[i].load(row + own + c + i * Mine::all, left - c - i * Mine::all);
      }
      piece.add(c, loaded);
    }
  }
  const float top = max_of_lanes(piece.max, 32);
  if (piece.best >= 0 && piece.max == top) {
#pragma unroll
    for (int j = Mine::size - 1; j >= 0; --j) {
      const int c = piece.best + j * Mine::step;
      if (c < left && to_float(row[own + c]) == top) piece.first = static_cast<uint32_t>(own + c);
    }
  }
  return piece_of_lanes(piece, top, 32);
}

}  // namespace swag::cuda
