// Inner loops of the swap search, compiled once for each instruction set (see tile.h). Sums run in
// kSwapLanes fixed lanes and use no product, so every instruction set gives the same bits.

// What the objective of one token becomes when a and b turn into a' and b' (a + b stays c).
// With S_k the k largest of all groups, the k largest without a and b are
//   min(S_{k+2} - c, S_{k+1} - max(a, b), S_k),
// and the m largest of the new set are the best of taking 0, 1 or 2 of a', b' beside the others.
// So a proposal costs O(1) per token however many groups there are.
PRISM_INLINE float smaller(float a, float b) { return a < b ? a : b; }
PRISM_INLINE float larger(float a, float b) { return a > b ? a : b; }

PRISM_TARGET static double swap_gain(const prism::SwapSums& sums, const float* a, const float* b,
                                     const float* i, const float* j, int64_t tokens) {
  const float* const s0 = sums.top[0];
  const float* const s1 = sums.top[1];
  const float* const s2 = sums.top[2];
  const float* const s3 = sums.top[3];
  const float* const s4 = sums.top[4];
  float gain[prism::kSwapLanes] = {};
  for (int64_t t = 0; t < tokens; t += prism::kSwapLanes)
    for (int64_t l = t; l < t + prism::kSwapLanes; l++) {
      const float change = j[l] - i[l], both = a[l] + b[l], most = larger(a[l], b[l]);
      const float new_most = larger(a[l] + change, b[l] - change);
      const float none = smaller(smaller(s4[l] - both, s3[l] - most), s2[l]);
      const float one = smaller(smaller(s3[l] - both, s2[l] - most), s1[l]) + new_most;
      const float two = smaller(smaller(s2[l] - both, s1[l] - most), s0[l]) + both;
      gain[l - t] += larger(larger(none, one), two) - s2[l];
    }
  double total = 0.0;
  for (int64_t l = 0; l < prism::kSwapLanes; l++) total += gain[l];
  return total;
}

// Sorts kSwapLanes tokens at once, largest group first (Batcher's odd-even merge sort).
template <int G>
PRISM_TARGET static void sort_groups(float (*v)[prism::kSwapLanes]) {
  for (int p = 1; p < G; p *= 2)
    for (int k = p; k >= 1; k /= 2)
      for (int j = k % p; j + k < G; j += 2 * k)
        for (int i = 0; i < k && i + j + k < G; i++) {
          if ((i + j) / (2 * p) != (i + j + k) / (2 * p)) continue;
          float* const x = v[i + j];
          float* const y = v[i + j + k];
          for (int l = 0; l < prism::kSwapLanes; l++) {
            const float high = larger(x[l], y[l]), low = smaller(x[l], y[l]);
            x[l] = high;
            y[l] = low;
          }
        }
}

template <int G>
PRISM_TARGET static void top_sums_of(const float* mass, int64_t tokens,
                                     const prism::SwapSums& sums) {
  float v[G][prism::kSwapLanes];
  for (int64_t t = 0; t < tokens; t += prism::kSwapLanes) {
    for (int g = 0; g < G; g++)
      for (int l = 0; l < prism::kSwapLanes; l++) v[g][l] = mass[g * tokens + t + l];
    sort_groups<G>(v);
    for (int l = 0; l < prism::kSwapLanes; l++) {
      float sum = 0.0f;
      for (int g = 0; g < G / 2 - 2; g++) sum += v[g][l];
      sums.top[0][t + l] = sum;
      for (int k = 0; k < 4; k++) sums.top[k + 1][t + l] = sum += v[G / 2 - 2 + k][l];
    }
  }
}

PRISM_TARGET static void top_sums(const float* mass, int64_t groups, int64_t tokens,
                                  const prism::SwapSums& sums) {
  if (groups == 4) top_sums_of<4>(mass, tokens, sums);
  if (groups == 8) top_sums_of<8>(mass, tokens, sums);
  if (groups == 16) top_sums_of<16>(mass, tokens, sums);
  if (groups == 32) top_sums_of<32>(mass, tokens, sums);
}
