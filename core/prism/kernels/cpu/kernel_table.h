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

// One row of floats, or of bf16 (uint16_t) computed in fp32 and rounded where the models round.
template <typename T>
struct RowKernels {
  // out = weight * (x / sqrt(mean(x^2) + eps))
  void (*rms_norm)(const T* x, const T* weight, int64_t n, float eps, T* out);
  // Both halves of a head of 2 * half: out = x * cosine + (-x high, x low) * sine.
  void (*rotate)(const T* x, const T* cosine, const T* sine, int64_t half, T* out);
  void (*widen)(const T* x, int64_t n, float scale, float* out);       // out = x * scale
  void (*scale_to)(const float* x, int64_t n, float scale, T* out);  // out = x * scale
  // out[j] = q . keys[j]; keys [n, dim]
  void (*key_scores)(const float* q, const T* keys, int64_t n, int64_t dim, float* out);
  // out += sum over j of p[j] * values[j]; values [n, dim]
  void (*mix_values)(const float* p, const T* values, int64_t n, int64_t dim, float* out);
  // out += scale * sum of the rows, n elements each
  void (*add_rows)(float scale, const T* const* rows, int64_t count, int64_t n, float* out);
};

struct KernelTable {
  const char* name;
  TileF32 tile_f32;
  TileBf16 tile_bf16;
  // out[i] = scale * silu(gate[i]) * up[i]; n is a multiple of 8.
  void (*gate_f32)(const float* gate, const float* up, int64_t n, float scale, float* out);
  void (*gate_bf16)(const float* gate, const float* up, int64_t n, float scale, uint16_t* out);
  // Change of the summed objective if neuron i of the group with masses a and neuron j of the one with
  // masses b changed places.
  double (*swap_gain)(const SwapSums& sums, const float* a, const float* b, const float* i,
                      const float* j, int64_t tokens);
  // Fills `sums` from masses [groups, tokens]; groups is 4, 8, 16 or 32.
  void (*top_sums)(const float* mass, int64_t groups, int64_t tokens, const SwapSums& sums);
  float (*row_max)(const float* s, int64_t n);
  // s = e^(s - most); gives the sum.
  float (*exp_sum)(float* s, int64_t n, float most);
  RowKernels<float> rows_f32;
  RowKernels<uint16_t> rows_bf16;
};

template <typename T>
const RowKernels<T>& rows_of(const KernelTable& table) {
  if constexpr (sizeof(T) == sizeof(float))
    return table.rows_f32;
  else
    return table.rows_bf16;
}

// nullptr where the library was built for another architecture.
const KernelTable* avx512_bf16_kernels();
const KernelTable* avx512_kernels();
const KernelTable* avx2_kernels();
const KernelTable* portable_kernels();

// The best table this machine can run; a name ("avx512_bf16", "avx512", "avx2", "portable") asks for one.
const KernelTable& kernels();
const KernelTable* kernels_by_name(const char* name);

}  // namespace prism
