#include <cstring>

#include "grid.h"

namespace simt {
namespace {

void join(Gather& gather, const char* name, int line, const char* whose) {
  if (gather.ended)
    fault("waits in " + text(name, line) + " but " + std::to_string(gather.ended) + " threads of its " + whose +
          " have ended");
  if (gather.arrived == 0) {
    gather.name = name;
    gather.line = line;
  } else if (gather.line != line || strcmp(gather.name, name) != 0) {
    fault("waits in " + text(name, line) + " but others of its " + whose + " in " + text(gather.name, gather.line));
  }
  ++gather.arrived;
  self->waits = name;
  self->line = line;
  park(*self);
}

}  // namespace

std::string text(const uint3& at) {
  return "(" + std::to_string(at.x) + ", " + std::to_string(at.y) + ", " + std::to_string(at.z) + ")";
}
std::string text(const char* name, int line) { return std::string(name) + " (line " + std::to_string(line) + ")"; }

unsigned number(const Thread& thread) { return thread.warp->rank * kLanes + thread.lane; }

void fault(const std::string& what) {
  failure = "thread " + std::to_string(number(*self)) + " of block " + text(self->warp->block->index) + " " + what;
  switch_to(self->fiber, host);
  __builtin_unreachable();
}

void end(Gather& gather, const char* whose) {
  if (gather.arrived)
    fault("ends but others of its " + std::string(whose) + " wait in " + text(gather.name, gather.line));
  ++gather.ended;
}

void across_warp(const char* name, int line, void* operand, void (*finish)(void* const*)) {
  Warp& warp = *self->warp;
  warp.operands[self->lane] = operand;
  join(warp.gather, name, line, "warp");
  if (warp.gather.arrived == kLanes) {
    if (finish) finish(warp.operands);
    warp.gather.arrived = 0;
    wake(warp, ~0u);
    progress();
  }
  yield();
}

void across_block(const char* name, int line) {
  Block& block = *self->warp->block;
  join(block.gather, name, line, "block");
  if (block.gather.arrived == threads_per_block) {
    block.gather.arrived = 0;
    wake(block);
    progress();
  }
  yield();
}

void across_cluster(const char* name, int line) {
  Cluster& cluster = *self->warp->block->cluster;
  join(cluster.gather, name, line, "cluster");
  if (cluster.gather.arrived == launch.cluster * threads_per_block) {
    cluster.gather.arrived = 0;
    for (unsigned i = 0; i < launch.cluster; ++i) wake(*cluster.blocks[i]);
    progress();
  }
  yield();
}

void sleep(const char* name, int line) {
  self->waits = name;
  self->line = line;
  self->warp->asleep |= 1u << self->lane;
  ++asleep;
  park(*self);
  yield();
}

void progress() { ++steps; }

}  // namespace simt
