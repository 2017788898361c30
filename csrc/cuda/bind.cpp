#include "cuda/bind.h"

#include <cstdint>
#include <new>
#include <stdexcept>

#include "include/swag_kernels.h"

namespace py = pybind11;
using Address = std::uintptr_t;

namespace swag::cuda {
namespace {

template <class T = void>
T* at(Address address) {
  return reinterpret_cast<T*>(address);
}

void raise_if_failed(int status) {
  if (status == SWAG_OK) return;
  if (status == SWAG_INVALID_ARGUMENT) throw py::value_error(swag_last_error());
  if (status == SWAG_OUT_OF_MEMORY) throw std::bad_alloc();
  throw std::runtime_error(swag_last_error());
}

// None gives up the interpreter's lock: a launch takes less than it may take to get that back.

void collect(Address params, Address dtypes, Address layout, int64_t num_tensors, int64_t size, Address mean, Address m2,
             Address deviations, int64_t rank, Address count, Address stream) {
  const swag_collect_args args{at<const void* const>(params), at<const int32_t>(dtypes), at<const swag_segment>(layout),
                               num_tensors,                   size,                      at<float>(mean),
                               at<float>(m2),                 at<float>(deviations),     rank,
                               at<int64_t>(count)};
  raise_if_failed(swag_collect(&args, at(stream)));
}

void draw(Address mean, Address std, Address deviations, int64_t rank, int64_t size, Address layout, int64_t num_tensors,
          Address out, int dtype, int64_t num_samples, uint64_t seed, int64_t first_sample, float diag_scale,
          float low_rank_scale, bool antithetic, Address stream) {
  const swag_draw_args args{at<const float>(mean), at<const float>(std), at<const float>(deviations), rank,       size,
                            at<const swag_segment>(layout), num_tensors, at(out),       dtype,        num_samples, seed,
                            first_sample,          diag_scale,           low_rank_scale, antithetic};
  raise_if_failed(swag_draw(&args, at(stream)));
}

void sampled_lora(Address x, Address A, Address B, Address base, Address y, int64_t samples, int64_t rows, int64_t in,
                  int64_t out, int64_t rank, int64_t stride_x, int64_t stride_A, int64_t stride_B, int64_t stride_base,
                  float scaling, int dtype, int base_dtype, Address stream) {
  const swag_sampled_lora_args args{at(x),    at(A),    at(B),    at(base),    at(y),   samples, rows,      in, out, rank,
                                    stride_x, stride_A, stride_B, stride_base, scaling, dtype,   base_dtype};
  raise_if_failed(swag_sampled_lora(&args, at(stream)));
}

void bayes_average(Address logits, int dtype, int64_t samples, int64_t batch, int64_t classes, Address log_sum, Address m2,
                   Address votes, Address entropy, Address count, int group, Address workspace, Address stream) {
  const swag_bayes_average_args args{at(logits),         dtype,         samples,          batch,
                                     classes,            at<float>(log_sum), at<float>(m2), at<float>(votes),
                                     at<float>(entropy), at<int64_t>(count), group,         at(workspace)};
  raise_if_failed(swag_bayes_average(&args, at(stream)));
}

size_t bayes_average_workspace(int dtype, int64_t samples, int64_t batch, int64_t classes, int group) {
  swag_bayes_average_args args{};
  args.dtype = dtype, args.samples = samples, args.batch = batch, args.classes = classes, args.group = group;
  return swag_bayes_average_workspace(&args);
}

}  // namespace

void bind(py::module_& m) {
  m.def("cuda_collect", &collect);
  m.def("cuda_draw", &draw);
  m.def("cuda_sampled_lora", &sampled_lora);
  m.def("cuda_bayes_average", &bayes_average);
  m.def("cuda_bayes_average_workspace", &bayes_average_workspace);
}

}  // namespace swag::cuda
