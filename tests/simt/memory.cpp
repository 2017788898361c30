#include <algorithm>
#include <cstring>

#include "grid.h"

namespace simt {
namespace {

constexpr unsigned char kUnwritten = 0xff, kCanaryByte = 0xa5;  // shared memory starts as NaN

bool misaligned(const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 != 0; }

void make(const Copy& copy) {
  if (copy.from)
    memcpy(copy.to, copy.from, 16);
  else
    memset(copy.to, 0, 16);
}

}  // namespace

void prepare_memory(Block& block) {
  block.shared.reset(new char[launch.shared + kCanary]);
  memset(block.shared.get(), kUnwritten, launch.shared);
  memset(block.shared.get() + launch.shared, kCanaryByte, kCanary);
}

void check_canary(const Block& block) {
  const auto* tail = reinterpret_cast<const unsigned char*>(block.shared.get()) + launch.shared;
  if (std::any_of(tail, tail + kCanary, [](unsigned char byte) { return byte != kCanaryByte; }))
    fault("ends its block, which has written beyond its " + std::to_string(launch.shared) + " bytes of shared memory");
}

char* shared_memory() { return self->warp->block->shared.get(); }

void check_shared(const void* address, size_t bytes, const char* what) {
  const auto offset = static_cast<const char*>(address) - shared_memory();
  if (offset < 0 || offset + bytes > launch.shared)
    fault(std::string(what) + " " + std::to_string(bytes) + " bytes at byte " + std::to_string(offset) + " of its block's " +
          std::to_string(launch.shared) + " bytes of shared memory");
}

const void* shared_memory_of(unsigned rank, const void* own, size_t bytes) {
  check_shared(own, bytes, "reads from another block");
  if (rank >= launch.cluster)
    fault("reads shared memory of block " + std::to_string(rank) + " of a cluster of " + std::to_string(launch.cluster));
  const Block& other = *self->warp->block->cluster->blocks[rank];
  if (!other.threads_alive) fault("reads shared memory of block " + text(other.index) + ", which has ended");
  return other.shared.get() + (static_cast<const char*>(own) - shared_memory());
}

void copy_async(void* to, const void* from, bool valid) {
  check_shared(to, 16, "copies to");
  if (misaligned(to) || (valid && misaligned(from)))
    fault(std::string("copies 16 bytes ") + (misaligned(to) ? "to" : "from") + " an address that is no multiple of 16");
  const Copy copy{static_cast<char*>(to), valid ? from : nullptr, self->groups};
  if (in_order(Order::reversed) || (in_order(Order::random) && draw() >> 63))
    self->copies.push_back(copy);
  else
    make(copy);
}

void commit_copies() { ++self->groups; }

void wait_for_copies(unsigned groups_left) {
  auto& copies = self->copies;
  const auto waits = [&](const Copy& copy) { return copy.group + groups_left < self->groups; };
  const auto end = std::find_if_not(copies.begin(), copies.end(), waits);
  std::for_each(copies.begin(), end, make);
  copies.erase(copies.begin(), end);
}

void finish_copies() {
  std::for_each(self->copies.begin(), self->copies.end(), make);
  self->copies.clear();
}

}  // namespace simt
