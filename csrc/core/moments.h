#pragma once

// Welford's update (1962) of a running mean and a running sum of squared deviations. F is float or a vector of them.

#include "scalar.h"

namespace swag::core {

// The n-th value (n from 1) is theta. Returns theta minus the new mean, which is also SWAG's deviation column.
template <class F>
SWAG_HD F welford(F theta, F n, F& mean, F& m2) {
  const F delta = theta - mean;
  mean = mean + delta / n;
  const F deviation = theta - mean;
  m2 = fma(delta, deviation, m2);
  return deviation;
}

}  // namespace swag::core
