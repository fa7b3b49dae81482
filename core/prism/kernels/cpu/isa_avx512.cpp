// AVX-512 without bf16 instructions (Skylake-SP to Ice Lake): bf16 is widened.
#include "kernel_table.h"

#if defined(__x86_64__)
#define PRISM_LANES 16
#define PRISM_TARGET __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,fma")))
#define PRISM_DPBF16 0

namespace {
#include "tile.h"
#include "rows.h"
#include "swap_tile.h"
}

const prism::KernelTable* prism::avx512_kernels() {
  static const KernelTable table{"avx512", tile_f32,  tile_bf16, gate_f32, gate_bf16,
                                 swap_gain, top_sums, row_max, exp_sum,
                                 kRowKernels<float>, kRowKernels<uint16_t>};
  return &table;
}
#else
const prism::KernelTable* prism::avx512_kernels() { return nullptr; }
#endif
