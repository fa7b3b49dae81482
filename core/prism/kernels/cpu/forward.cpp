// Two passes over the sub-experts that the batch hit, each free of write conflicts:
//   1. inner = weight * silu(gate x) * (up x): a task is one panel of one sub-expert,
//   2. out += down inner: a task is a range of output columns, walking all sub-experts in order.
// Each output element is thus summed by one thread in one fixed order: the result is the same whatever
// the number of threads, and a token's result does not depend on the other tokens of the batch.
#include "forward.h"

#include <c10/util/Exception.h>

#include <algorithm>
#include <cstring>
#include <vector>

#include "tasks.h"

namespace prism {
namespace {

constexpr int64_t kRows = 96;         // rows computed together; keeps packed rows in the second cache
constexpr int64_t kTokens = 1024;     // tokens a round: bounds the memory of `inner`
constexpr int64_t kOutBytes = 1 << 19;  // of `out` that one task of pass 2 works on

// bf16 is computed in pairs of neighbours along the inner dimension.
template <typename T> struct Element;
template <> struct Element<float> {
  using Unit = float;
  static constexpr int64_t kPerUnit = 1;
  static TileF32 tile(const KernelTable& isa) { return isa.tile_f32; }
  static auto gate(const KernelTable& isa) { return isa.gate_f32; }
};
template <> struct Element<uint16_t> {
  using Unit = uint32_t;
  static constexpr int64_t kPerUnit = 2;
  static TileBf16 tile(const KernelTable& isa) { return isa.tile_bf16; }
  static auto gate(const KernelTable& isa) { return isa.gate_bf16; }
};

struct Row {
  int64_t token;
  float weight;
};

// Rows of each sub-expert, sorted by sub-expert and, within one, by token.
struct Plan {
  std::vector<int64_t> begin;   // [experts * sub_experts + 1]
  std::vector<Row> rows;
  std::vector<int64_t> active;  // sub-experts with at least one row
};

int64_t panel_neurons(int64_t left) { return left > 16 ? 32 : left > 8 ? 16 : 8; }

template <typename Visit>
void for_each_selected(const Layout& layout, const Batch& batch, Visit visit) {
  const int64_t n = layout.sub_experts;
  for (int64_t pair = 0; pair < batch.tokens * batch.slots; pair++) {
    const int64_t expert = batch.index[pair];
    if (expert >= layout.experts) continue;
    const uint8_t* state = batch.state == nullptr ? nullptr : batch.state + pair * n;
    for (int64_t i = 0; i < n; i++)
      if (state == nullptr || state[i] != 0) visit(pair, expert * n + i);
  }
}

Plan make_plan(const Layout& layout, const Batch& batch) {
  Plan plan;
  const int64_t all = layout.experts * layout.sub_experts;
  plan.begin.assign(all + 1, 0);
  for_each_selected(layout, batch, [&](int64_t, int64_t s) { plan.begin[s + 1]++; });
  for (int64_t s = 0; s < all; s++) {
    if (plan.begin[s + 1] > 0) plan.active.push_back(s);
    plan.begin[s + 1] += plan.begin[s];
  }
  plan.rows.resize(plan.begin[all]);
  std::vector<int64_t> next(plan.begin.begin(), plan.begin.end() - 1);
  for_each_selected(layout, batch, [&](int64_t pair, int64_t s) {
    plan.rows[next[s]++] = {pair / batch.slots, batch.weights[pair]};
  });
  return plan;
}

template <typename T>
class Round {
 public:
  using Unit = typename Element<T>::Unit;
  static constexpr int64_t kPerUnit = Element<T>::kPerUnit;

  Round(const KernelTable& isa, const Layout& layout, const Batch& batch, const T* gate_up,
        const T* down, float* out)
      : isa_(isa), layout_(layout), x_(static_cast<const T*>(batch.x)), tokens_(batch.tokens),
        gate_up_(gate_up), down_(down), out_(out), plan_(make_plan(layout, batch)),
        width_(layout.padded_width()), inner_(new T[plan_.rows.size() * width_]) {}

  void run() {
    const int64_t panels = (layout_.width + 31) / 32;
    const int64_t active = static_cast<int64_t>(plan_.active.size());
    run_tasks(active * panels, [&] {
      return [this, panels, a = std::vector<Unit>(kRows * kStride)](int64_t task) mutable {
        gate_up_panel(plan_.active[task / panels], task % panels, a.data());
      };
    });
    const int64_t columns = layout_.padded_hidden() / 64;
    const int64_t share = (columns + at::get_num_threads() - 1) / at::get_num_threads();
    const int64_t fitting = std::max<int64_t>(1, kOutBytes / (tokens_ * 64 * 4));
    const int64_t group = std::min(share, fitting);
    run_tasks((columns + group - 1) / group, [&] {
      return [this, group, columns, a = std::vector<Unit>(kRows * kStride)](int64_t task) mutable {
        down_columns(task * group, std::min(columns, (task + 1) * group), a.data());
      };
    });
  }

