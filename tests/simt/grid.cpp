#include "grid.h"

#include <sys/mman.h>

#include <mutex>
#include <new>

namespace simt {

Launch launch;
unsigned threads_per_block;
Cluster clusters[kResident];
unsigned asleep;
uint64_t steps;
std::string failure;
Fiber host;

namespace {

constexpr unsigned kIdle = 1000;  // rounds of nothing but sleep until it is taken for a deadlock
constexpr size_t kStack = 128 << 10, kGuard = 4 << 10;

unsigned resident;  // clusters
uint64_t launched;

// What every fiber runs: one thread of the grid after the other.
void work() {
  for (;;) {
    launch.kernel(launch.arguments);
    finish_copies();
    Thread& thread = *self;
    Block& block = *thread.warp->block;
    Cluster& cluster = *block.cluster;
    thread.waits = nullptr;
    end(thread.warp->gather, "warp");
    end(block.gather, "block");
    end(cluster.gather, "cluster");
    park(thread);
    progress();
    if (--block.threads_alive == 0) check_canary(block);
    if (--cluster.threads_alive == 0) --resident;
    yield();
  }
}

void make_threads(Warp& warp) {
  warp.threads = new Thread[kLanes];  // kept, like their stacks, for all launches to come
  constexpr size_t each = kStack + kGuard;
  constexpr int flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE;
  void* const stacks = mmap(nullptr, kLanes * each, PROT_READ | PROT_WRITE, flags, -1, 0);
  if (stacks == MAP_FAILED) throw std::bad_alloc();
  for (unsigned lane = 0; lane < kLanes; ++lane) {
    Thread& thread = warp.threads[lane];
    char* const lowest = static_cast<char*>(stacks) + lane * each;
    mprotect(lowest, kGuard, PROT_NONE);
    thread.lane = lane;
    thread.warp = &warp;
    thread.fiber.stack = lowest + kGuard;
    thread.fiber.size = kStack - number(thread) * 192 % 4096;  // else all stacks share a few lines of the cache
    restart(thread.fiber, work);
  }
}

void prepare(Block& block) {
  block.ready = 0;
  block.gather = {};
  block.threads_alive = threads_per_block;
  prepare_memory(block);
  for (unsigned i = 0; i * kLanes < threads_per_block; ++i) {
    Warp& warp = block.warps[i];
    warp.rank = i;
    warp.block = &block;
    warp.ready = warp.asleep = 0;
    warp.gather = {};
    if (!warp.threads) make_threads(warp);
    for (unsigned lane = 0; lane < kLanes; ++lane) {
      Thread& thread = warp.threads[lane];
      const unsigned n = i * kLanes + lane, x = launch.block.x, y = launch.block.y;
      thread.index = {n % x, n / x % y, n / x / y};
      thread.waits = nullptr;
      thread.copies.clear();
      thread.groups = 0;
      thread.polled = nullptr;
    }
  }
  wake(block);
}

void admit(uint64_t number) {
  unsigned rank = 0;
  while (clusters[rank].threads_alive) ++rank;
  Cluster& cluster = clusters[rank];
  cluster.rank = rank;
  cluster.gather = {};
  cluster.threads_alive = launch.cluster * threads_per_block;
  const uint64_t row = launch.grid.x / launch.cluster;
  for (unsigned i = 0; i < launch.cluster; ++i) {
    if (!cluster.blocks[i]) cluster.blocks[i].reset(new Block);
    Block& block = *cluster.blocks[i];
    block.rank = i;
    block.cluster = &cluster;
    block.index = {static_cast<unsigned>(number % row * launch.cluster + i),
                   static_cast<unsigned>(number / row % launch.grid.y),
                   static_cast<unsigned>(number / row / launch.grid.y)};
    prepare(block);
  }
  ++resident;
}

template <class Visit>
void for_each_warp(const Visit& visit) {
  for (Cluster& cluster : clusters)
    for (unsigned i = 0; cluster.threads_alive && i < launch.cluster; ++i)
      for (unsigned w = 0; w * kLanes < threads_per_block; ++w) visit(cluster.blocks[i]->warps[w]);
}

void wake_sleepers() {
  for_each_warp([](Warp& warp) {
    if (warp.asleep) wake(warp, warp.asleep);
    warp.asleep = 0;
  });
  asleep = 0;
}

// Where the threads of the first block that still runs are.
std::string stuck() {
  std::string found, before;
  Block* block = nullptr;
  for_each_warp([&](Warp& warp) {
    if (block && block != warp.block) return;
    if (!block) found = "no thread can go on; in block " + text(warp.block->index);
    block = warp.block;
    for (unsigned lane = 0; lane < kLanes && all_lanes(warp) >> lane; ++lane) {
      const Thread& thread = warp.threads[lane];
      const std::string where = thread.waits ? "waiting in " + text(thread.waits, thread.line) : "ended";
      if (where != before) found += ", from thread " + std::to_string(number(thread)) + " " + where;
      before = where;
    }
  });
  return found;
}

void run_clusters() {
  const std::vector<uint64_t> numbers = shuffled(uint64_t{launch.grid.x} / launch.cluster * launch.grid.y * launch.grid.z);
  const unsigned side_by_side = in_order(Order::random) ? 1 + draw() % 4 : 1;
  size_t admitted = 0;
  uint64_t steps_before = steps;
  unsigned idle = 0;
  while (failure.empty()) {
    while (resident < side_by_side && admitted < numbers.size()) admit(numbers[admitted++]);
    if (ready) {
      self = next();
      switch_to(host, self->fiber);
    } else if (!resident) {
      return;
    } else if (!asleep) {
      failure = stuck();
    } else if (steps != steps_before) {
      steps_before = steps;
      idle = 0;
      wake_sleepers();
    } else if (resident < kResident && admitted < numbers.size()) {
      admit(numbers[admitted++]);
    } else if (++idle <= kIdle) {
      wake_sleepers();
    } else {
      failure = stuck();
    }
  }
}

// After a fault the fibers are where it left them.
void abandon() {
  for (Cluster& cluster : clusters) {
    cluster.ready = cluster.threads_alive = 0;
    for (auto& block : cluster.blocks)
      for (unsigned w = 0; block && w < kWarps; ++w)
        for (unsigned lane = 0; block->warps[w].threads && lane < kLanes; ++lane)
          restart(block->warps[w].threads[lane].fiber, work);
  }
}

}  // namespace

uint64_t launches() { return launched; }

std::string run(const Launch& wanted) {
  static std::mutex one_at_a_time;
  const std::lock_guard<std::mutex> lock(one_at_a_time);
  launch = wanted;
  gridDim = launch.grid;
  blockDim = launch.block;
  threads_per_block = launch.block.x * launch.block.y * launch.block.z;
  ready = resident = asleep = 0;
  failure.clear();
  ++launched;
  run_clusters();
  self = nullptr;
  if (!failure.empty()) abandon();
  return failure;
}

}  // namespace simt
