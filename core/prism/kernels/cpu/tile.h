// The inner loops, written once over a vector of PRISM_LANES floats and compiled once for each
// instruction set. Include with PRISM_LANES, PRISM_TARGET and PRISM_DPBF16 set, inside an anonymous
// namespace of one isa_*.cpp.
// NB: include nothing here and instantiate no library template: a function that the linker merges with
// another file's copy could carry this file's instructions to a machine that lacks them.

#define PRISM_INLINE PRISM_TARGET static inline __attribute__((always_inline))

constexpr int kLanes = PRISM_LANES;
typedef float Vec __attribute__((vector_size(4 * PRISM_LANES)));
typedef int32_t VecInt __attribute__((vector_size(4 * PRISM_LANES)));
typedef uint32_t VecBits __attribute__((vector_size(4 * PRISM_LANES)));
typedef float VecAt __attribute__((vector_size(4 * PRISM_LANES), aligned(4), may_alias));
typedef uint32_t VecBitsAt __attribute__((vector_size(4 * PRISM_LANES), aligned(4), may_alias));

PRISM_INLINE Vec load(const float* p) { return *reinterpret_cast<const VecAt*>(p); }
PRISM_INLINE VecBits load(const uint32_t* p) { return *reinterpret_cast<const VecBitsAt*>(p); }
PRISM_INLINE void store(float* p, Vec v) { *reinterpret_cast<VecAt*>(p) = v; }

