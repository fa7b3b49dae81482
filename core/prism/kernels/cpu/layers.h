// The parts of a decoder layer around its linears and experts: norm, rotary embedding, attention over
// a KV buffer. T is float or uint16_t (bf16).
#pragma once

#include <cstdint>

#include "kernel_table.h"

namespace prism {

// A [tokens, heads, dim] view: strides in elements, the last dimension contiguous.
template <typename T>
struct Heads {
  T* data;
  int64_t tokens, heads, dim, token_stride, head_stride;
  T* at(int64_t token, int64_t head) const {
    return data + token * token_stride + head * head_stride;
  }
};

// Rows [begin, end) of a step belong to one sequence, whose keys lie in the buffer from `kv_start`;
// `past` of them are there already.
struct Segment {
  int64_t begin, end, kv_start, past;
};

// KV buffers are [kv heads, room, dim].
template <typename T>
struct AttentionStep {
  Heads<const T> query, key, value;
  T* keys;
  T* values;
  int64_t room;
  const Segment* segments;
  int64_t count;
  float scale;
};

constexpr int64_t kMaxHeadDim = kBlock;

// out, x [rows, n].
template <typename T>
void rms_norm(const KernelTable& isa, const T* x, const T* weight, int64_t rows, int64_t n, float eps,
              T* out);

// cosine, sine [tokens, dim]; out [tokens, heads, dim].
template <typename T>
void rotate(const KernelTable& isa, const Heads<const T>& x, const T* cosine, const T* sine, T* out);

// Writes the step's keys and values to the buffers, then out [tokens, heads, value dim]: causal
// attention of each row over its sequence. The head dim is at most kMaxHeadDim.
template <typename T>
void attend(const KernelTable& isa, const AttentionStep<T>& step, T* out);

}  // namespace prism
