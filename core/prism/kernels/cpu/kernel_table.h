// What one instruction set offers to the rest of the extension: plain function pointers, so that a
// single library runs on any machine of its architecture and decides at run time.
#pragma once

#include <cstdint>

namespace prism {

// A operands are packed with this row stride (elements): a constant lets one base register address
// all rows of a tile, and the 16 beyond the block keep rows of a power-of-two length out of one cache set.
constexpr int64_t kBlock = 256;  // elements of the inner dimension computed at a time
constexpr int64_t kStride = kBlock + 16;

// c[r][0:cols] (+)= a[r][0:k] * b[0:k][0:cols]; r < rows, k <= kBlock, cols in {16, 32, 64}.
// Each output element is summed over k in ascending order by one accumulator, whatever `rows` is, so a
// row's result depends on no other row.
using TileF32 = void (*)(const float* a, int64_t rows, int64_t k, const float* b, int64_t cols,
                         float* const* c, bool accumulate);
// The same for bf16: an element is a pair of neighbours in k (low half first), k counts pairs.
using TileBf16 = void (*)(const uint32_t* a, int64_t rows, int64_t k, const uint32_t* b,
                          int64_t cols, float* const* c, bool accumulate);

// Masses of an expert's neuron groups per token, for the swap search. Arrays have `tokens` entries,
// a multiple of kSwapLanes, zero-padded.
constexpr int64_t kSwapLanes = 16;
struct SwapSums {
  // top[j]: sum of the (groups / 2 - 2 + j) heaviest groups, j = 0 … 4.
  float* top[5];
};

struct KernelTable {
  const char* name;
  TileF32 tile_f32;
  TileBf16 tile_bf16;
  // out[i] = scale * silu(gate[i]) * up[i]; n is a multiple of 8.
  void (*gate_f32)(const float* gate, const float* up, int64_t n, float scale, float* out);
  void (*gate_bf16)(const float* gate, const float* up, int64_t n, float scale, uint16_t* out);
  float (*dot)(const float* a, const float* b, int64_t n);
  // y[i] += scale * x[i]
  void (*axpy)(float scale, const float* x, int64_t n, float* y);
  // Change of the summed objective if neuron i of the group with masses a and neuron j of the one with
  // masses b changed places.
  double (*swap_gain)(const SwapSums& sums, const float* a, const float* b, const float* i,
                      const float* j, int64_t tokens);
  // Fills `sums` from masses [groups, tokens]; groups is 4, 8, 16 or 32.
  void (*top_sums)(const float* mass, int64_t groups, int64_t tokens, const SwapSums& sums);
};

// nullptr where the library was built for another architecture.
const KernelTable* avx512_bf16_kernels();
const KernelTable* avx512_kernels();
const KernelTable* avx2_kernels();
const KernelTable* portable_kernels();

// The best table this machine can run; a name ("avx512_bf16", "avx512", "avx2", "portable") asks for one.
const KernelTable& kernels();
const KernelTable* kernels_by_name(const char* name);

}  // namespace prism
