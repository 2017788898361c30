// The table of one instruction set's kernels; compiled once per set like the kernels themselves.

#include "isa.h"
#include "kernels.h"

namespace swag::SWAG_ISA {

void collect(const CollectArgs&);
void draw(const DrawArgs&);
void sampled_lora(const SampledLoraArgs&);
void sampled_lora_backward(const SampledLoraBackwardArgs&);
void bayes_average(const BayesAverageArgs&);
void philox(const uint32_t*, uint64_t, uint32_t*, int64_t);
void normal(const uint32_t*, float*, int64_t);
void exp_log(const float*, float*, float*, int64_t);

#define SWAG_STRING_(x) #x
#define SWAG_STRING(x) SWAG_STRING_(x)

extern const Kernels table;
const Kernels table{SWAG_STRING(SWAG_ISA), collect, draw, sampled_lora, sampled_lora_backward, bayes_average, philox, normal, exp_log};

}  // namespace swag::SWAG_ISA
