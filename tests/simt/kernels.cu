// What test_simt.py runs to see that the shim is right where the kernels are, and finds them out where they are wrong.

#include <string>

#include "cuda/device.h"
#include "cuda/launch.h"

namespace swag::cuda {
namespace {

std::string message;

template <bool Barrier>
__global__ void block_sum(const float* x, float* sums) {
  float* const parts = shared_memory<float>();
  const float part = warp_sum(x[blockIdx.x * blockDim.x + threadIdx.x]);
  if (threadIdx.x % 32 == 0) parts[threadIdx.x / 32] = part;
  if (Barrier) __syncthreads();
  float sum = 0;
  for (unsigned i = 0; i < blockDim.x / 32; ++i) sum += parts[i];
  if (threadIdx.x == (blockIdx.x * 37) % blockDim.x) sums[blockIdx.x] = sum;
}

// Every thread sums over the tiles what its neighbour has copied, in a pipeline of two stages. After the last come zeros.
enum Pipeline { kRight, kNoWait, kShortWait, kNoBarrierBeforeRefill };
template <Pipeline Fault>
__global__ void neighbour_sums(const float4* x, int tiles, float4* sums) {
  float4* const stages = shared_memory<float4>();
  const unsigned n = blockDim.x, neighbour = (threadIdx.x + n - 45) % n;
  float4 sum{};
  copy_async(stages + threadIdx.x, x + threadIdx.x, true);
  commit_copies();
  for (int tile = 0; tile < tiles; ++tile) {
    const bool more = tile + 1 < tiles;
    copy_async(stages + (tile + 1) % 2 * n + threadIdx.x, x + (tile + 1) * n + threadIdx.x, more);
    commit_copies();
    if (Fault != kNoWait) wait_for_copies<Fault == kShortWait ? 2 : 1>();
    __syncthreads();
    const float4 value = stages[tile % 2 * n + neighbour];
    sum = make_float4(sum.x + value.x, sum.y + value.y, sum.z + value.z, sum.w + value.w);
    if (Fault != kNoBarrierBeforeRefill) __syncthreads();
  }
  wait_for_copies<0>();
  __syncthreads();
  const float4 zeros = stages[tiles % 2 * n + neighbour];
  sums[threadIdx.x] = make_float4(sum.x + zeros.x, sum.y + zeros.y, sum.z + zeros.z, sum.w + zeros.w);
}

// When each thread came, and when again after a shuffle.
__global__ void clock(int* time, int* first, int* second) {
  const unsigned i = (blockIdx.z * gridDim.y + blockIdx.y) * gridDim.x + blockIdx.x;
  first[i * blockDim.x + threadIdx.x] = atomicAdd(time, 1);
  __syncwarp();
  second[i * blockDim.x + threadIdx.x] = atomicAdd(time, 1);
}

enum Divergence { kBarrierOfHalf, kTwoBarriers, kEarlyExit, kShuffleOfHalf, kBarrierAgainstShuffle, kPartialMask, kNeverSet };
__global__ void diverge(Divergence how, uint32_t* flag) {
  const bool low = threadIdx.x % 32 < 16;
  if (how == kBarrierOfHalf && low) __syncthreads();
  if (how == kTwoBarriers) {
    if (low)
      __syncthreads();
    else
      __syncthreads();
  }
  if (how == kEarlyExit) {
    if (threadIdx.x == 40) return;
    __syncthreads();
  }
  if (how == kShuffleOfHalf && low) __shfl_sync(kFullWarp, 1, 0);
  if (how == kBarrierAgainstShuffle) {
    if (low)
      __syncthreads();
    else
      __shfl_sync(kFullWarp, 1, 0);
  }
  if (how == kPartialMask && low) __syncwarp(0xffffu);
  if (how == kNeverSet)
    while (load_acquire(flag) == 0) __nanosleep(20);
}

__global__ void overrun(unsigned past) { shared_memory<char>()[blockDim.x + past] = 1; }

template <class T>
__global__ void multiply(const uint32_t (*a)[4], const uint32_t (*b)[2], float (*d)[4]) {
  mma<T>(d[threadIdx.x], a[threadIdx.x], b[threadIdx.x]);
}

// shared[i] = x[i]; lane l reads the row that begins at byte rows[l].
template <bool Barrier>
__global__ void transpose(const uint32_t* x, unsigned words, const int* rows, uint32_t (*found)[4]) {
  for (unsigned i = threadIdx.x; i < words; i += 32) shared_memory<uint32_t>()[i] = x[i];
  if (Barrier) __syncwarp();
  load_matrices(found[threadIdx.x], shared_memory<char>() + rows[threadIdx.x]);
}

// Each block of a cluster gives a number and gets all the others'.
template <bool Stay>
__global__ void exchange(const float* x, unsigned cluster, float* found) {
  if (threadIdx.x == 0) *shared_memory<float>() = x[blockIdx.x];
  sync_cluster();
  if (threadIdx.x < cluster)
    found[blockIdx.x * cluster + threadIdx.x] = load_from_block(shared_memory<float>(), threadIdx.x);
  if (Stay) sync_cluster();
}

// Blocks go on in the order of their tickets. state: the next ticket, and how many are through.
__global__ void chain(uint32_t* state, uint32_t* trace) {
  uint32_t* const ticket = shared_memory<uint32_t>();
  if (threadIdx.x == 0) *ticket = atomicAdd(&state[0], 1u);
  __syncthreads();
  if (threadIdx.x == 33) {
    while (load_acquire(&state[1]) != *ticket) __nanosleep(20);
    trace[*ticket] = *ticket == 0 ? 1 : 3 * trace[*ticket - 1] + 1;
    add_release(&state[1], 1);
  }
}

// No block goes on before all have come, which takes as many that run side by side.
__global__ void meet(uint32_t* come) {
  if (threadIdx.x == 0) {
    add_release(come, 1);
    while (load_acquire(come) < gridDim.x) __nanosleep(20);
  }
  __syncthreads();
}

__global__ void copy(const float* x, float* y, int n) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i < n) y[i] = x[i];
}

