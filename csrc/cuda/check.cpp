#include "cuda/check.h"

#include <cstdio>
#include <initializer_list>
#include <string>
#include <string_view>
#include <tuple>

#include "cuda/error.h"
#include "cuda/kernels.h"

namespace swag::cuda {
namespace {

constexpr int64_t kMost = INT32_MAX;
constexpr int64_t kBlock = 1024;
constexpr int64_t kMostArena = kBlock * kMost;  // of which a launch counts the blocks in 31 bits
constexpr int64_t kMostRank = 64;               // of sampled_lora
constexpr int64_t kMostFeatures = 1 << 30;      // of a layer, whose kernels count them in 31 bits beyond the last one
constexpr int64_t kVector = 16;                 // bytes of the widest load

std::string text(int64_t value) { return std::to_string(value); }
std::string text(const void* address) {
  char digits[24];
  std::snprintf(digits, sizeof digits, "%p", address);
  return address ? digits : "NULL";
}

bool is_dtype(int32_t dtype) { return dtype == SWAG_FLOAT32 || dtype == SWAG_BFLOAT16 || dtype == SWAG_FLOAT16; }
int64_t itemsize(int32_t dtype) { return dtype == SWAG_FLOAT32 ? 4 : 2; }

// An argument's memory; bytes are known once it was checked.
struct Memory {
  std::string_view name;
  const void* address;
  int64_t bytes = 0;

  uintptr_t begin() const { return reinterpret_cast<uintptr_t>(address); }
  uintptr_t end() const { return begin() + static_cast<uintptr_t>(bytes); }
};

// Checks that are true, or false with a message for swag_last_error().
class Arguments {
 public:
  explicit Arguments(const char* function) : function_(function) {}

  bool given(const void* args) const { return args || wrong("args is NULL; pass the address of its struct"); }

  bool within(const char* name, int64_t value, int64_t least, int64_t most) const {
    return (least <= value && value <= most) ||
           wrong(name + (" is " + text(value)) + "; it must lie in [" + text(least) + ", " + text(most) + "]");
  }

  bool dtype(const std::string& name, int32_t value) const {
    return is_dtype(value) || wrong(name + " is " + text(value) + "; known are SWAG_FLOAT32 (0), SWAG_BFLOAT16 (1) and "
                                                                  "SWAG_FLOAT16 (2)");
  }

  bool arena(int64_t size) const {
    return within("size", size, 0, kMostArena) &&
           (size % kBlock == 0 || wrong("size is " + text(size) + ", no multiple of " + text(kBlock) + "; round it up"));
  }

  bool host_list(const char* name, const void* list, int64_t length) const {
    return list || !length || wrong(name + (" is NULL, with num_tensors " + text(length)) + "; pass a list on the host");
  }

  // Without gaps.
  bool whole(Memory& memory, std::initializer_list<int64_t> sizes, int64_t item, int64_t alignment) const {
    memory.bytes = item;
    for (int64_t size : sizes)
      if (__builtin_mul_overflow(memory.bytes, size, &memory.bytes)) return too_large(memory, sizes, item);
    return lies_at(memory, alignment);
  }

  // Samples of rows x columns, a stride apart; 0 if all share one.
  bool strided(Memory& memory, int64_t samples, int64_t rows, int64_t columns, int64_t stride, int64_t item) const {
    int64_t steps;
    if (stride < 0) return wrong("stride_" + name_of(memory) + " is " + text(stride) + "; it must not be negative");
    memory.bytes = 0;
    if (!samples || !rows || !columns) return true;
    if (__builtin_mul_overflow(samples - 1, stride, &steps) || __builtin_add_overflow(steps, rows * columns, &memory.bytes) ||
        __builtin_mul_overflow(memory.bytes, item, &memory.bytes))
      return too_large(memory, {samples, rows, columns}, item);
    return lies_at(memory, item);
  }

  bool lies_at(const Memory& memory, int64_t alignment) const {
    if (!memory.bytes) return true;
    if (!memory.address) return wrong(name_of(memory) + " is NULL and must hold " + text(memory.bytes) + " bytes");
    return memory.begin() % alignment == 0 || wrong(name_of(memory) + " is " + text(memory.address) + ", no multiple of " +
                                                    text(alignment) + " bytes; copy it to aligned memory");
  }

