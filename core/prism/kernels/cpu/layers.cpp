// Attention in two ways. One row streams its keys once, then its values. A prompt's rows are computed
// in blocks by the same tiles as the experts, with a running softmax over blocks of keys that start at
// multiples of kBlock of the sequence: a row's result depends neither on how its prompt was cut into
// chunks nor on other rows.
#include "layers.h"

#include <ATen/Parallel.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

#include "tasks.h"

namespace prism {
namespace {

constexpr int64_t kWorth = 1 << 14;  // elements that are worth a thread
constexpr int64_t kRange = 256;      // rows of one task; each task packs the keys it sees once
constexpr int64_t kRows = 48;        // rows computed together
constexpr int64_t kPanel = 64;       // keys, or columns of values, of one tile

// Value columns of the panel that begins at `first`, padded to what a tile takes.
int64_t panel_columns(int64_t left) { return left > 32 ? 64 : left > 16 ? 32 : 16; }

template <typename T>
void store_new(const Heads<const T>& rows, const AttentionStep<T>& step, T* buffer) {
  const int64_t grain = std::max<int64_t>(1, kWorth / (rows.tokens * rows.dim));
  at::parallel_for(0, rows.heads, grain, [&](int64_t begin, int64_t end) {
    for (int64_t head = begin; head < end; head++)
      for (int64_t i = 0; i < step.count; i++) {
        const Segment& s = step.segments[i];
        T* to = buffer + (head * step.room + s.kv_start + s.past) * rows.dim;
        for (int64_t t = s.begin; t < s.end; t++, to += rows.dim)
          std::memcpy(to, rows.at(t, head), rows.dim * sizeof(T));
      }
  });
}

// Scratch of one thread.
template <typename T>
class Attention {
 public:
  Attention(const KernelTable& isa, const AttentionStep<T>& step, T* out)
      : isa_(isa), rows_(rows_of<T>(isa)), step_(step), out_(out), dim_(step.query.dim),
        value_dim_(step.value.dim), group_(step.query.heads / step.value.heads) {}

  // One row of one sequence, the query heads of one kv head.
  void single(const Segment& s, int64_t kv_head) {
    const int64_t n = s.past + 1, room = step_.room;
    const T* keys = step_.keys + (kv_head * room + s.kv_start) * dim_;
    const T* values = step_.values + (kv_head * room + s.kv_start) * value_dim_;
    query_.resize(dim_);
    scores_.resize(group_ * n);
    mixed_.resize(value_dim_);
    std::vector<float> sums(group_);
    for (int64_t g = 0; g < group_; g++) {
      float* scores = scores_.data() + g * n;
      rows_.widen(step_.query.at(s.begin, kv_head * group_ + g), dim_, step_.scale, query_.data());
      rows_.key_scores(query_.data(), keys, n, dim_, scores);
      sums[g] = isa_.exp_sum(scores, n, isa_.row_max(scores, n));
    }
    for (int64_t g = 0; g < group_; g++) {
      std::fill(mixed_.begin(), mixed_.end(), 0.0f);
      rows_.mix_values(scores_.data() + g * n, values, n, value_dim_, mixed_.data());
      rows_.scale_to(mixed_.data(), value_dim_, 1.0f / sums[g],
                     out_at(s.begin, kv_head * group_ + g));
    }
  }

  // Rows [begin, end) of a prompt, the query heads of one kv head.
  void range(const Segment& s, int64_t begin, int64_t end, int64_t kv_head) {
    const int64_t rows = end - begin, first = s.past + begin - s.begin;  // position of row `begin`
    width_ = (value_dim_ - 1) / kPanel * kPanel + panel_columns((value_dim_ - 1) % kPanel + 1);
    query_.resize(kRows * kStride);
    scores_.resize(kRows * kStride);
    keys_.resize(kBlock * dim_);
    values_.resize(kBlock * width_);
    mixed_.assign(group_ * rows * width_, 0.0f);
    most_.assign(group_ * rows, -INFINITY);
    sums_.assign(group_ * rows, 0.0f);
    for (int64_t key = 0; key < first + rows; key += kBlock) {
      const int64_t n = std::min(kBlock, first + rows - key);
      pack(s, kv_head, key, n);
      for (int64_t g = 0; g < group_; g++)
        for (int64_t row = std::max<int64_t>(0, key - first); row < rows; row += kRows)
          block(begin, row, std::min(kRows, rows - row), first - key, n, kv_head, g, rows);
    }
    for (int64_t g = 0; g < group_; g++)
      for (int64_t row = 0; row < rows; row++)
        rows_.scale_to(mixed_.data() + (g * rows + row) * width_, value_dim_,
                       1.0f / sums_[g * rows + row], out_at(begin + row, kv_head * group_ + g));
  }

 private:
  T* out_at(int64_t token, int64_t head) const {
    return out_ + (token * step_.query.heads + head) * value_dim_;
  }

  // keys_: panels [dim, kPanel]; values_: panels [n, columns]. What pads them is zero.
  void pack(const Segment& s, int64_t kv_head, int64_t key, int64_t n) {
    const int64_t from = kv_head * step_.room + s.kv_start + key;
    float row[kMaxHeadDim];
    for (int64_t j = 0; j < (n + kPanel - 1) / kPanel * kPanel; j++) {
      if (j < n)
        rows_.widen(step_.keys + (from + j) * dim_, dim_, 1.0f, row);
      else
        std::fill(row, row + dim_, 0.0f);
      float* to = keys_.data() + j / kPanel * kPanel * dim_ + j % kPanel;
      for (int64_t i = 0; i < dim_; i++) to[i * kPanel] = row[i];
    }
    for (int64_t c = 0; c < width_; c += kPanel) {
      const int64_t columns = panel_columns(width_ - c), used = std::min(columns, value_dim_ - c);
      for (int64_t j = 0; j < n; j++) {
        float* to = values_.data() + c * n + j * columns;
        rows_.widen(step_.values + (from + j) * value_dim_ + c, used, 1.0f, to);
        std::fill(to + used, to + columns, 0.0f);
      }
    }
  }