__global__ void copy_packs(const float* x, float* y) { store_pack(y + 4 * threadIdx.x, load_pack(x + 4 * threadIdx.x)); }

enum Undefined { kIndex, kShift, kOverflow };
__global__ void undefined(Undefined what, int n, int* found) {
  int values[4] = {1, 2, 3, 4};
  if (what == kIndex) values[n] = 5;
  if (what == kShift) values[0] = 1 << n;
  if (what == kOverflow) values[0] = n * 0x40000000;
  *found = values[0];
}

__global__ void nothing() {}

template <size_t Bytes>
struct Bulk {
  char bytes[Bytes];
};
template <class T>
__global__ void swallow(const __grid_constant__ T) {}

template <class... Params, class... Args>
const char* run(void (*kernel)(Params...), Grid grid, Args... args) {
  message.clear();
  launch("kernel", [] { return std::string("of the test"); }, kernel, grid, nullptr, args...);
  return message.c_str();
}

template <class T>
void convert(const float* x, uint16_t* y, int64_t n) {
  for (int64_t i = 0; i < n; ++i) y[i] = round_to<T>(x[i]).bits;
}
template <class T>
void convert(const uint16_t* x, float* y, int64_t n) {
  for (int64_t i = 0; i < n; ++i) y[i] = to_float(T{x[i]});
}

}  // namespace

int failed(swag_status status, std::string what) noexcept {
  message = std::move(what);
  return status;
}

}  // namespace swag::cuda

using namespace swag::cuda;

extern "C" {
#pragma GCC visibility push(default)

void schedule(int order, uint64_t seed) { simt::schedule(static_cast<simt::Order>(order), seed); }

const char* run_block_sum(bool barrier, unsigned blocks, const float* x, float* sums) {
  return run(barrier ? block_sum<true> : block_sum<false>, {blocks, 128, 16}, x, sums);
}
const char* run_neighbour_sums(int fault, const float4* x, int tiles, float4* sums) {
  const auto kernel = fault == kRight       ? neighbour_sums<kRight>
                      : fault == kNoWait    ? neighbour_sums<kNoWait>
                      : fault == kShortWait ? neighbour_sums<kShortWait>
                                            : neighbour_sums<kNoBarrierBeforeRefill>;
  return run(kernel, {1, 96, 2 * 96 * 16}, x, tiles, sums);
}
const char* run_clock(unsigned x, unsigned y, unsigned z, unsigned threads, int* time, int* first, int* second) {
  return run(clock, {dim3(x, y, z), threads}, time, first, second);
}
const char* run_diverge(int how) {
  uint32_t flag = 0;
  return run(diverge, {1, 64}, static_cast<Divergence>(how), &flag);
}
const char* run_overrun(unsigned threads, unsigned past) { return run(overrun, {1, threads, threads}, past); }
const char* run_multiply(bool half, const uint32_t (*a)[4], const uint32_t (*b)[2], float (*d)[4]) {
  return run(half ? multiply<float16> : multiply<bfloat16>, {1, 32}, a, b, d);
}
const char* run_transpose(bool barrier, const uint32_t* x, unsigned words, const int* rows, uint32_t (*found)[4]) {
  return run(barrier ? transpose<true> : transpose<false>, {1, 32, 4 * words}, x, words, rows, found);
}
const char* run_exchange(bool stay, unsigned blocks, unsigned cluster, const float* x, float* found) {
  return run(stay ? exchange<true> : exchange<false>, {blocks, 64, 4, cluster}, x, cluster, found);
}
const char* run_chain(unsigned blocks, uint32_t* state, uint32_t* trace) {
  return run(chain, {blocks, 64, 4}, state, trace);
}
const char* run_meet(unsigned blocks) {
  uint32_t come = 0;
  return run(meet, {blocks, 64}, &come);
}
const char* run_copy(const float* x, float* y, int n) { return run(copy, {unsigned(n + 31) / 32, 32}, x, y, n); }
const char* run_copy_packs(const float* x, float* y) { return run(copy_packs, {1, 32}, x, y); }
const char* run_undefined(int what, int n) {
  int found;
  return run(undefined, {1, 32}, static_cast<Undefined>(what), n, &found);
}
const char* run_nothing(unsigned x, unsigned y, unsigned z, unsigned threads, size_t shared, unsigned cluster) {
  return run(nothing, {dim3(x, y, z), threads, shared, cluster});
}
// Without the attribute that launch() sets.
const char* run_with_shared_memory(size_t bytes) {
  cudaLaunchConfig_t config{};
  config.blockDim = dim3(32);
  config.dynamicSmemBytes = bytes;
  return cudaGetErrorName(cudaLaunchKernelEx(&config, swallow<int>, 0));
}
const char* run_with_parameters(bool too_many) {
  return too_many ? run(swallow<Bulk<32765>>, {1, 32}, Bulk<32765>{}) : run(swallow<Bulk<32764>>, {1, 32}, Bulk<32764>{});
}
void imitate(int major, int multiprocessors) { simt::imitate(major, multiprocessors); }
void to_bits(bool half, const float* x, uint16_t* y, int64_t n) {
  half ? convert<float16>(x, y, n) : convert<bfloat16>(x, y, n);
}
void from_bits(bool half, const uint16_t* x, float* y, int64_t n) {
  half ? convert<float16>(x, y, n) : convert<bfloat16>(x, y, n);
}

#pragma GCC visibility pop
}
