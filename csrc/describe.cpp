#include "describe.h"

#include <cstdint>
#include <vector>

#include "third_party/dlpack/dlpack.h"

namespace py = pybind11;

namespace swag {
namespace {

// As torch has it: sizes of 1 may have any stride, and an empty tensor is contiguous.
bool is_contiguous(const DLTensor& tensor, int64_t numel) {
  if (!tensor.strides || !numel) return true;
  int64_t expected = 1;
  for (int i = tensor.ndim - 1; i >= 0; --i) {
    if (tensor.shape[i] == 1) continue;
    if (tensor.strides[i] != expected) return false;
    expected *= tensor.shape[i];
  }
  return true;
}

bool is_one_of(const py::tuple& types, py::handle object) {
  for (py::handle type : types)
    if (type.ptr() == reinterpret_cast<PyObject*>(Py_TYPE(object.ptr()))) return true;
  return false;
}

bool has_plain_values(const DLTensor& tensor, int64_t numel) {
  return (tensor.data || !numel) && tensor.dtype.code != kDLComplex;
}

}  // namespace

py::object describe(py::object exchange, py::tuple types, py::list tensors) {
  constexpr char kName[] = "dlpack_exchange_api";
  if (!PyCapsule_IsValid(exchange.ptr(), kName)) return py::none();
  const auto* api = static_cast<const DLPackExchangeAPI*>(PyCapsule_GetPointer(exchange.ptr(), kName));
  if (api->header.version.major != DLPACK_MAJOR_VERSION || !api->dltensor_from_py_object_no_sync) return py::none();

  std::vector<int64_t> words;
  words.reserve(5 * tensors.size());
  for (size_t i = 0; i < tensors.size(); ++i) {
    const auto object = py::reinterpret_borrow<py::object>(PyList_GET_ITEM(tensors.ptr(), i));
    if (!is_one_of(types, object)) return py::none();
    DLTensor tensor;
    if (api->dltensor_from_py_object_no_sync(object.ptr(), &tensor)) {
      PyErr_Clear();
      return py::none();
    }
    const DLDataType dtype = tensor.dtype;
    int64_t numel = 1;
    for (int d = 0; d < tensor.ndim; ++d) numel *= tensor.shape[d];
    if (!has_plain_values(tensor, numel)) return py::none();
    words.push_back(static_cast<int64_t>(reinterpret_cast<std::uintptr_t>(tensor.data) + tensor.byte_offset));
    words.push_back(int64_t{tensor.device.device_type} << 32 | static_cast<uint32_t>(tensor.device.device_id));
    words.push_back(int64_t{tensor.ndim} << 33 | int64_t{is_contiguous(tensor, numel)} << 32 |
                    int64_t{dtype.code} << 24 | int64_t{dtype.bits} << 16 | int64_t{dtype.lanes});
    words.insert(words.end(), tensor.shape, tensor.shape + tensor.ndim);
    // DLPack does not tell, and asking for all would take longer than the rest. A negative view of more elements is not
    // contiguous: it is every second real number of complex memory.
    if (numel == 1 && object.attr("is_neg")().cast<bool>()) return py::none();
  }
  return py::bytes(reinterpret_cast<const char*>(words.data()), words.size() * sizeof(int64_t));
}

}  // namespace swag