// Rows x (V * kLanes) outputs in registers; b has row stride ldb.
template <int R, int V>
PRISM_TARGET static void tile(const float* a, int64_t k, const float* b, int64_t ldb,
                              float* const* c, int64_t column, bool accumulate) {
  Vec acc[R][V];
#pragma GCC unroll 16
  for (int r = 0; r < R; r++)
#pragma GCC unroll 16
    for (int v = 0; v < V; v++)
      acc[r][v] = accumulate ? load(c[r] + column + v * kLanes) : Vec{};
  for (int64_t i = 0; i < k; i++, b += ldb) {
    Vec w[V];
#pragma GCC unroll 16
    for (int v = 0; v < V; v++) w[v] = load(b + v * kLanes);
#pragma GCC unroll 16
    for (int r = 0; r < R; r++) {
      const float x = a[r * prism::kStride + i];
#pragma GCC unroll 16
      for (int v = 0; v < V; v++) acc[r][v] += x * w[v];
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < R; r++)
#pragma GCC unroll 16
    for (int v = 0; v < V; v++) store(c[r] + column + v * kLanes, acc[r][v]);
}

template <int R, int V>
PRISM_TARGET static void tile(const uint32_t* a, int64_t k, const uint32_t* b, int64_t ldb,
                              float* const* c, int64_t column, bool accumulate) {
  Vec acc[R][V];
#pragma GCC unroll 16
  for (int r = 0; r < R; r++)
#pragma GCC unroll 16
    for (int v = 0; v < V; v++)
      acc[r][v] = accumulate ? load(c[r] + column + v * kLanes) : Vec{};
  for (int64_t i = 0; i < k; i++, b += ldb) {
    VecBits w[V];
#if PRISM_DPBF16
#pragma GCC unroll 16
    for (int v = 0; v < V; v++) w[v] = load(b + v * kLanes);
#pragma GCC unroll 16
    for (int r = 0; r < R; r++) {
      const __m512bh x = (__m512bh)_mm512_set1_epi32((int)a[r * prism::kStride + i]);
#pragma GCC unroll 16
      for (int v = 0; v < V; v++)
        acc[r][v] = (Vec)_mm512_dpbf16_ps((__m512)acc[r][v], (__m512bh)w[v], x);
    }
#else
    // A bf16 is the upper half of a float: widen by shifting. Low halves first, then high ones, so
    // that only one of the two sits in registers.
#pragma GCC unroll 16
    for (int v = 0; v < V; v++) w[v] = load(b + v * kLanes) << 16;
#pragma GCC unroll 16
    for (int r = 0; r < R; r++) {
      const Vec x = (Vec)((VecBits{} + a[r * prism::kStride + i]) << 16);
#pragma GCC unroll 16
      for (int v = 0; v < V; v++) acc[r][v] += x * (Vec)w[v];
    }
#pragma GCC unroll 16
    for (int v = 0; v < V; v++) w[v] = load(b + v * kLanes) & 0xffff0000u;
#pragma GCC unroll 16
    for (int r = 0; r < R; r++) {
      const Vec x = (Vec)((VecBits{} + a[r * prism::kStride + i]) & 0xffff0000u);
#pragma GCC unroll 16
      for (int v = 0; v < V; v++) acc[r][v] += x * (Vec)w[v];
    }
#endif
  }
#pragma GCC unroll 16
  for (int r = 0; r < R; r++)
#pragma GCC unroll 16
    for (int v = 0; v < V; v++) store(c[r] + column + v * kLanes, acc[r][v]);
}

// All rows of a slice of V vectors, R at a time; the rest by the tile of exactly that many rows.
template <int R, int V, typename T>
struct Rows {
  PRISM_TARGET static void run(const T* a, int64_t rows, int64_t k, const T* b, int64_t ldb,
                               float* const* c, int64_t column, bool accumulate) {
    for (; rows >= R; rows -= R, a += R * prism::kStride, c += R)
      tile<R, V>(a, k, b, ldb, c, column, accumulate);
    if (rows > 0) Rows<R - 1, V, T>::run(a, rows, k, b, ldb, c, column, accumulate);
  }
};
template <int V, typename T>
struct Rows<0, V, T> {
  PRISM_TARGET static void run(const T*, int64_t, int64_t, const T*, int64_t, float* const*,
                               int64_t, bool) {}
};

template <int R, int V, typename T>
PRISM_TARGET static void slices(const T* a, int64_t rows, int64_t k, const T* b, int64_t cols,
                                float* const* c, bool accumulate) {
  for (int64_t column = 0; column < cols; column += V * kLanes)
    Rows<R, V, T>::run(a, rows, k, b + column, cols, c, column, accumulate);
}

// Registers decide the shape: accumulators, one row of b and one broadcast must fit.
template <typename T>
PRISM_TARGET static void panel(const T* a, int64_t rows, int64_t k, const T* b, int64_t cols,
                               float* const* c, bool accumulate) {
#if PRISM_LANES == 16
  if (cols == 64) return slices<6, 4, T>(a, rows, k, b, cols, c, accumulate);
  if (cols == 32) return slices<8, 2, T>(a, rows, k, b, cols, c, accumulate);
  slices<8, 1, T>(a, rows, k, b, cols, c, accumulate);
#elif PRISM_LANES == 8
  // One row streams whole lines of b; more rows share narrow slices of it out of the first cache.
  if (rows == 1 && cols == 64) return slices<1, 8, T>(a, rows, k, b, cols, c, accumulate);
  slices<6, 2, T>(a, rows, k, b, cols, c, accumulate);
#else
  if (rows == 1 && cols >= 32) return slices<1, 8, T>(a, rows, k, b, cols, c, accumulate);
  slices<2, 4, T>(a, rows, k, b, cols, c, accumulate);
#endif
}

// e^x to 2 ulp: x = n ln 2 + r, |r| <= ln 2 / 2, polynomial in r (Cephes expf).
PRISM_INLINE Vec exponential(Vec x) {
  const Vec low = Vec{} - 87.3f, high = Vec{} + 88.0f, magic = Vec{} + 12582912.0f;  // 1.5 * 2^23
  x = x < low ? low : x;
  x = x > high ? high : x;
  const Vec n = (x * 1.44269504088896341f + magic) - magic;  // to the nearest integer
  const Vec r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  Vec p = Vec{} + 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  return p * (Vec)((__builtin_convertvector(n, VecInt) + 127) << 23);
}

PRISM_INLINE Vec gated(const float* gate, const float* up, float scale) {
  const Vec g = load(gate);
  return scale * (g / (1.0f + exponential(-g))) * load(up);
}

// The last, partial vector goes through a padded copy.
PRISM_TARGET static void gate_f32(const float* gate, const float* up, int64_t n, float scale,
                                  float* out) {
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) store(out + i, gated(gate + i, up + i, scale));
  if (i == n) return;
  float g[kLanes] = {}, u[kLanes] = {}, o[kLanes];
  for (int64_t j = i; j < n; j++) g[j - i] = gate[j], u[j - i] = up[j];
  store(o, gated(g, u, scale));
  for (int64_t j = i; j < n; j++) out[j] = o[j - i];
}

PRISM_TARGET static void gate_bf16(const float* gate, const float* up, int64_t n, float scale,
                                   uint16_t* out) {
  float rounded[64];
  for (int64_t i = 0; i < n; i += 64) {
    const int64_t m = n - i < 64 ? n - i : 64;
    gate_f32(gate + i, up + i, m, scale, rounded);
    for (int64_t j = 0; j < m; j++) {  // round to nearest even
      uint32_t bits;
      __builtin_memcpy(&bits, rounded + j, 4);
      out[i + j] = (uint16_t)((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
    }
  }
}

PRISM_TARGET static void tile_f32(const float* a, int64_t rows, int64_t k, const float* b,
                                  int64_t cols, float* const* c, bool accumulate) {
  panel<float>(a, rows, k, b, cols, c, accumulate);
}
PRISM_TARGET static void tile_bf16(const uint32_t* a, int64_t rows, int64_t k, const uint32_t* b,
                                   int64_t cols, float* const* c, bool accumulate) {
  panel<uint32_t>(a, rows, k, b, cols, c, accumulate);
}
