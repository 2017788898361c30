#pragma once

// Philox4x32-10 (Salmon, Moraes, Dror and Shaw 2011, "Parallel random numbers: as easy as 1, 2, 3").

#include "scalar.h"

namespace swag::core {

// Streams of the counter's last word.
constexpr uint32_t stream_eps = 0, stream_z = 1;

// Four random words from the counter (c0, c1, c2, c3) = (quad, sample, tensor, stream) under a 64-bit key, low word first.
// U is uint32_t or a vector of them.
template <class U>
SWAG_HD void philox(U& c0, U& c1, U& c2, U& c3, uint64_t key) {
  uint32_t k0 = static_cast<uint32_t>(key), k1 = static_cast<uint32_t>(key >> 32);
  for (int round = 0; round < 10; ++round) {
    U high0, high1;
    const U low0 = mul(c0, U(0xD2511F53u), high0);
    const U low1 = mul(c2, U(0xCD9E8D57u), high1);
    c0 = high1 ^ c1 ^ U(k0);
    c1 = low1;
    c2 = high0 ^ c3 ^ U(k1);
    c3 = low0;
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
}

}  // namespace swag::core
