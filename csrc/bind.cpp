#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <vector>

#include "cpu/dispatch.h"
#include "describe.h"
#ifdef SWAG_CUDA
#include "cuda/bind.h"
#endif

namespace py = pybind11;
using swag::Dtype;

namespace {

template <class T = void>
T* at(std::uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

void collect(const std::vector<std::uintptr_t>& params, const std::vector<int>& dtypes, std::uintptr_t layout,
             std::uintptr_t mean, std::uintptr_t m2, std::uintptr_t slot, int64_t count, int threads) {
  static_assert(sizeof(Dtype) == sizeof(int));
  swag::CollectArgs args{reinterpret_cast<const void* const*>(params.data()),
                         reinterpret_cast<const Dtype*>(dtypes.data()),
                         at<swag::Segment>(layout),
                         static_cast<int64_t>(params.size()),
                         at<float>(mean),
                         at<float>(m2),
                         at<float>(slot),
                         count,
                         threads};
  py::gil_scoped_release release;
  swag::kernels().collect(args);
}

void draw(std::uintptr_t mean, std::uintptr_t std, std::uintptr_t deviations, int64_t rank, int64_t size,
          std::uintptr_t layout, int64_t num_tensors, std::uintptr_t out, int dtype, int64_t num_samples, uint64_t seed,
          uint32_t first_sample, float diag_scale, float low_rank_scale, bool antithetic, int threads) {
  swag::DrawArgs args{at<float>(mean), at<float>(std),     at<float>(deviations), rank,        size,
                      at<swag::Segment>(layout), num_tensors, at(out),            Dtype(dtype), num_samples,
                      seed,            first_sample,       diag_scale,            low_rank_scale, antithetic,
                      threads};
  py::gil_scoped_release release;
  swag::kernels().draw(args);
}

void sampled_lora(std::uintptr_t x, std::uintptr_t A, std::uintptr_t B, std::uintptr_t base, std::uintptr_t y,
                  int64_t samples, int64_t rows, int64_t in, int64_t out, int64_t rank, int64_t stride_x,
                  int64_t stride_A, int64_t stride_B, int64_t stride_base, float scaling, int dtype, int base_dtype,
                  int threads) {
  swag::SampledLoraArgs args{at(x),    at(A),    at(B),    at(base),    at(y),   samples,      rows,
                             in,       out,      rank,     stride_x,    stride_A, stride_B,    stride_base,
                             scaling,  Dtype(dtype), Dtype(base_dtype), threads};
  py::gil_scoped_release release;
  swag::kernels().sampled_lora(args);
}

void sampled_lora_backward(std::uintptr_t grad, std::uintptr_t x, std::uintptr_t A, std::uintptr_t B, std::uintptr_t dx,
                           std::uintptr_t dA, std::uintptr_t dB, int64_t samples, int64_t rows, int64_t in, int64_t out,
                           int64_t rank, int64_t stride_x, int64_t stride_A, int64_t stride_B, float scaling, int dtype,
                           int base_dtype, int threads) {
  swag::SampledLoraBackwardArgs args{at(grad), at(x),    at(A),    at(B),   at<float>(dx), at<float>(dA),
                                     at<float>(dB), samples, rows, in,      out,           rank,
                                     stride_x, stride_A, stride_B, scaling, Dtype(dtype),  Dtype(base_dtype),
                                     threads};
  py::gil_scoped_release release;
  swag::kernels().sampled_lora_backward(args);
}

void bayes_average(std::uintptr_t logits, int dtype, int64_t samples, int64_t batch, int64_t classes,
                   std::uintptr_t log_sum, std::uintptr_t m2, std::uintptr_t votes, std::uintptr_t entropy,
                   int64_t count, int group, int threads) {
  swag::BayesAverageArgs args{at(logits),       Dtype(dtype),     samples,            batch, classes, at<float>(log_sum),
                              at<float>(m2),    at<float>(votes), at<float>(entropy), count, group,   threads};
  py::gil_scoped_release release;
  swag::kernels().bayes_average(args);
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Native kernels of swag_kernels. Addresses and sizes come in already checked by swag_kernels.ops.";
  m.def("collect", &collect);
  m.def("draw", &draw);
  m.def("sampled_lora", &sampled_lora);
  m.def("sampled_lora_backward", &sampled_lora_backward);
  m.def("bayes_average", &bayes_average);
  m.def("describe", &swag::describe);
  m.def("philox", [](std::uintptr_t counters, uint64_t key, std::uintptr_t words, int64_t n) {
    swag::kernels().philox(at<uint32_t>(counters), key, at<uint32_t>(words), n);
  });
  m.def("normal", [](std::uintptr_t words, std::uintptr_t normals, int64_t n) {
    swag::kernels().normal(at<uint32_t>(words), at<float>(normals), n);
  });
  m.def("exp_log", [](std::uintptr_t x, std::uintptr_t exps, std::uintptr_t logs, int64_t n) {
    swag::kernels().exp_log(at<float>(x), at<float>(exps), at<float>(logs), n);
  });
  m.def("isa", [] { return std::string(swag::kernels().isa); });
  m.def("select_isa", &swag::select_isa);
  m.def("supported_isas", &swag::supported_isas);
  m.def("openmp_enabled", &swag::openmp_enabled);
#ifdef SWAG_CUDA
  swag::cuda::bind(m);
#endif
}
