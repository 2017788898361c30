// Every bad argument is refused on the host, with a message that names it. Needs no GPU, no driver and no CUDA header.
// A line for each case; exits with 0 if all were refused as they should.

#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <functional>
#include <initializer_list>
#include <string>
#include <thread>

#include "swag_kernels.h"

namespace {

int cases = 0, wrong = 0;

template <class Args>
using Function = int (*)(const Args*, swag_stream);

void judge(const char* function, int status, const std::string& expected) {
  const std::string message = swag_last_error();
  const bool right = status == SWAG_INVALID_ARGUMENT && message.rfind(std::string(function) + ": ", 0) == 0 &&
                     message.find(expected) != std::string::npos;
  std::printf("%s %d %s\n", right ? "refused" : "WRONG", status, message.c_str());
  ++cases;
  wrong += !right;
}

// The arguments are valid but for one change.
template <class Args>
void refused(const char* name, Function<Args> function, Args args, const std::function<void(Args&)>& change,
             const std::string& expected) {
  change(args);
  judge(name, function(&args, nullptr), expected);
}

// Each two of these members in one place.
template <class Args>
void overlapping(const char* name, Function<Args> function, const Args& valid, std::initializer_list<size_t> members) {
  for (const size_t* one = members.begin(); one != members.end(); ++one)
    for (const size_t* other = one + 1; other != members.end(); ++other) {
      Args args = valid;
      std::memcpy(reinterpret_cast<char*>(&args) + *other, reinterpret_cast<char*>(&args) + *one, sizeof(void*));
      judge(name, function(&args, nullptr), "; give it memory of its own");
    }
}

// No one's memory, as nothing is to look at it.
template <class T = void>
T* address(uintptr_t value) {
  return reinterpret_cast<T*>(value);
}

constexpr int64_t kHuge = INT64_MAX;
constexpr int64_t kInt = INT32_MAX;

void collect() {
  using Args = swag_collect_args;
  swag_segment layout[] = {{0, 1000, 0}, {1024, 3, 0}};
  const void* params[] = {address(0x1004), address(0x2002)};
  int32_t dtypes[] = {SWAG_FLOAT32, SWAG_FLOAT16};
  const Args valid{params, dtypes, layout, 2, 2048, address<float>(0x10000), address<float>(0x20000),
                   address<float>(0x30000), 2, address<int64_t>(0x40008)};
  const auto bad = [&](const std::function<void(Args&)>& change, const std::string& expected) {
    refused<Args>("swag_collect", swag_collect, valid, change, expected);
  };
  judge("swag_collect", swag_collect(nullptr, nullptr), "args is NULL");
  bad([](Args& a) { a.params = nullptr; }, "params is NULL, with num_tensors 2");
  bad([](Args& a) { a.dtypes = nullptr; }, "dtypes is NULL");
  bad([](Args& a) { a.layout = nullptr; }, "layout is NULL");
  bad([](Args& a) { a.mean = nullptr; }, "mean is NULL and must hold 8192 bytes");
  bad([](Args& a) { a.m2 = nullptr; }, "m2 is NULL");
  bad([](Args& a) { a.deviations = nullptr; }, "deviations is NULL and must hold 16384 bytes");
  bad([](Args& a) { a.count = nullptr; }, "count is NULL");
  bad([](Args& a) { a.mean = address<float>(0x10008); }, "mean is 0x10008, no multiple of 16 bytes");
  bad([](Args& a) { a.m2 = address<float>(0x20008); }, "m2 is 0x20008, no multiple of 16");
  bad([](Args& a) { a.deviations = address<float>(0x30008); }, "deviations is 0x30008, no multiple of 16");
  bad([](Args& a) { a.count = address<int64_t>(0x40004); }, "count is 0x40004, no multiple of 8");
  bad([](Args& a) { a.num_tensors = -1; }, "num_tensors is -1");
  bad([](Args& a) { a.size = -1024; }, "size is -1024");
  bad([](Args& a) { a.size = 2560; }, "size is 2560, no multiple of 1024");
  bad([](Args& a) { a.size = kHuge; }, "size is 9223372036854775807");
  bad([](Args& a) { a.rank = -2; }, "rank is -2");
  bad([](Args& a) { a.size = 1024 * kInt, a.rank = kInt; }, "deviations would take 2147483647 * 2199023254528 * 4 bytes");
  bad([](Args& a) { a.size = 1024; }, "layout[1] (offset 1024, numel 3) ends beyond size 1024");
  bad([](Args& a) { a.m2 = a.mean + 4; }, "mean (8192 bytes at 0x10000) overlaps m2");
  bad([](Args& a) { a.deviations = a.m2 - 4; }, "m2 (8192 bytes at 0x20000) overlaps deviations");
  overlapping<Args>("swag_collect", swag_collect, valid,
                    {offsetof(Args, mean), offsetof(Args, m2), offsetof(Args, deviations), offsetof(Args, count)});

  const auto bad_row = [&](swag_segment row, const std::string& expected) {
    swag_segment rows[] = {layout[0], row};
    bad([&](Args& a) { a.layout = rows; }, expected);
  };
  bad_row({1536, 3, 0}, "layout[1] (offset 1536, numel 3, first 0) is not valid");
  bad_row({0, 3, 0}, "layout[1] (offset 0, numel 3, first 0) is not valid");
  bad_row({-1024, 3, 0}, "layout[1] (offset -1024");
  bad_row({1024, -1, 0}, "numel -1");
  bad_row({1024, kHuge, 0}, "numel 9223372036854775807) ends beyond size 2048");
  bad_row({1024, 3, 2}, "first 2");
  bad_row({1024, 3, -4}, "first -4");
  bad_row({1024, 1025, 0}, "ends beyond size 2048");
  bad_row({kHuge / 1024 * 1024, 3, 0}, "ends beyond size 2048");

  const auto bad_param = [&](const void* param, int32_t dtype, const std::string& expected) {
    const void* other[] = {params[0], param};
    int32_t types[] = {dtypes[0], dtype};
    bad([&](Args& a) { a.params = other, a.dtypes = types; }, expected);
  };
  bad_param(nullptr, SWAG_FLOAT32, "params[1] is NULL and must hold 12 bytes");
  bad_param(address(0x2002), SWAG_FLOAT32, "params[1] is 0x2002, no multiple of 4");
  bad_param(address(0x2001), SWAG_BFLOAT16, "params[1] is 0x2001, no multiple of 2");
  bad_param(address(0x2004), 3, "dtypes[1] is 3; known are SWAG_FLOAT32 (0)");
  bad_param(address(0x2004), -1, "dtypes[1] is -1");
}

void draw() {
  using Args = swag_draw_args;
  static const swag_segment layout[] = {{0, 1000, 4}};
  const Args valid{address<float>(0x10000), address<float>(0x20000), address<float>(0x30000), 2, 1024, layout, 1,
                   address(0x40000), SWAG_BFLOAT16, 5, 0, 0, 1, 1, 0};
  const auto bad = [&](const std::function<void(Args&)>& change, const std::string& expected) {
    refused<Args>("swag_draw", swag_draw, valid, change, expected);
  };
  judge("swag_draw", swag_draw(nullptr, nullptr), "args is NULL");
  bad([](Args& a) { a.mean = nullptr; }, "mean is NULL");
  bad([](Args& a) { a.std = nullptr; }, "std is NULL");
  bad([](Args& a) { a.deviations = nullptr; }, "deviations is NULL");
  bad([](Args& a) { a.layout = nullptr; }, "layout is NULL");
  bad([](Args& a) { a.out = nullptr; }, "out is NULL and must hold 10240 bytes");
  bad([](Args& a) { a.mean = address<float>(0x10008); }, "mean is 0x10008");
  bad([](Args& a) { a.std = address<float>(0x20008); }, "std is 0x20008");
  bad([](Args& a) { a.deviations = address<float>(0x30008); }, "deviations is 0x30008");
  bad([](Args& a) { a.out = address(0x40008); }, "out is 0x40008, no multiple of 16");
  bad([](Args& a) { a.rank = -1; }, "rank is -1");
  bad([](Args& a) { a.size = 1000; }, "size is 1000, no multiple of 1024");
  bad([](Args& a) { a.num_tensors = -1; }, "num_tensors is -1");
  bad([](Args& a) { a.dtype = 6; }, "dtype is 6");
  bad([](Args& a) { a.num_samples = -1; }, "num_samples is -1");
  bad([](Args& a) { a.num_samples = kInt + 1; }, "num_samples is 2147483648");
  bad([](Args& a) { a.first_sample = -1; }, "first_sample is -1");
  bad([](Args& a) { a.first_sample = (int64_t{1} << 32) - 4; }, "first_sample is 4294967292; it must lie in [0, 4294967291]");
  bad([](Args& a) { a.antithetic = 2; }, "antithetic is 2");
  bad([](Args& a) { a.size = 1024 * kInt, a.num_samples = kInt; }, "out would take 2147483647 * 2199023254528 * 2 bytes");
  bad([](Args& a) { a.size = 1024 * kInt, a.rank = kInt; }, "deviations would take");
  bad([](Args& a) { a.out = address(0x30000); }, "out (10240 bytes at 0x30000) overlaps deviations");
  bad([](Args& a) { a.out = address(0x20000); }, "overlaps std");
  bad([](Args& a) { a.out = address(0x10000); }, "overlaps mean");
}

void sampled_lora() {
  using Args = swag_sampled_lora_args;
  const Args valid{address(0x10000), address(0x20000), address(0x30000), address(0x40000), address(0x50000), 2, 3, 16, 8, 4,
                   48, 64, 32, 24, 1.0f, SWAG_FLOAT16, SWAG_FLOAT32};
  const auto bad = [&](const std::function<void(Args&)>& change, const std::string& expected) {
    refused<Args>("swag_sampled_lora", swag_sampled_lora, valid, change, expected);
  };
  judge("swag_sampled_lora", swag_sampled_lora(nullptr, nullptr), "args is NULL");
  bad([](Args& a) { a.x = nullptr; }, "x is NULL");
  bad([](Args& a) { a.A = nullptr; }, "A is NULL");
  bad([](Args& a) { a.B = nullptr; }, "B is NULL");
  bad([](Args& a) { a.base = nullptr; }, "base is NULL");
  bad([](Args& a) { a.y = nullptr; }, "y is NULL and must hold 192 bytes");
  bad([](Args& a) { a.x = address(0x10001); }, "x is 0x10001, no multiple of 2");
  bad([](Args& a) { a.A = address(0x20001); }, "A is 0x20001");
  bad([](Args& a) { a.B = address(0x30001); }, "B is 0x30001");
  bad([](Args& a) { a.base = address(0x40002); }, "base is 0x40002, no multiple of 4");
  bad([](Args& a) { a.y = address(0x50002); }, "y is 0x50002, no multiple of 4");
  bad([](Args& a) { a.samples = -1; }, "samples is -1");
  bad([](Args& a) { a.rows = -1; }, "rows is -1");
  bad([](Args& a) { a.in = 0; }, "in is 0");
  bad([](Args& a) { a.in = (1 << 30) + 1; }, "in is 1073741825; it must lie in [1, 1073741824]");
  bad([](Args& a) { a.out = (1 << 30) + 1; }, "out is 1073741825; it must lie in [0, 1073741824]");
  bad([](Args& a) { a.rank = 0; }, "rank is 0; it must lie in [1, 64]");
  bad([](Args& a) { a.rank = 65; }, "rank is 65");
  bad([](Args& a) { a.dtype = 3; }, "dtype is 3");
  bad([](Args& a) { a.base_dtype = 7; }, "base_dtype is 7");
  bad([](Args& a) { a.stride_x = -48; }, "stride_x is -48; it must not be negative");
  bad([](Args& a) { a.stride_A = -1; }, "stride_A is -1");
  bad([](Args& a) { a.stride_B = -1; }, "stride_B is -1");
  bad([](Args& a) { a.stride_base = -1; }, "stride_base is -1");
  bad([](Args& a) { a.stride_A = kHuge; }, "A would take");
  bad([](Args& a) { a.stride_x = kHuge / 2 + 1; }, "x would take");
  bad([](Args& a) { a.samples = 5, a.stride_B = kHuge / 2 + 1; }, "B would take");
  bad([](Args& a) { a.samples = a.rows = kInt, a.out = 1 << 30, a.stride_base = 0; }, "would take");
  bad([](Args& a) { a.y = address(0x40004); }, "y (192 bytes at 0x40004) overlaps base (192 bytes at 0x40000)");
  bad([](Args& a) { a.y = address(0x40000), a.stride_base = 25; }, "stride_base 25 is not rows * out = 24");
  bad([](Args& a) { a.y = address(0x40000), a.stride_base = 8; }, "stride_base 8 is not rows * out = 24");
  bad([](Args& a) { a.y = address(0x40000), a.stride_base = 0; }, "stride_base 0 is not rows * out = 24");
  bad([](Args& a) { a.y = address(0x10010); }, "overlaps x");
  bad(
      [](Args& a) {
        a.samples = int64_t{1} << 29, a.rows = a.out = 1;
        a.stride_x = a.stride_A = a.stride_B = a.stride_base = 0, a.y = address(int64_t{1} << 40);
      },
      "needs 2147483648 blocks, more than a launch takes");
  bad([](Args& a) { a.y = address(0x20010); }, "overlaps A");
  bad([](Args& a) { a.y = address(0x30010); }, "overlaps B");
}

void bayes_average() {
  using Args = swag_bayes_average_args;
  Args valid{address(0x1000000), SWAG_FLOAT16, 4, 3, 100000, address<float>(0x2000000), address<float>(0x3000000),
             address<float>(0x4000000), address<float>(0x5000000), address<int64_t>(0x6000000), 2, address(0x7000000)};
  const auto bad = [&](const std::function<void(Args&)>& change, const std::string& expected) {
    refused<Args>("swag_bayes_average", swag_bayes_average, valid, change, expected);
  };
  judge("swag_bayes_average", swag_bayes_average(nullptr, nullptr), "args is NULL");
  bad([](Args& a) { a.logits = nullptr; }, "logits is NULL and must hold 2400000 bytes");
  bad([](Args& a) { a.log_sum = nullptr; }, "log_sum is NULL");
  bad([](Args& a) { a.m2 = nullptr; }, "m2 is NULL");
  bad([](Args& a) { a.votes = nullptr; }, "votes is NULL");
  bad([](Args& a) { a.entropy = nullptr; }, "entropy is NULL");
  bad([](Args& a) { a.count = nullptr; }, "count is NULL");
  bad([](Args& a) { a.logits = address(0x1000001); }, "logits is 0x1000001, no multiple of 2");
  bad([](Args& a) { a.log_sum = address<float>(0x2000002); }, "log_sum is 0x2000002, no multiple of 4");
  bad([](Args& a) { a.m2 = address<float>(0x3000002); }, "m2 is 0x3000002");
  bad([](Args& a) { a.votes = address<float>(0x4000002); }, "votes is 0x4000002");
  bad([](Args& a) { a.entropy = address<float>(0x5000002); }, "entropy is 0x5000002");
  bad([](Args& a) { a.count = address<int64_t>(0x6000004); }, "count is 0x6000004, no multiple of 8");
  bad([](Args& a) { a.dtype = -3; }, "dtype is -3");
  bad([](Args& a) { a.samples = -2; }, "samples is -2");
  bad([](Args& a) { a.batch = -1; }, "batch is -1");
  bad([](Args& a) { a.classes = kInt + 1; }, "classes is 2147483648");
  bad([](Args& a) { a.group = 3; }, "group is 3; it must lie in [1, 2]");
  bad([](Args& a) { a.group = 0; }, "group is 0");
  bad([](Args& a) { a.samples = 5; }, "samples is 5, no whole pairs of group 2");
  bad([](Args& a) { a.samples = kInt - 1, a.batch = a.classes = kInt; }, "logits would take");
  bad([](Args& a) { a.m2 = a.log_sum + 1; }, "log_sum (1200000 bytes at 0x2000000) overlaps m2");
  overlapping<Args>("swag_bayes_average", swag_bayes_average, valid,
                    {offsetof(Args, logits), offsetof(Args, log_sum), offsetof(Args, m2), offsetof(Args, votes),
                     offsetof(Args, entropy), offsetof(Args, count)});
  if (swag_bayes_average_workspace(&valid)) {
    bad([](Args& a) { a.workspace = nullptr; }, "workspace is NULL");
    bad([](Args& a) { a.workspace = address(0x7000008); }, "workspace is 0x7000008, no multiple of 16");
    for (const void* other : {valid.logits, static_cast<const void*>(valid.log_sum), static_cast<const void*>(valid.m2),
                              static_cast<const void*>(valid.votes), static_cast<const void*>(valid.entropy),
                              static_cast<const void*>(valid.count)})
      bad([=](Args& a) { a.workspace = const_cast<void*>(other); }, "overlaps");
  }
  valid.samples = -1;
  judge("swag_bayes_average", swag_bayes_average_workspace(&valid) ? SWAG_OK : SWAG_INVALID_ARGUMENT, "samples is -1");
}

// Empty problems need no memory and no GPU.
void empty() {
  const auto accepts = [](const char* function, int status) {
    std::printf("%s %s %d\n", status == SWAG_OK ? "accepted" : "WRONG", function, status);
    ++cases;
    wrong += status != SWAG_OK;
  };
  swag_draw_args draw{};
  accepts("swag_draw", swag_draw(&draw, nullptr));
  draw.size = 1024;
  draw.mean = draw.std = address<float>(16);
  accepts("swag_draw", swag_draw(&draw, nullptr));
  swag_sampled_lora_args lora{};
  lora.in = lora.rank = 1;
  accepts("swag_sampled_lora", swag_sampled_lora(&lora, nullptr));
  swag_bayes_average_args average{};
  average.group = 1;
  average.count = address<int64_t>(8);
  accepts("swag_bayes_average", swag_bayes_average(&average, nullptr));
}

// Another thread's failure is not this one's.
void threads() {
  swag_draw(nullptr, nullptr);
  bool right = false;
  std::thread([&] { right = !*swag_last_error() && swag_collect(nullptr, nullptr) == SWAG_INVALID_ARGUMENT; }).join();
  judge("swag_draw", right ? SWAG_INVALID_ARGUMENT : SWAG_OK, "args is NULL");
}

}  // namespace

int main() {
  collect();
  draw();
  sampled_lora();
  bayes_average();
  empty();
  threads();
  std::printf("%d cases, %d wrong\n", cases, wrong);
  return wrong != 0;
}