  bool apart(const Memory& written, std::initializer_list<Memory> others) const {
    for (const Memory& other : others)
      if (written.bytes && other.bytes && written.begin() < other.end() && other.begin() < written.end())
        return wrong(name_of(written) + " (" + text(written.bytes) + " bytes at " + text(written.address) + ") overlaps " +
                     name_of(other) + " (" + text(other.bytes) + " bytes at " + text(other.address) +
                     "); give it memory of its own");
    return true;
  }

  // As swag_kernels/layout.py has it.
  bool layout(const swag_segment* rows, int64_t num_tensors, int64_t size) const {
    if (!within("num_tensors", num_tensors, 0, kMost) || !host_list("layout", rows, num_tensors)) return false;
    int64_t end = 0;
    for (int64_t i = 0; i < num_tensors; ++i) {
      const auto [offset, numel, first] = rows[i];
      if (offset % kBlock || offset < end || numel < 0 || first % 4 || first < 0)
        return wrong("layout[" + text(i) + "] (offset " + text(offset) + ", numel " + text(numel) + ", first " + text(first) +
                     ") is not valid: segments ascend without overlap from multiples of " + text(kBlock) +
                     ", and first is a multiple of 4");
      if (offset > size - numel)
        return wrong("layout[" + text(i) + "] (offset " + text(offset) + ", numel " + text(numel) + ") ends beyond size " +
                     text(size) + "; make the arena larger");
      end = offset + numel;
    }
    return true;
  }

  bool wrong(const std::string& what) const {
    failed(SWAG_INVALID_ARGUMENT, std::string(function_) + ": " + what);
    return false;
  }

 private:
  static std::string name_of(const Memory& memory) { return std::string(memory.name); }

  bool too_large(const Memory& memory, std::initializer_list<int64_t> sizes, int64_t item) const {
    std::string product;
    for (int64_t size : sizes) product += text(size) + " * ";
    return wrong(name_of(memory) + " would take " + product + text(item) + " bytes, more than 2^63 - 1; pass less at once");
  }

