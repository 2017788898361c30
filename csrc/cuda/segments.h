#pragma once

// The arena's segments in a kernel's parameters: no table has to be kept in the device's memory, and none copied there.

#include <cstring>

#include "cuda/device.h"
#include "include/swag_kernels.h"

namespace swag::cuda {

// At most N consecutive segments, where a gap between two of them is one without elements. Blocks are those of the arena.
template <class Tag, int N>
struct Segments {
  Tag tags[N];                  // what the kernel has to know of a tensor
  uint32_t first_blocks[N + 1];  // the last one is where the last segment ends
  uint16_t last_sizes[N];       // elements of a segment's last block; the ones before are full, but for a gap's
  uint8_t kinds[N];             // at the kernel's disposal
  int number;

  // The segment that holds a block; the same steps for all threads of a block, and the same addresses.
  __device__ __forceinline__ int find(uint32_t block) const {
    int low = 0, high = number;
    while (high - low > 1) {
      const int middle = (low + high) / 2;
      if (first_blocks[middle] <= block)
        low = middle;
      else
        high = middle;
    }
    return low;
  }
  // Elements that the segment has in the block.
  __device__ __forceinline__ int size_of(int segment, uint32_t block) const {
    const int last_size = last_sizes[segment];
    return last_size == 0 || block + 1 == first_blocks[segment + 1] ? last_size : kBlockElements;
  }
  uint32_t number_of_blocks() const { return first_blocks[number] - first_blocks[0]; }
};

// Parameters that are larger cost the host more to pass, so that a launch takes the smallest capacity that holds its segments:
// 4 KB, 12 KB (as many tensors as a large model's adapters have) or what CUDA takes at most, without 128 bytes for the rest.
constexpr int kFewSegments = 256;
#if CUDART_VERSION >= 12010
constexpr int kSomeSegments = 768, kMostSegments = 2048;
#else
constexpr int kSomeSegments = kFewSegments, kMostSegments = kFewSegments;
#endif

// Hands blocks [0, blocks) of the arena to launch(segments, last) in as few launches as hold them, one if there are none. The
// tag and kind of tensor t are tag_of(t) and kind_of(t).
template <class Tag, int MOST, class TagOf, class KindOf, class Launch>
int in_launches(const swag_segment* layout, int64_t num_tensors, int64_t blocks, const TagOf& tag_of, const KindOf& kind_of,
                const Launch& launch) {
  Segments<Tag, MOST> segments;
  int number = 0, status = SWAG_OK;
  uint32_t end = 0;  // of the blocks so far
  const auto pass = [&](bool last) {
    segments.number = number;
    segments.first_blocks[number] = end;
    if (status == SWAG_OK) status = launch(segments, last);
    number = 0;
  };
  const auto add = [&](Tag tag, uint8_t kind, uint32_t end_block, int last_size) {
    if (number == MOST) pass(false);
    segments.tags[number] = tag;
    segments.kinds[number] = kind;
    segments.last_sizes[number] = static_cast<uint16_t>(last_size);
    segments.first_blocks[number++] = end;
    end = end_block;
  };

  for (int64_t t = 0; t < num_tensors; ++t) {
    if (layout[t].numel == 0) continue;
    const auto first_block = static_cast<uint32_t>(layout[t].offset / kBlockElements);
    const int64_t before_last = (layout[t].numel - 1) / kBlockElements;
    if (first_block > end) add(Tag{}, 0, first_block, 0);
    add(tag_of(t), kind_of(t), first_block + static_cast<uint32_t>(before_last) + 1,
        static_cast<int>(layout[t].numel - before_last * kBlockElements));
  }
  if (blocks > end || number == 0) add(Tag{}, 0, blocks > end ? static_cast<uint32_t>(blocks) : end + 1, 0);
  pass(true);
  return status;
}

template <int N, class Tag, int M>
void copy_segments(const Segments<Tag, M>& from, Segments<Tag, N>& to) {
  const size_t number = from.number;
  memcpy(to.tags, from.tags, number * sizeof(Tag));
  memcpy(to.first_blocks, from.first_blocks, (number + 1) * sizeof(uint32_t));
  memcpy(to.last_sizes, from.last_sizes, number * sizeof(uint16_t));
  memcpy(to.kinds, from.kinds, number);
  to.number = from.number;
}

}  // namespace swag::cuda
