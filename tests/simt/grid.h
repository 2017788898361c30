#pragma once

// The blocks that run, for the files that move them on.

#include <memory>

#include "sanitizer.h"
#include "simt.h"

namespace simt {

constexpr unsigned kLanes = 32, kWarps = 32, kBlocks = 8;  // of a warp, a block and a cluster
constexpr unsigned kResident = 8;                          // clusters that run side by side if they wait for each other
constexpr size_t kCanary = SIMT_SANITIZED ? 0 : 64;        // bytes after shared memory

// Who has come to a collective operation, and who never will.
struct Gather {
  const char* name;
  int line;
  unsigned arrived, ended;
};

// `ready` are sets of bits: lanes of the warp, warps of the block and blocks of the cluster that can run.
struct Warp {
  uint32_t ready, asleep;
  unsigned rank;
  struct Block* block;
  Gather gather;
  void* operands[kLanes];
  Thread* threads = nullptr;
};

struct Block {
  uint32_t ready;
  unsigned rank, threads_alive;
  uint3 index;
  struct Cluster* cluster;
  Gather gather;
  std::unique_ptr<char[]> shared;
  Warp warps[kWarps];
};

struct Cluster {
  uint32_t ready = 0;
  unsigned rank, threads_alive = 0;
  Gather gather;
  std::unique_ptr<Block> blocks[kBlocks];
};

extern Launch launch;
extern unsigned threads_per_block;
extern Cluster clusters[kResident];
extern uint32_t ready;  // clusters
extern unsigned asleep;  // threads
extern uint64_t steps;   // of progress
extern std::string failure;
extern Fiber host;

// schedule.cpp
Thread* next();            // the thread that goes on, or null if only the host can
void yield();              // to it
void park(Thread& thread);  // until it is woken
void wake(Warp& warp, uint32_t lanes);
void wake(Block& block);
uint32_t all_lanes(const Warp& warp);
uint64_t draw();              // a random number
bool in_order(Order order);   // whether that is the schedule's
std::vector<uint64_t> shuffled(uint64_t size);  // 0 to size − 1, by the schedule

// collectives.cpp
void end(Gather& gather, const char* whose);
std::string text(const uint3& at);
std::string text(const char* name, int line);
unsigned number(const Thread& thread);

// memory.cpp
void prepare_memory(Block& block);
void check_canary(const Block& block);
void finish_copies();

}  // namespace simt