  const char* function_;
};

int status(bool valid) { return valid ? SWAG_OK : SWAG_INVALID_ARGUMENT; }

bool check_parameters(const Arguments& is, const swag_collect_args& args) {
  for (int64_t i = 0; i < args.num_tensors; ++i) {
    if (is_dtype(args.dtypes[i]) && args.params[i] &&
        reinterpret_cast<uintptr_t>(args.params[i]) % itemsize(args.dtypes[i]) == 0)
      continue;  // in few steps, as there are some hundred
    const std::string name = "params[" + text(i) + "]";
    Memory memory{name, args.params[i]};
    if (!is.dtype("dtypes[" + text(i) + "]", args.dtypes[i])) return false;
    if (!is.whole(memory, {args.layout[i].numel}, itemsize(args.dtypes[i]), itemsize(args.dtypes[i]))) return false;
  }
  return true;
}

}  // namespace

int check(const swag_collect_args* args) {
  const Arguments is("swag_collect");
  if (!is.given(args)) return SWAG_INVALID_ARGUMENT;
  Memory mean{"mean", args->mean}, m2{"m2", args->m2}, deviations{"deviations", args->deviations};
  Memory count{"count", args->count};
  return status(is.arena(args->size) && is.within("rank", args->rank, 0, kMost) &&
                is.layout(args->layout, args->num_tensors, args->size) &&
                is.host_list("params", args->params, args->num_tensors) &&
                is.host_list("dtypes", args->dtypes, args->num_tensors) && check_parameters(is, *args) &&
                is.whole(mean, {args->size}, 4, kVector) && is.whole(m2, {args->size}, 4, kVector) &&
                is.whole(deviations, {args->rank, args->size}, 4, kVector) && is.whole(count, {}, 8, 8) &&
                is.apart(mean, {m2, deviations, count}) && is.apart(m2, {deviations, count}) &&
                is.apart(deviations, {count}));
}

int check(const swag_draw_args* args) {
  const Arguments is("swag_draw");
  if (!is.given(args)) return SWAG_INVALID_ARGUMENT;
  constexpr int64_t kSamples = int64_t{1} << 32;
  Memory mean{"mean", args->mean}, std{"std", args->std}, deviations{"deviations", args->deviations}, out{"out", args->out};
  return status(is.arena(args->size) && is.within("rank", args->rank, 0, kMost) &&
                is.within("num_samples", args->num_samples, 0, kMost) &&
                is.within("first_sample", args->first_sample, 0, kSamples - args->num_samples) &&
                is.within("antithetic", args->antithetic, 0, 1) && is.dtype("dtype", args->dtype) &&
                is.layout(args->layout, args->num_tensors, args->size) && is.whole(mean, {args->size}, 4, kVector) &&
                is.whole(std, {args->size}, 4, kVector) && is.whole(deviations, {args->rank, args->size}, 4, kVector) &&
                is.whole(out, {args->num_samples, args->size}, itemsize(args->dtype), kVector) &&
                is.apart(out, {mean, std, deviations}));
}

int check(const swag_sampled_lora_args* args) {
  const Arguments is("swag_sampled_lora");
  if (!is.given(args)) return SWAG_INVALID_ARGUMENT;
  const auto [samples, rows, in, out, rank] = std::tuple(args->samples, args->rows, args->in, args->out, args->rank);
  const int64_t item = itemsize(args->dtype), base_item = itemsize(args->base_dtype);
  Memory x{"x", args->x}, A{"A", args->A}, B{"B", args->B}, base{"base", args->base}, y{"y", args->y};
  if (!is.within("samples", samples, 0, kMost) || !is.within("rows", rows, 0, kMost) ||
      !is.within("in", in, 1, kMostFeatures) ||
      !is.within("out", out, 0, kMostFeatures) || !is.within("rank", rank, 1, kMostRank) || !is.dtype("dtype", args->dtype) ||
      !is.dtype("base_dtype", args->base_dtype))
    return SWAG_INVALID_ARGUMENT;
  if (!is.strided(x, samples, rows, in, args->stride_x, item) || !is.strided(A, samples, rank, in, args->stride_A, item) ||
      !is.strided(B, samples, out, rank, args->stride_B, item) ||
      !is.strided(base, samples, rows, out, args->stride_base, base_item) ||
      !is.whole(y, {samples, rows, out}, base_item, base_item) || !is.apart(y, {x, A, B}))
    return SWAG_INVALID_ARGUMENT;
  if (args->y != args->base) return status(is.apart(y, {base}));
  return status(samples <= 1 || args->stride_base == rows * out ||
                is.wrong("y is base itself, of which stride_base " + text(args->stride_base) + " is not rows * out = " +
                         text(rows * out) + "; give y memory of its own"));
}

int check_sizes(const swag_bayes_average_args* args) {
  const Arguments is("swag_bayes_average");
  if (!is.given(args)) return SWAG_INVALID_ARGUMENT;
  return status(is.within("samples", args->samples, 0, kMost) && is.within("batch", args->batch, 0, kMost) &&
                is.within("classes", args->classes, 0, kMost) && is.within("group", args->group, 1, 2) &&
                is.dtype("dtype", args->dtype) &&
                (args->samples % args->group == 0 ||
                 is.wrong("samples is " + text(args->samples) + ", no whole pairs of group 2; pass an even number")));
}

int check(const swag_bayes_average_args* args) {
  if (int invalid = check_sizes(args)) return invalid;
  const Arguments is("swag_bayes_average");
  const auto [samples, batch, classes] = std::tuple(args->samples, args->batch, args->classes);
  Memory logits{"logits", args->logits}, log_sum{"log_sum", args->log_sum}, m2{"m2", args->m2};
  Memory votes{"votes", args->votes}, entropy{"entropy", args->entropy}, count{"count", args->count};
  const int64_t item = itemsize(args->dtype);
  if (!is.whole(logits, {samples, batch, classes}, item, item) || !is.whole(log_sum, {batch, classes}, 4, 4) ||
      !is.whole(m2, {batch, classes}, 4, 4) || !is.whole(votes, {batch, classes}, 4, 4) ||
      !is.whole(entropy, {batch}, 4, 4) || !is.whole(count, {}, 8, 8))
    return SWAG_INVALID_ARGUMENT;
  const bool empty = !samples || !batch || !classes;
  const Memory workspace{"workspace", args->workspace,
                         empty ? 0 : static_cast<int64_t>(bayes_average_workspace(*args))};
  return status(is.lies_at(workspace, kVector) && is.apart(log_sum, {logits, m2, votes, entropy, count, workspace}) &&
                is.apart(m2, {logits, votes, entropy, count, workspace}) &&
                is.apart(votes, {logits, entropy, count, workspace}) && is.apart(entropy, {logits, count, workspace}) &&
                is.apart(count, {logits, workspace}) && is.apart(workspace, {logits}));
}

}  // namespace swag::cuda
