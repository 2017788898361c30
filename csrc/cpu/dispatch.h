#pragma once

#include <string>
#include <vector>

#include "kernels.h"

namespace swag {

// The kernels in use: the best instruction set this processor has, or the one selected by name.
const Kernels& kernels();
void select_isa(const std::string& name);          // throws std::invalid_argument
std::vector<std::string> supported_isas();         // best first
bool openmp_enabled();

}  // namespace swag
