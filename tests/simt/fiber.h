#pragma once

// A stack of its own that a function runs on, and the switch from one to another.

#include <cstddef>

namespace simt {

struct Fiber {
  void (*start)() = nullptr;  // what the first switch to it calls; never returns
  char* stack = nullptr;      // lowest address
  size_t size = 0;
  void* registers[5];         // of __builtin_setjmp
  void* fake_stack = nullptr;  // of AddressSanitizer
};

// Makes the next switch to the fiber call `start` on its stack, whatever ran there before.
void restart(Fiber& fiber, void (*start)());

// Returns when another fiber switches back.
void switch_to(Fiber& from, Fiber& to);

}  // namespace simt
