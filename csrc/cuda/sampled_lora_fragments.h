#pragma once

// What a warp does for sampled_lora on tensor cores: multiplies a slice of x and A, brings columns of B to shared memory,
// makes columns of y. And loads and stores of any dtype.

#include "core/scalar.h"
#include "cuda/sampled_lora.h"

namespace swag::cuda {

// A lane's place in the fragments of mma().
struct Lane {
  int lane = threadIdx.x % 32;
  int row = lane / 4;   // and row + 8
  int quad = lane % 4;  // among the lanes of a row
};

// Elements k to k + 7 of a row of n, zeros where it ends or is not valid. kAligned: 16 bytes at once.
template <class T, bool kAligned>
__device__ __forceinline__ uint4 load_eight(const T* row, int k, int n, bool valid) {
  if constexpr (kAligned) {
    return valid && k < n ? *reinterpret_cast<const uint4*>(row + k) : make_uint4(0, 0, 0, 0);
  } else {
    uint32_t words[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const uint32_t low = valid && k + 2 * i < n ? row[k + 2 * i].bits : 0;
      const uint32_t high = valid && k + 2 * i + 1 < n ? row[k + 2 * i + 1].bits : 0;
      words[i] = low | high << 16;
    }
    return make_uint4(words[0], words[1], words[2], words[3]);
  }
}

// h += x A^T over elements begin to end - 1 of kTiles tiles of rows, for a warp: h[t][c] is the fragment of ranks 8 c to
// 8 c + 7. A lane multiplies eight neighbours where mma() has pairs: another order of the sum, the same on both sides.
// kAhead steps are loaded before the first is multiplied.
template <class T, int kEights, bool kAligned, int kTiles, int kAhead>
__device__ __forceinline__ void shrink(const T* x, const T* A, const LoraParams& p, int rows, int begin, int end,
                                       float (&h)[kTiles][kEights][4]) {
  const Lane at;
  const T* const weights = A + static_cast<int64_t>(at.row) * p.in;
  for (int k = begin; k < end; k += kAhead * kStep) {
    uint4 values[kAhead][2 * kTiles], a[kAhead][kEights];
#pragma unroll
    for (int i = 0; i < kAhead; ++i) {
      const int o = k + i * kStep + 8 * at.quad;
#pragma unroll
      for (int c = 0; c < kEights; ++c)
        a[i][c] = load_eight<T, kAligned>(weights + static_cast<int64_t>(8 * c) * p.in, o, end, 8 * c + at.row < p.rank);
#pragma unroll
      for (int t = 0; t < 2 * kTiles; ++t) {
        const int row = 8 * t + at.row;
        values[i][t] = load_eight<T, kAligned>(x + static_cast<int64_t>(row) * p.in, o, end, row < rows);
      }
    }
#pragma unroll
    for (int i = 0; i < kAhead; ++i)
#pragma unroll
      for (int t = 0; t < kTiles; ++t) {
        const uint4 upper = values[i][2 * t], lower = values[i][2 * t + 1];
#pragma unroll
        for (int c = 0; c < kEights; ++c) {
          mma<T>(h[t][c], {upper.x, lower.x, upper.y, lower.y}, {a[i][c].x, a[i][c].y});
          mma<T>(h[t][c], {upper.z, lower.z, upper.w, lower.w}, {a[i][c].z, a[i][c].w});
        }
      }
  }
}

// Where 16 bytes, the eight ranks 8 c to 8 c + 7 of column n, lie in shared memory among those of a group: such that the
// eight rows of a matrix of load_matrices(), which are columns 8 i + 2 j and 8 i + 2 j + 1, lie in different banks.
template <int kEights>
__device__ __forceinline__ int place(int n, int c) {
  const int i = n / 8 % 4;
  const int swap = kEights == 1 ? i << 1 : kEights == 2 ? (i & 1) | (i >> 1) << 2 : kEights == 4 ? i : i << 1 | (n & 1);
  return (n * kEights + c) ^ swap;
}

// Starts columns column to column + kGroup - 1 of B [out, rank] on their way to shared memory, by a warp.
template <class T, int kEights, bool kAligned>
__device__ __forceinline__ void fetch_group(uint4* shared, const T* B, const LoraParams& p, int column) {
#pragma unroll
  for (int i = threadIdx.x % 32; i < kGroup * kEights; i += 32) {
    const int n = i / kEights, c = i % kEights;
    const bool valid = column + n < p.out;
    const T* const from = B + static_cast<int64_t>(column + n) * p.rank;
    uint4* const to = shared + place<kEights>(n, c);
    if constexpr (kAligned) {
      const bool held = valid && 8 * c < p.rank;
      copy_async(to, held ? from + 8 * c : B, held);
    } else {
      *to = load_eight<T, false>(from, 8 * c, p.rank, valid);
    }
  }
}

template <class T, bool kAligned>
__device__ __forceinline__ void load_columns(const T* p, int held, float (&values)[8]) {
  if constexpr (kAligned) {
#pragma unroll
    for (int i = 0; i < 8; i += Pack<T>::size) {
      const Pack<T> pack = load_pack(p + i);
#pragma unroll
      for (int j = 0; j < Pack<T>::size; ++j) values[i + j] = to_float(pack.elements[j]);
    }
  } else {
#pragma unroll
    for (int i = 0; i < 8; ++i) values[i] = i < held ? to_float(p[i]) : 0.0f;
  }
}

template <class T, bool kAligned>
__device__ __forceinline__ void store_columns(T* p, int held, const float (&values)[8]) {
  if constexpr (!kAligned) {
#pragma unroll
    for (int i = 0; i < 8; ++i)
      if (i < held) p[i] = round_to<T>(values[i]);
  } else if constexpr (sizeof(T) == 4) {  // by intrinsics, as plain stores of 16 bytes were seen to be split
    __stcg(reinterpret_cast<float4*>(p), make_float4(values[0], values[1], values[2], values[3]));
    __stcg(reinterpret_cast<float4*>(p) + 1, make_float4(values[4], values[5], values[6], values[7]));
  } else {
    __stcg(reinterpret_cast<uint4*>(p), make_uint4(pack2<T>(values[0], values[1]), pack2<T>(values[2], values[3]),
                                                   pack2<T>(values[4], values[5]), pack2<T>(values[6], values[7])));
  }
}

template <class Body>
__device__ __forceinline__ void with_dtype(int dtype, const Body& body) {
  if (dtype == SWAG_BFLOAT16)
    body(bfloat16{});
  else if (dtype == SWAG_FLOAT16)
    body(float16{});
  else
    body(float{});
}

// A lane's part of a tile of rows and a group of columns of y: eight neighbours of two rows.
struct Part {
  float values[2][8];
};

// Where that part lies in a [rows, out] matrix, and how many of its rows and columns there are.
struct Place {
  int64_t offset;
  int rows, columns;

