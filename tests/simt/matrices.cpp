#include "cuda/ptx.h"

namespace swag::cuda {

void load_matrices(void* const* operands) {
  for (int lane = 0; lane < 32; ++lane)
    for (int matrix = 0; matrix < 4; ++matrix) {
      const auto& from = *static_cast<LoadMatrices*>(operands[8 * matrix + lane / 4]);
      static_cast<LoadMatrices*>(operands[lane])->words[matrix] = from.row[lane % 4];
    }
}

// Products of two 16-bit floats are exact in a float.
template <class T>
void mma(void* const* operands) {
  float a[16][16], b[16][8];
  const auto element = [](uint32_t word, int i) { return to_float(T{static_cast<uint16_t>(word >> 16 * i)}); };
  for (int lane = 0; lane < 32; ++lane) {
    const auto& operand = *static_cast<const Mma*>(operands[lane]);
    const int g = lane / 4, q = lane % 4;
    for (int i = 0; i < 2; ++i)
      for (int half = 0; half < 2; ++half) {
        const int k = 2 * q + i + 8 * half;
        a[g][k] = element(operand.a[2 * half], i);
        a[g + 8][k] = element(operand.a[2 * half + 1], i);
        b[k][g] = element(operand.b[half], i);
      }
  }
  for (int row = 0; row < 16; ++row) {
    float sums[8] = {};
    for (int k = 0; k < 16; ++k)
      for (int column = 0; column < 8; ++column) sums[column] += a[row][k] * b[k][column];
    for (int column = 0; column < 8; ++column) {
      const int lane = row % 8 * 4 + column / 2;
      static_cast<const Mma*>(operands[lane])->d[row / 8 * 2 + column % 2] += sums[column];
    }
  }
}
template void mma<bfloat16>(void* const*);
template void mma<float16>(void* const*);

}  // namespace swag::cuda
