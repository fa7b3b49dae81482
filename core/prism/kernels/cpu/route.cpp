#include "route.h"

#include <ATen/Parallel.h>

#include <algorithm>
#include <cmath>

namespace prism {
namespace {

constexpr int64_t kColumns = 128;  // of `out` and `means` worked on at a time: a part of means fits a cache
constexpr int64_t kWorth = 1 << 15;  // multiplications that are worth a thread

}  // namespace

template <typename T>
void select(const KernelTable& isa, const Routing& r, const float* x, const T* router,
            const float* bias, const float* log_theta, uint8_t* state) {
  const int64_t n = r.sub_experts, per_token = r.slots * n * r.hidden;
  const int64_t grain = std::max<int64_t>(1, kWorth / per_token);
  at::parallel_for(0, r.tokens, grain, [&](int64_t begin, int64_t end) {
    for (int64_t pair = begin * r.slots; pair < end * r.slots; pair++) {
      const int64_t token = pair / r.slots, expert = r.index[pair];
      const float theta = log_theta[token], weight = std::log(r.weights[pair]);
      uint8_t* own = state + pair * n;
      if (expert >= r.experts || theta == -INFINITY) {
        std::fill(own, own + n, expert < r.experts);
        continue;
      }
      float score[kMaxSubExperts];
      rows_of<T>(isa).key_scores(x + token * r.hidden, router + expert * n * r.hidden, n,
                                 r.hidden, score);
      for (int64_t i = 0; i < n; i++) own[i] = weight + bias[expert * n + i] + score[i] > theta;
    }
  });
}

template <typename T>
void compensate(const KernelTable& isa, const Routing& r, const uint8_t* state, const T* means,
                const int64_t* knot, float* out) {
  const int64_t n = r.sub_experts, blocks = (r.hidden + kColumns - 1) / kColumns;
  const int64_t grain = std::max<int64_t>(1, kWorth / (r.tokens * r.slots * n * kColumns));
  at::parallel_for(0, blocks, grain, [&](int64_t begin, int64_t end) {
    for (int64_t first = begin * kColumns; first < std::min(end * kColumns, r.hidden);
         first += kColumns)
      for (int64_t pair = 0; pair < r.tokens * r.slots; pair++) {
        const int64_t token = pair / r.slots, expert = r.index[pair];
        if (expert >= r.experts) continue;
        const T* mean = means + (knot[token] * r.experts + expert) * n * r.hidden + first;
        const T* dropped[kMaxSubExperts];
        int64_t count = 0;
        for (int64_t i = 0; i < n; i++)
          if (state[pair * n + i] == 0) dropped[count++] = mean + i * r.hidden;
        if (count > 0)
          rows_of<T>(isa).add_rows(r.weights[pair], dropped, count, std::min(kColumns, r.hidden - first),
                                   out + token * r.hidden + first);
      }
  });
}

template void select(const KernelTable&, const Routing&, const float*, const float*, const float*,
                     const float*, uint8_t*);
template void select(const KernelTable&, const Routing&, const float*, const uint16_t*,
                     const float*, const float*, uint8_t*);
template void compensate(const KernelTable&, const Routing&, const uint8_t*, const float*,
                         const int64_t*, float*);
template void compensate(const KernelTable&, const Routing&, const uint8_t*, const uint16_t*,
                         const int64_t*, float*);

}  // namespace prism