  // Rows [row, row + count) against the packed block; `offset`: position of row 0 less that of key 0.
  void block(int64_t begin, int64_t row, int64_t count, int64_t offset, int64_t n, int64_t kv_head,
             int64_t g, int64_t rows) {
    const int64_t seen = std::min(n, offset + row + count);  // by the last of the rows
    float* c[kRows];
    for (int64_t r = 0; r < count; r++)
      rows_.widen(step_.query.at(begin + row + r, kv_head * group_ + g), dim_, step_.scale,
                  query_.data() + r * kStride);
    for (int64_t panel = 0; panel < seen; panel += kPanel) {
      for (int64_t r = 0; r < count; r++) c[r] = scores_.data() + r * kStride + panel;
      isa_.tile_f32(query_.data(), count, dim_, keys_.data() + panel * dim_, kPanel, c, false);
    }
    for (int64_t r = 0; r < count; r++)
      soften(g * rows + row + r, scores_.data() + r * kStride, std::min(n, offset + row + r + 1),
             seen);
    for (int64_t column = 0; column < width_; column += kPanel) {
      for (int64_t r = 0; r < count; r++)
        c[r] = mixed_.data() + (g * rows + row + r) * width_ + column;
      isa_.tile_f32(scores_.data(), count, seen, values_.data() + column * n,
                    panel_columns(width_ - column), c, true);
    }
  }

  // Scores become weights: `visible` of them, zeros up to `seen`; what the row has is rescaled.
  void soften(int64_t at, float* scores, int64_t visible, int64_t seen) {
    const float most = std::max(most_[at], isa_.row_max(scores, visible));
    const float shrink = std::exp(most_[at] - most);
    most_[at] = most;
    sums_[at] = sums_[at] * shrink + isa_.exp_sum(scores, visible, most);
    std::fill(scores + visible, scores + seen, 0.0f);
    float* mixed = mixed_.data() + at * width_;
    if (shrink < 1.0f) isa_.rows_f32.scale_to(mixed, width_, shrink, mixed);
  }

  const KernelTable& isa_;
  const RowKernels<T>& rows_;
  const AttentionStep<T>& step_;
  T* out_;
  int64_t dim_, value_dim_, group_, width_ = 0;
  std::vector<float> query_, scores_, keys_, values_, mixed_, most_, sums_;
};

struct Task {
  int64_t segment, begin, end;
};

}  // namespace

template <typename T>
void rms_norm(const KernelTable& isa, const T* x, const T* weight, int64_t rows, int64_t n, float eps,
              T* out) {
  at::parallel_for(0, rows, std::max<int64_t>(1, kWorth / n), [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; row++)
      rows_of<T>(isa).rms_norm(x + row * n, weight, n, eps, out + row * n);
  });
}

template <typename T>
void rotate(const KernelTable& isa, const Heads<const T>& x, const T* cosine, const T* sine, T* out) {
  const int64_t grain = std::max<int64_t>(1, kWorth / (x.heads * x.dim));
  at::parallel_for(0, x.tokens, grain, [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; t++)
      for (int64_t head = 0; head < x.heads; head++)
        rows_of<T>(isa).rotate(x.at(t, head), cosine + t * x.dim, sine + t * x.dim, x.dim / 2,
                               out + (t * x.heads + head) * x.dim);
  });
}

template <typename T>
void attend(const KernelTable& isa, const AttentionStep<T>& step, T* out) {
  store_new(step.key, step, step.keys);
  store_new(step.value, step, step.values);
  std::vector<Task> tasks;
  for (int64_t i = 0; i < step.count; i++)
    for (int64_t row = step.segments[i].begin; row < step.segments[i].end; row += kRange)
      tasks.push_back({i, row, std::min(step.segments[i].end, row + kRange)});
  const int64_t kv_heads = step.value.heads, count = static_cast<int64_t>(tasks.size());
  run_tasks(count * kv_heads, [&] {
    return [&, work = Attention<T>(isa, step, out)](int64_t index) mutable {
      const Task& task = tasks[count - 1 - index / kv_heads];  // the longest contexts first
      const Segment& s = step.segments[task.segment];
      if (s.end - s.begin == 1)
        work.single(s, index % kv_heads);
      else
        work.range(s, task.begin, task.end, index % kv_heads);
    };
  });
}

template void rms_norm<float>(const KernelTable&, const float*, const float*, int64_t, int64_t, float,
                              float*);
template void rms_norm<uint16_t>(const KernelTable&, const uint16_t*, const uint16_t*, int64_t,
                                 int64_t, float, uint16_t*);
template void rotate<float>(const KernelTable&, const Heads<const float>&, const float*, const float*,
                            float*);
template void rotate<uint16_t>(const KernelTable&, const Heads<const uint16_t>&, const uint16_t*,
                               const uint16_t*, uint16_t*);
template void attend<float>(const KernelTable&, const AttentionStep<float>&, float*);
template void attend<uint16_t>(const KernelTable&, const AttentionStep<uint16_t>&, uint16_t*);

}  // namespace prism
