// AVX2 with FMA (Haswell, Zen and later).
#include "kernel_table.h"

#if defined(__x86_64__)
#define PRISM_LANES 8
#define PRISM_TARGET __attribute__((target("avx2,fma")))
#define PRISM_DPBF16 0

namespace {
#include "tile.h"
#include "rows.h"
#include "swap_tile.h"
}

const prism::KernelTable* prism::avx2_kernels() {
  static const KernelTable table{"avx2", tile_f32,  tile_bf16, gate_f32, gate_bf16,
                                 swap_gain, top_sums, row_max, exp_sum,
                                 kRowKernels<float>, kRowKernels<uint16_t>};
  return &table;
}
#else
const prism::KernelTable* prism::avx2_kernels() { return nullptr; }
#endif
