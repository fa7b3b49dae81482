// Sub-expert forward on raw memory: no tensor, no Python. Layouts are those of kernels/cpu_pack.py.
#pragma once

#include <cstdint>

#include "kernel_table.h"

namespace prism {

struct Layout {
  int64_t experts, sub_experts, hidden, width;

  // Neurons of a sub-expert, padded to whole panels: 32 neurons each, the last 8, 16 or 32.
  int64_t padded_width() const;
  int64_t padded_hidden() const { return (hidden + 63) / 64 * 64; }
};

struct Batch {
  int64_t tokens, slots;
  const void* x;           // [tokens, hidden] fp32 or bf16
  const int64_t* index;    // [tokens, slots]; >= experts: skipped
  const float* weights;    // [tokens, slots]
  const uint8_t* state;    // [tokens, slots, sub_experts]; nullptr: all on
};

// out [tokens, padded_hidden] fp32, zeroed by the caller. T is float or uint16_t (bf16).
template <typename T>
void forward(const KernelTable& isa, const Layout& layout, const Batch& batch, const T* gate_up,
             const T* down, float* out);

}  // namespace prism
