#pragma once

// What the kernels and their launches use of CUDA C++ and of its runtime, for a C++ compiler that knows neither.

#include <math.h>

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <tuple>
#include <type_traits>
#include <utility>

#include "simt.h"
#include "vectors.h"

#define CUDART_VERSION 13000

#define __global__
#define __device__
#define __host__
#define __grid_constant__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)

// Every collective operation takes the line it stands in, by which two of one kind are told apart.
inline void __syncthreads(int line = __builtin_LINE()) { simt::across_block("__syncthreads", line); }
inline void __nanosleep(unsigned, int line = __builtin_LINE()) { simt::sleep("__nanosleep", line); }
inline void __threadfence() {}
inline void __threadfence_block() {}

namespace simt {

template <class T>
struct Shuffle {
  T value;
  unsigned from;
};

inline void check_mask(unsigned mask, const char* name) {
  if (mask != ~0u) fault(std::string("calls ") + name + " for a part of its warp");
}

// The value of lane `from`.
template <class T>
T shuffle(const char* name, int line, unsigned mask, T value, unsigned from) {
  check_mask(mask, name);
  Shuffle<T> operand{value, from};
  across_warp(name, line, &operand, [](void* const* operands) {
    T values[32];
    for (int i = 0; i < 32; ++i) values[i] = static_cast<Shuffle<T>*>(operands[i])->value;
    for (int i = 0; i < 32; ++i) {
      auto& operand = *static_cast<Shuffle<T>*>(operands[i]);
      operand.value = values[operand.from];
    }
  });
  return operand.value;
}

}  // namespace simt

inline void __syncwarp(unsigned mask = ~0u, int line = __builtin_LINE()) {
  simt::check_mask(mask, "__syncwarp");
  simt::across_warp("__syncwarp", line, nullptr, nullptr);
}
template <class T>
T __shfl_sync(unsigned mask, T value, int from, int line = __builtin_LINE()) {
  return simt::shuffle("__shfl_sync", line, mask, value, from % 32u);
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int by, int line = __builtin_LINE()) {
  return simt::shuffle("__shfl_xor_sync", line, mask, value, (simt::self->lane ^ by) % 32u);
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned by, int line = __builtin_LINE()) {
  const unsigned from = simt::self->lane + by;
  return simt::shuffle("__shfl_down_sync", line, mask, value, from < 32 ? from : simt::self->lane);
}
template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned by, int line = __builtin_LINE()) {
  const unsigned lane = simt::self->lane;
  return simt::shuffle("__shfl_up_sync", line, mask, value, by <= lane ? lane - by : lane);
}
inline unsigned __ballot_sync(unsigned mask, int predicate, int line = __builtin_LINE()) {
  simt::check_mask(mask, "__ballot_sync");
  unsigned word = predicate != 0;
  simt::across_warp("__ballot_sync", line, &word, [](void* const* operands) {
    unsigned all = 0;
    for (int i = 0; i < 32; ++i) all |= *static_cast<unsigned*>(operands[i]) << i;
    for (int i = 0; i < 32; ++i) *static_cast<unsigned*>(operands[i]) = all;
  });
  return word;
}
inline int __any_sync(unsigned mask, int predicate, int line = __builtin_LINE()) {
  return __ballot_sync(mask, predicate, line) != 0;
}
inline int __all_sync(unsigned mask, int predicate, int line = __builtin_LINE()) {
  return __ballot_sync(mask, predicate, line) == ~0u;
}

template <class T>
T atomicAdd(T* address, std::common_type_t<T> value) {
  static_assert(std::is_integral<T>::value, "the order of a sum of floats would be left to chance");
  const T before = *address;
  *address = before + value;
  simt::progress();
  return before;
}

template <class T>
T __ldg(const T* p) { return *p; }
template <class T>
T __ldcs(const T* p) { return *p; }
template <class T>
T __ldcg(const T* p) { return *p; }
template <class T>
void __stcs(T* p, std::common_type_t<T> value) { *p = value; }
template <class T>
void __stcg(T* p, std::common_type_t<T> value) { *p = value; }

inline unsigned __float_as_uint(float x) {
  unsigned bits;
  memcpy(&bits, &x, sizeof bits);
  return bits;
}
inline float __uint_as_float(unsigned bits) {
  float x;
  memcpy(&x, &bits, sizeof x);
  return x;
}

template <class A, class B, class = std::enable_if_t<std::is_arithmetic<A>::value && std::is_arithmetic<B>::value>>
constexpr std::common_type_t<A, B> min(A a, B b) { return b < a ? b : a; }
template <class A, class B, class = std::enable_if_t<std::is_arithmetic<A>::value && std::is_arithmetic<B>::value>>
constexpr std::common_type_t<A, B> max(A a, B b) { return a < b ? b : a; }

enum cudaError_t {
  cudaSuccess = 0,
  cudaErrorInvalidValue = 1,
  cudaErrorInvalidConfiguration = 9,
  cudaErrorLaunchFailure = 719,
};
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize = 8 };
enum cudaDeviceAttr { cudaDevAttrMultiProcessorCount = 16, cudaDevAttrComputeCapabilityMajor = 75 };
enum cudaLaunchAttributeID { cudaLaunchAttributeClusterDimension = 4 };
using cudaStream_t = struct CUstream_st*;

struct cudaLaunchAttribute {
  cudaLaunchAttributeID id;
  struct {
    struct {
      unsigned x, y, z;
    } clusterDim;
  } val;
};
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
  cudaLaunchAttribute* attrs;
  unsigned numAttrs;
};

const char* cudaGetErrorName(cudaError_t error);
const char* cudaGetErrorString(cudaError_t error);  // of the last error of that kind, with what was found wrong
cudaError_t cudaGetLastError();
cudaError_t cudaMemsetAsync(void* address, int value, size_t bytes, cudaStream_t stream);
cudaError_t cudaGetDevice(int* device);
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device);

namespace simt {

// The device that is imitated: sm_90 with few multiprocessors, if nothing else is asked for.
void imitate(int compute_capability_major, int multiprocessors);

cudaError_t allow_shared_memory(const void* kernel, cudaFuncAttribute attribute, int bytes);
cudaError_t launch(const cudaLaunchConfig_t& config, const void* kernel, size_t parameter_bytes,
                   void (*call)(const void*), const void* arguments);

template <class... Params>
constexpr size_t parameter_bytes() {
  size_t end = 0;
  ((end = (end + alignof(Params) - 1) / alignof(Params) * alignof(Params) + sizeof(Params)), ...);
  return end;
}

template <class... Params>
struct Call {
  void (*kernel)(Params...);
  std::tuple<Params...> arguments;
};

}  // namespace simt

template <class... Params>
cudaError_t cudaFuncSetAttribute(void (*kernel)(Params...), cudaFuncAttribute attribute, int value) {
  return simt::allow_shared_memory(reinterpret_cast<const void*>(kernel), attribute, value);
}

template <class... Params, class... Args>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Params...), Args&&... args) {
  static_assert((std::is_trivially_copyable<Params>::value && ...), "a parameter is copied to the device as bytes");
  const simt::Call<Params...> call{kernel, std::tuple<Params...>(std::forward<Args>(args)...)};
  const auto run = [](const void* call) {
    const auto& [kernel, arguments] = *static_cast<const simt::Call<Params...>*>(call);
    std::apply(kernel, arguments);
  };
  return simt::launch(*config, reinterpret_cast<const void*>(kernel), simt::parameter_bytes<Params...>(), run, &call);
}
