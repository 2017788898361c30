/* The header is C, and so is a program that uses it. */

#include "swag_kernels.h"

int main(void) {
  swag_bayes_average_args average = {0};
  if (swag_collect(0, 0) != SWAG_INVALID_ARGUMENT) return 1;
  if (swag_draw(0, 0) != SWAG_INVALID_ARGUMENT) return 2;
  if (swag_sampled_lora(0, 0) != SWAG_INVALID_ARGUMENT) return 3;
  if (swag_bayes_average(0, 0) != SWAG_INVALID_ARGUMENT) return 4;
  if (swag_bayes_average_workspace(&average) != 0) return 5;
  return swag_last_error()[0] == 0;
}
