#include "fiber.h"

#include <ucontext.h>

#include "sanitizer.h"

namespace simt {
namespace {

Fiber* leaving;

void arrived([[maybe_unused]] void* fake_stack) {
  const void* stack = leaving->stack;
  SIMT_FINISH_SWITCH(fake_stack, &stack, &leaving->size);
  leaving->stack = static_cast<char*>(const_cast<void*>(stack));  // the host's is not known before
}

void (*starting)();

void entry() {
  arrived(nullptr);
  starting();
}

// The only use of ucontext: its switches call the kernel. Not instrumented, as the frame is never left.
__attribute__((noinline, no_sanitize_address)) void enter(Fiber& fiber) {
  starting = fiber.start;
  fiber.start = nullptr;
  ucontext_t context;
  getcontext(&context);
  context.uc_stack.ss_sp = fiber.stack;
  context.uc_stack.ss_size = fiber.size;
  makecontext(&context, entry, 0);
  setcontext(&context);
}

}  // namespace

void restart(Fiber& fiber, void (*start)()) {
  SIMT_UNPOISON(fiber.stack, fiber.size);
  fiber.start = start;
}

// Not instrumented, as the jump would be taken for the end of the frames below.
__attribute__((noinline, no_sanitize_address)) void switch_to(Fiber& from, Fiber& to) {
  leaving = &from;
  SIMT_START_SWITCH(&from.fake_stack, to.stack, to.size);
  if (__builtin_setjmp(from.registers) == 0) {
    if (to.start) enter(to);
    __builtin_longjmp(to.registers, 1);
  }
  arrived(from.fake_stack);
}

}  // namespace simt
