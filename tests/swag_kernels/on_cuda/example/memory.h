#pragma once

// Memory that the GPU and the host both see, zeroed, for the life of the program. Without a GPU the host's own, which no
// launch will ever read.

#include <cuda_runtime.h>

#include <cstdint>
#include <cstdlib>
#include <cstring>

inline bool has_gpu() {
  int number = 0;
  return cudaGetDeviceCount(&number) == cudaSuccess && number > 0;
}

template <class T>
T* shared_array(size_t size) {
  void* memory = nullptr;
  const size_t bytes = (size * sizeof(T) + 15) / 16 * 16;
  if (!has_gpu())
    memory = std::aligned_alloc(16, bytes);
  else if (cudaMallocManaged(&memory, bytes) != cudaSuccess)
    std::abort();
  return static_cast<T*>(std::memset(memory, 0, bytes));
}

template <class T>
T* shared_array(size_t size, T value) {
  T* array = shared_array<T>(size);
  for (size_t i = 0; i < size; ++i) array[i] = value;
  return array;
}

// Exact for the values here, which have few digits.
inline uint16_t bfloat16(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return static_cast<uint16_t>(bits >> 16);
}
