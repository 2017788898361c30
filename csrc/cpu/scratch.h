#pragma once

#include <cstdint>
#include <cstdlib>
#include <new>

#include "isa.h"

namespace swag::SWAG_ISA {

// Aligned, uninitialised memory. Not std::vector, whose weak symbols the linker would share between instruction sets.
template <class T>
class Scratch {
 public:
  explicit Scratch(int64_t n) : data_(static_cast<T*>(std::aligned_alloc(64, (static_cast<size_t>(n) * sizeof(T) / 64 + 1) * 64))) {
    if (!data_) throw std::bad_alloc();
  }
  ~Scratch() { std::free(data_); }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  T* get() const { return data_; }
  T& operator[](int64_t i) const { return data_[i]; }

 private:
  T* data_;
};

}  // namespace swag::SWAG_ISA
