#pragma once

// Runs a kernel's grid on one CPU thread. Every thread of a block is a fiber; it runs until a collective operation, where
// it waits until all threads of the warp, block or cluster have come, or until it sleeps. Which fiber goes next is the
// schedule's choice. What a GPU would not do is a fault, which ends the launch.

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include "fiber.h"
#include "vectors.h"

extern uint3 threadIdx, blockIdx;  // of the thread that runs
extern dim3 blockDim, gridDim;

namespace simt {

enum class Order { forward, reversed, random };

// `forward` runs threads and blocks in order, each as far as it gets, and makes asynchronous copies at once. `reversed`
// begins with the last thread of the last block and makes copies as late as it may. `random` draws all that.
void schedule(Order order, uint64_t seed);

struct Launch {
  dim3 grid, block;
  size_t shared;
  unsigned cluster;
  void (*kernel)(const void* arguments);  // called by every thread
  const void* arguments;
};

// What went wrong, or nothing.
std::string run(const Launch& launch);

uint64_t launches();  // so far

// The rest is called by the threads.

struct Copy {
  char* to;
  const void* from;  // null: zeros
  uint64_t group;
};

struct Thread {
  uint3 index;
  unsigned lane;
  struct Warp* warp;
  const char* waits = nullptr;  // name of the collective it waits in
  int line;
  std::vector<Copy> copies;  // not yet made
  uint64_t groups;
  const uint32_t* polled;  // address and value of the last load_acquire
  uint32_t value;
  Fiber fiber;
};

extern Thread* self;

[[noreturn]] void fault(const std::string& what);

// `finish` is called once, with the operands of lanes 0 to 31.
void across_warp(const char* name, int line, void* operand, void (*finish)(void* const* operands));
void across_block(const char* name, int line);
void across_cluster(const char* name, int line);

void sleep(const char* name, int line);  // lets all others go first
void progress();                         // says that another thread's sleep may have come to its end

char* shared_memory();
void check_shared(const void* address, size_t bytes, const char* what);
const void* shared_memory_of(unsigned rank, const void* own, size_t bytes);

void copy_async(void* to, const void* from, bool valid);
void commit_copies();
void wait_for_copies(unsigned groups_left);

}  // namespace simt
