// Any machine: 128-bit vectors, which the compiler maps to SSE2, NEON or plain code.
#include "kernel_table.h"

#define PRISM_LANES 4
#define PRISM_TARGET 
#define PRISM_DPBF16 0

namespace {
#include "tile.h"
#include "rows.h"
#include "swap_tile.h"
}

const prism::KernelTable* prism::portable_kernels() {
  static const KernelTable table{"portable", tile_f32,  tile_bf16, gate_f32, gate_bf16,
                                 swap_gain, top_sums, row_max, exp_sum,
                                 kRowKernels<float>, kRowKernels<uint16_t>};
  return &table;
}
