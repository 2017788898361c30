#pragma once

#include <pybind11/pybind11.h>

namespace swag {

// bytes that are equal for two lists only if every tensor's address, device, dtype, shape and contiguity are, read by
// DLPack's exchange API. None if that is absent or of another major version, or if a tensor has not exactly one of the
// types or is more than its memory: complex and maybe conjugate, negative, sparse, on the meta device.
pybind11::object describe(pybind11::object exchange, pybind11::tuple types, pybind11::list tensors);

}  // namespace swag
