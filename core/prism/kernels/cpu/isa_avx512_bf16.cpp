// AVX-512 with the bf16 dot product (Cooper Lake, Sapphire Rapids, Zen 4 and later).
#include "kernel_table.h"

#if defined(__x86_64__)
#include <immintrin.h>
#define PRISM_LANES 16
#define PRISM_TARGET __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,fma")))
#define PRISM_DPBF16 1

namespace {
#include "tile.h"
#include "rows.h"
#include "swap_tile.h"
}

const prism::KernelTable* prism::avx512_bf16_kernels() {
  static const KernelTable table{"avx512_bf16", tile_f32,  tile_bf16, gate_f32, gate_bf16,
                                 swap_gain, top_sums, row_max, exp_sum,
                                 kRowKernels<float>, kRowKernels<uint16_t>};
  return &table;
}
#else
const prism::KernelTable* prism::avx512_bf16_kernels() { return nullptr; }
#endif
