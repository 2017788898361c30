// The checks that the CUDA runtime makes before a launch.

#include <cuda_runtime.h>

#include <unordered_map>

namespace {

constexpr size_t kSharedByDefault = 48 << 10, kParameters = 32764;
constexpr unsigned kThreads = 1024, kGridX = 0x7fffffff, kGridYZ = 65535, kCluster = 8;

int major = 9, multiprocessors = 4;

cudaError_t last = cudaSuccess;
std::string reason;

cudaError_t failed(cudaError_t error, const std::string& why) {
  reason = why;
  return last = error;
}

size_t most_shared() { return major >= 9 ? 227 << 10 : 99 << 10; }  // 163 on sm_80, but its kernels also run on sm_89

std::unordered_map<const void*, size_t>& allowed() {
  static std::unordered_map<const void*, size_t> bytes;
  return bytes;
}

std::string outside(const char* what, uint64_t value, uint64_t most) {
  if (value >= 1 && value <= most) return "";
  return std::string(what) + " is " + std::to_string(value) + ", not 1 to " + std::to_string(most);
}

std::string wrong(const cudaLaunchConfig_t& config, const void* kernel, unsigned cluster) {
  const dim3 grid = config.gridDim, block = config.blockDim;
  std::string found = outside("gridDim.x", grid.x, kGridX);
  if (found.empty()) found = outside("gridDim.y", grid.y, kGridYZ);
  if (found.empty()) found = outside("gridDim.z", grid.z, kGridYZ);
  if (found.empty()) found = outside("the number of threads", uint64_t{block.x} * block.y * block.z, kThreads);
  if (found.empty()) found = outside("the cluster's size", cluster, major >= 9 ? kCluster : 1);
  if (found.empty() && grid.x % cluster) found = "gridDim.x is no multiple of the cluster's size";
  const auto asked = allowed().find(kernel);
  const size_t most = asked == allowed().end() ? kSharedByDefault : std::max(asked->second, kSharedByDefault);
  if (found.empty() && config.dynamicSmemBytes > most)
    found = std::to_string(config.dynamicSmemBytes) + " bytes of shared memory are more than the kernel may have, " +
            std::to_string(most);
  return found;
}

}  // namespace

const char* cudaGetErrorName(cudaError_t error) {
  switch (error) {
    case cudaSuccess: return "cudaSuccess";
    case cudaErrorInvalidValue: return "cudaErrorInvalidValue";
    case cudaErrorInvalidConfiguration: return "cudaErrorInvalidConfiguration";
    case cudaErrorLaunchFailure: return "cudaErrorLaunchFailure";
  }
  return "unknown";
}

const char* cudaGetErrorString(cudaError_t error) { return error == cudaSuccess ? "no error" : reason.c_str(); }

cudaError_t cudaGetLastError() { return std::exchange(last, cudaSuccess); }

cudaError_t cudaMemsetAsync(void* address, int value, size_t bytes, cudaStream_t) {
  memset(address, value, bytes);
  return cudaSuccess;
}

cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}

cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  *value = attribute == cudaDevAttrMultiProcessorCount ? multiprocessors : major;
  return cudaSuccess;
}

namespace simt {

void imitate(int compute_capability_major, int number) {
  major = compute_capability_major;
  multiprocessors = number;
}

cudaError_t allow_shared_memory(const void* kernel, cudaFuncAttribute attribute, int bytes) {
  if (attribute != cudaFuncAttributeMaxDynamicSharedMemorySize || bytes < 0 || static_cast<size_t>(bytes) > most_shared())
    return failed(cudaErrorInvalidValue, "a block cannot have " + std::to_string(bytes) + " bytes of shared memory");
  allowed()[kernel] = bytes;
  return cudaSuccess;
}

cudaError_t launch(const cudaLaunchConfig_t& config, const void* kernel, size_t parameter_bytes,
                   void (*call)(const void*), const void* arguments) {
  unsigned cluster = 1;
  for (unsigned i = 0; i < config.numAttrs; ++i) {
    const auto& size = config.attrs[i].val.clusterDim;
    if (config.attrs[i].id != cudaLaunchAttributeClusterDimension || size.y != 1 || size.z != 1)
      return failed(cudaErrorInvalidValue, "only clusters along x are known here");
    cluster = size.x;
  }
  if (parameter_bytes > kParameters)
    return failed(cudaErrorInvalidValue, std::to_string(parameter_bytes) + " bytes of parameters");
  const std::string mistake = wrong(config, kernel, cluster);
  if (!mistake.empty()) return failed(cudaErrorInvalidConfiguration, mistake);
  const std::string fault =
      run({config.gridDim, config.blockDim, config.dynamicSmemBytes, cluster, call, arguments});
  return fault.empty() ? cudaSuccess : failed(cudaErrorLaunchFailure, fault);
}

}  // namespace simt
