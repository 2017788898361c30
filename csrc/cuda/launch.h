#pragma once

// Launches with an error that names the kernel and what it was launched for.

#include <cuda_runtime.h>

#include <string>
#include <utility>

#include "cuda/error.h"

namespace swag::cuda {

struct Grid {
  dim3 blocks;
  unsigned threads;
  size_t shared = 0;     // bytes of dynamic shared memory
  unsigned cluster = 1;  // blocks along x that share a cluster
};

// `describe()` gives the sizes as text and is called only if the launch fails.
template <class Describe, class... Params, class... Args>
int launch(const char* kernel_name, const Describe& describe, void (*kernel)(Params...), const Grid& grid, void* stream,
           Args&&... args) {
  cudaError_t error = cudaSuccess;
  if (grid.shared > 48 << 10)
    error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(grid.shared));
  if (error == cudaSuccess) {
    cudaLaunchAttribute attribute;
    attribute.id = cudaLaunchAttributeClusterDimension;
    attribute.val.clusterDim.x = grid.cluster;
    attribute.val.clusterDim.y = attribute.val.clusterDim.z = 1;
    cudaLaunchConfig_t config{};
    config.gridDim = grid.blocks;
    config.blockDim = dim3(grid.threads);
    config.dynamicSmemBytes = grid.shared;
    config.stream = static_cast<cudaStream_t>(stream);
    config.attrs = &attribute;
    config.numAttrs = grid.cluster > 1 ? 1 : 0;
    error = cudaLaunchKernelEx(&config, kernel, std::forward<Args>(args)...);
  }
  if (error == cudaSuccess) return SWAG_OK;
  cudaGetLastError();  // reported here, and not again by whoever calls the runtime next
  return failed(SWAG_CUDA_ERROR, std::string(kernel_name) + " (" + describe() + ") could not be launched: " +
                                     cudaGetErrorString(error) + " (" + cudaGetErrorName(error) + ")");
}

}  // namespace swag::cuda
