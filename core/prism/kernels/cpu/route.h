// The two thin steps around the forward: selection by sub-routers, and means for what was dropped.
#pragma once

#include <cstdint>

#include "kernel_table.h"

namespace prism {

constexpr int64_t kMaxSubExperts = 64;

struct Routing {
  int64_t tokens, slots, experts, sub_experts, hidden;
  const int64_t* index;   // [tokens, slots]; >= experts: off
  const float* weights;   // [tokens, slots]
};

// state[t, k, n] = log weights[t, k] + x[t] . router[e, n] + bias[e, n] > log_theta[t], or log_theta[t] is
// minus infinity. x [tokens, hidden] fp32; router in floats, or in bf16 as T = uint16_t.
template <typename T>
void select(const KernelTable& isa, const Routing& routing, const float* x, const T* router,
            const float* bias, const float* log_theta, uint8_t* state);

// out[t] += weights[t, k] * means[knot[t], e, n] for each sub-expert that is off; out [tokens, hidden].
template <typename T>
void compensate(const KernelTable& isa, const Routing& routing, const uint8_t* state,
                const T* means, const int64_t* knot, float* out);

}  // namespace prism
