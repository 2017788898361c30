#include <cuda_runtime.h>
#include <pybind11/pybind11.h>

#include <stdexcept>

#include "cuda/bind.h"

namespace {

void schedule(const std::string& name, uint64_t seed) {
  if (name == "forward") return simt::schedule(simt::Order::forward, seed);
  if (name == "reversed") return simt::schedule(simt::Order::reversed, seed);
  if (name == "random") return simt::schedule(simt::Order::random, seed);
  throw std::invalid_argument("the schedule '" + name + "' is not one of: forward, reversed, random");
}

}  // namespace

PYBIND11_MODULE(_simt, m) {
  swag::cuda::bind(m);
  m.def("schedule", &schedule, pybind11::arg("name"), pybind11::arg("seed") = 0);
  m.def("imitate", &simt::imitate, pybind11::arg("major") = 9, pybind11::arg("multiprocessors") = 4);
  m.def("launches", &simt::launches);
}
