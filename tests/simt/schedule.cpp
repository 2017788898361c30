#include <algorithm>
#include <numeric>
#include <random>

#include "grid.h"

uint3 threadIdx, blockIdx;
dim3 blockDim, gridDim;

namespace simt {

Thread* self;
uint32_t ready;

namespace {

Order order = Order::forward;
std::mt19937_64 generator;
uint64_t noise = 1;  // of a faster generator
uint32_t rotations;  // where the random order begins, 5 bits for each level

unsigned first(uint32_t set, unsigned level) {
  if (order == Order::forward) return __builtin_ctz(set);
  if (order == Order::reversed) return 31 - __builtin_clz(set);
  const unsigned by = (rotations >> (5 * level) & 31) * (32 - __builtin_clz(set)) / 32;
  return (__builtin_ctz(set >> by | set << (-by & 31)) + by) & 31;
}

}  // namespace

void schedule(Order by, uint64_t seed) {
  order = by;
  generator.seed(seed);
  noise = generator() | 1;
  rotations = 0;
}

bool in_order(Order one) { return order == one; }

uint64_t draw() {
  noise ^= noise << 13;
  noise ^= noise >> 7;
  return noise ^= noise << 17;
}

std::vector<uint64_t> shuffled(uint64_t size) {
  std::vector<uint64_t> numbers(size);
  std::iota(numbers.begin(), numbers.end(), 0);
  if (order == Order::reversed) std::reverse(numbers.begin(), numbers.end());
  if (order == Order::random) std::shuffle(numbers.begin(), numbers.end(), generator);
  return numbers;
}

Thread* next() {
  if (!ready || !failure.empty()) return nullptr;
  if (order == Order::random) {
    const uint64_t r = draw();
    if (r % 16 == 0) rotations = static_cast<uint32_t>(r >> 32);  // runs between are long enough to get far ahead
  }
  Cluster& cluster = clusters[first(ready, 0)];
  Block& block = *cluster.blocks[first(cluster.ready, 1)];
  Warp& warp = block.warps[first(block.ready, 2)];
  Thread& thread = warp.threads[first(warp.ready, 3)];
  blockIdx = block.index;
  threadIdx = thread.index;
  return &thread;
}

void yield() {
  Thread* const from = self;
  Thread* const to = next();
  if (to == from) return;
  self = to;
  switch_to(from->fiber, to ? to->fiber : host);
}

void park(Thread& thread) {
  Warp& warp = *thread.warp;
  Block& block = *warp.block;
  Cluster& cluster = *block.cluster;
  if (warp.ready &= ~(1u << thread.lane)) return;
  if (block.ready &= ~(1u << warp.rank)) return;
  if (cluster.ready &= ~(1u << block.rank)) return;
  ready &= ~(1u << cluster.rank);
}

void wake(Warp& warp, uint32_t lanes) {
  Block& block = *warp.block;
  warp.ready |= lanes;
  block.ready |= 1u << warp.rank;
  block.cluster->ready |= 1u << block.rank;
  ready |= 1u << block.cluster->rank;
}

void wake(Block& block) {
  for (unsigned i = 0; i * kLanes < threads_per_block; ++i) wake(block.warps[i], all_lanes(block.warps[i]));
}

uint32_t all_lanes(const Warp& warp) {
  const unsigned threads = std::min(threads_per_block - warp.rank * kLanes, kLanes);
  return threads == kLanes ? ~0u : (1u << threads) - 1;
}

}  // namespace simt