 private:
  // inner[row][32 panel …] of all rows of one sub-expert.
  void gate_up_panel(int64_t s, int64_t panel, Unit* a) {
    const int64_t first = panel * 32;
    const int64_t neurons = panel_neurons(layout_.width - first), cols = 2 * neurons;
    const int64_t units = layout_.hidden / kPerUnit;
    const Unit* b = reinterpret_cast<const Unit*>(gate_up_ + s * layout_.hidden * 2 * width_ +
                                                  layout_.hidden * 2 * first);
    alignas(64) float product[kRows][64];
    float* c[kRows];
    for (int64_t r = 0; r < kRows; r++) c[r] = product[r];
    for (int64_t begin = plan_.begin[s]; begin < plan_.begin[s + 1]; begin += kRows) {
      const int64_t rows = std::min(kRows, plan_.begin[s + 1] - begin);
      for (int64_t k = 0; k < units; k += kBlock) {
        const int64_t block = std::min(kBlock, units - k);
        for (int64_t r = 0; r < rows; r++)
          std::memcpy(a + r * kStride,
                      x_ + plan_.rows[begin + r].token * layout_.hidden + k * kPerUnit,
                      block * sizeof(Unit));
        Element<T>::tile(isa_)(a, rows, block, b + k * cols, cols, c, k > 0);
      }
      for (int64_t r = 0; r < rows; r++)
        Element<T>::gate(isa_)(product[r], product[r] + neurons, neurons,
                               plan_.rows[begin + r].weight,
                               inner_.get() + (begin + r) * width_ + first);
    }
  }

  // out[:, 64 begin … 64 end] of all tokens.
  void down_columns(int64_t begin, int64_t end, Unit* a) {
    for (const int64_t s : plan_.active)
      for (int64_t row = plan_.begin[s]; row < plan_.begin[s + 1];)
        row = down_rows(s, row, begin, end, a);
  }

  // Adds up to kRows rows of one sub-expert, from `first` on; gives the row after the last one.
  int64_t down_rows(int64_t s, int64_t first, int64_t begin, int64_t end, Unit* a) {
    float* target[kRows];
    float* c[kRows];
    int64_t rows = 0;
    // A tile holds its rows' sums in registers, so no token may be in it twice.
    for (; rows < kRows && first + rows < plan_.begin[s + 1]; rows++) {
      const int64_t token = plan_.rows[first + rows].token;
      if (rows > 0 && token == plan_.rows[first + rows - 1].token) break;
      target[rows] = out_ + token * layout_.padded_hidden();
    }
    const int64_t units = width_ / kPerUnit;
    const Unit* weights =
        reinterpret_cast<const Unit*>(down_ + s * width_ * layout_.padded_hidden());
    for (int64_t k = 0; k < units; k += kBlock) {
      const int64_t block = std::min(kBlock, units - k);
      for (int64_t r = 0; r < rows; r++)
        std::memcpy(a + r * kStride, inner_.get() + (first + r) * width_ + k * kPerUnit,
                    block * sizeof(Unit));
      for (int64_t column = begin; column < end; column++) {
        for (int64_t r = 0; r < rows; r++) c[r] = target[r] + column * 64;
        Element<T>::tile(isa_)(a, rows, block, weights + (column * units + k) * 64, 64, c, true);
      }
    }
    return first + rows;
  }

  const KernelTable& isa_;
  const Layout& layout_;
  const T* x_;
  int64_t tokens_;
  const T* gate_up_;
  const T* down_;
  float* out_;
  Plan plan_;
  int64_t width_;
  std::unique_ptr<T[]> inner_;  // [rows, padded width], in the order of plan_.rows; left uninitialised
};

}  // namespace

int64_t Layout::padded_width() const {
  const int64_t whole = width / 32 * 32;
  return whole == width ? width : whole + panel_neurons(width - whole);
}

template <typename T>
void forward(const KernelTable& isa, const Layout& layout, const Batch& batch, const T* gate_up,
             const T* down, float* out) {
  for (int64_t first = 0; first < batch.tokens; first += kTokens) {
    Batch part = batch;
    part.tokens = std::min(kTokens, batch.tokens - first);
    part.x = static_cast<const T*>(batch.x) + first * layout.hidden;
    part.index = batch.index + first * batch.slots;
    part.weights = batch.weights + first * batch.slots;
    if (batch.state != nullptr)
      part.state = batch.state + first * batch.slots * layout.sub_experts;
    Round<T>(isa, layout, part, gate_up, down, out + first * layout.padded_hidden()).run();
  }
}

template void forward<float>(const KernelTable&, const Layout&, const Batch&, const float*,
                             const float*, float*);
template void forward<uint16_t>(const KernelTable&, const Layout&, const Batch&, const uint16_t*,
                                const uint16_t*, float*);

}  // namespace prism