  __device__ __forceinline__ Place(const LoraParams& p, int tile, int tile_rows, int column) {
    const Lane at;
    const int row = tile * kRows + at.row, first = column + 8 * at.quad;
    offset = static_cast<int64_t>(row) * p.out + first;
    rows = row >= tile_rows ? 0 : row + 8 >= tile_rows ? 1 : 2;
    columns = p.out - first;
  }
};

// base is loaded a group ahead of its use, which the compiler cannot arrange: y may be base.
template <bool kAligned>
__device__ __forceinline__ Part load_base(const LoraParams& p, int64_t origin, const Place& place) {
  Part part;
  with_dtype(p.base_dtype, [&](auto zero) {
    using V = decltype(zero);
    const V* const from = static_cast<const V*>(p.base) + origin + place.offset;
#pragma unroll
    for (int i = 0; i < 2; ++i)
      if (i < place.rows && place.columns > 0)
        load_columns<V, kAligned>(from + 8 * i * static_cast<int64_t>(p.out), place.columns, part.values[i]);
  });
  return part;
}

template <bool kAligned>
__device__ __forceinline__ void store_y(const LoraParams& p, int64_t origin, const Place& place, const Part& part) {
  with_dtype(p.base_dtype, [&](auto zero) {
    using V = decltype(zero);
    V* const to = static_cast<V*>(p.y) + origin + place.offset;
#pragma unroll
    for (int i = 0; i < 2; ++i)
      if (i < place.rows && place.columns > 0)
        store_columns<V, kAligned>(to + 8 * i * static_cast<int64_t>(p.out), place.columns, part.values[i]);
  });
}

// The right operands of mma() for the columns of a group: columns 8 (n / 2) + 2 j + n % 2 are the columns n of product j, so
// that a lane's two columns of all four products are neighbours in y.
template <int kEights>
struct Columns {
  uint32_t words[kEights][4];

  __device__ __forceinline__ explicit Columns(const uint4* shared) {
    const int matrix = threadIdx.x % 32 / 8, n = threadIdx.x % 8;
#pragma unroll
    for (int c = 0; c < kEights; ++c) load_matrices(words[c], shared + place<kEights>(n / 2 * 8 + 2 * matrix + n % 2, c));
  }
};

// part += scaling h B^T, h [16, 8 kEights] as left operands: words 2 c and 2 c + 1 are of rows `row` and `row + 8`.
template <class T, int kEights>
__device__ __forceinline__ void expand(const uint32_t (&h)[2 * kEights], const Columns<kEights>& b, float scaling, Part& part) {
#pragma unroll
  for (int j = 0; j < 4; ++j) {
    float sums[4] = {};
    if constexpr (kEights == 1) {
      mma<T>(sums, {h[0], h[1], 0, 0}, {b.words[0][j], 0});
    } else {
#pragma unroll
      for (int c = 0; c < kEights; c += 2)
        mma<T>(sums, {h[2 * c], h[2 * c + 1], h[2 * c + 2], h[2 * c + 3]}, {b.words[c][j], b.words[c + 1][j]});
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      float& value = part.values[i / 2][2 * j + i % 2];
      value = core::fma(scaling, sums[i], value);
    }
  }
}

}  // namespace swag::cuda
