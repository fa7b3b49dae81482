#include "swap_search.h"

#include <algorithm>
#include <vector>

#include "kernel_table.h"

namespace prism {
namespace {

// splitmix64 (Steele, Lea, Flood 2014); the Python fallback draws the same numbers.
uint64_t draw(uint64_t& state) {
  uint64_t z = state += 0x9e3779b97f4a7c15ull;
  z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9ull;
  z = (z ^ (z >> 27)) * 0x94d049bb133111ebull;
  return z ^ (z >> 31);
}

class Search {
 public:
  Search(const float* mass, int64_t neurons, int64_t tokens, int64_t groups, int32_t* order)
      : isa_(kernels()), groups_(groups), size_(neurons / groups), tokens_(tokens),
        padded_((tokens + kSwapLanes - 1) / kSwapLanes * kSwapLanes), order_(order),
        neuron_(neurons * padded_), group_(groups * padded_), top_(5 * padded_) {
    for (int64_t i = 0; i < neurons; i++)
      std::copy_n(mass + i * tokens, tokens, neuron_.data() + i * padded_);
    for (int64_t j = 0; j < 5; j++) sums_.top[j] = top_.data() + j * padded_;
    weigh();
  }

  // Proposes to swap the neurons at two positions; does it where the objective does not fall.
  void propose(int64_t p, int64_t q) {
    if (p / size_ == q / size_) return;
    float* const a = group(p / size_);
    float* const b = group(q / size_);
    const float* const i = neuron(order_[p]);
    const float* const j = neuron(order_[q]);
    if (isa_.swap_gain(sums_, a, b, i, j, padded_) < 0.0) return;
    for (int64_t t = 0; t < padded_; t++) {
      const float change = j[t] - i[t];
      a[t] += change;
      b[t] -= change;
    }
    std::swap(order_[p], order_[q]);
    isa_.top_sums(group_.data(), groups_, padded_, sums_);
  }

  double objective() {
    weigh();  // from the neurons again: the running sums carry rounding
    double sum = 0.0;
    for (int64_t t = 0; t < tokens_; t++) sum += sums_.top[2][t];
    return sum / static_cast<double>(tokens_);
  }

 private:
  float* group(int64_t g) { return group_.data() + g * padded_; }
  const float* neuron(int64_t i) const { return neuron_.data() + i * padded_; }

  void weigh() {
    std::fill(group_.begin(), group_.end(), 0.0f);
    for (int64_t p = 0; p < groups_ * size_; p++) {
      float* const g = group(p / size_);
      const float* const m = neuron(order_[p]);
      for (int64_t t = 0; t < padded_; t++) g[t] += m[t];
    }
    isa_.top_sums(group_.data(), groups_, padded_, sums_);
  }

  const KernelTable& isa_;
  int64_t groups_, size_, tokens_, padded_;
  int32_t* order_;
  std::vector<float> neuron_;  // [neurons, padded tokens]
  std::vector<float> group_;   // [groups, padded tokens]
  std::vector<float> top_;
  SwapSums sums_;
};

}  // namespace

double swap_search(const float* mass, int64_t neurons, int64_t tokens, int64_t groups,
                   int64_t proposals, uint64_t seed, int32_t* order) {
  Search search(mass, neurons, tokens, groups, order);
  for (int64_t n = 0; n < proposals; n++) {
    const int64_t p = static_cast<int64_t>(draw(seed) % static_cast<uint64_t>(neurons));
    const int64_t q = static_cast<int64_t>(draw(seed) % static_cast<uint64_t>(neurons));
    search.propose(p, q);
  }
  return search.objective();
}

}  // namespace prism
