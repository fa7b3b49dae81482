// Inner loops over one row of floats or bf16: norms, rotary embedding, softmax, decode attention.
// Included after tile.h, under the same rules.

typedef uint16_t VecHalf __attribute__((vector_size(2 * PRISM_LANES)));
typedef uint16_t VecHalfAt
    __attribute__((vector_size(2 * PRISM_LANES), aligned(2), may_alias));

PRISM_INLINE Vec load(const uint16_t* p) {
  const VecHalf half = *reinterpret_cast<const VecHalfAt*>(p);
  return (Vec)(__builtin_convertvector(half, VecBits) << 16);
}
PRISM_INLINE float load_one(const float* p) { return *p; }
PRISM_INLINE float load_one(const uint16_t* p) {
  const uint32_t bits = (uint32_t)*p << 16;
  float value;
  __builtin_memcpy(&value, &bits, 4);
  return value;
}

// The bits of the nearest bf16 (ties to even) in the upper half of each lane.
PRISM_INLINE VecBits nearest_bf16(Vec v) {
  const VecBits bits = (VecBits)v;
  return bits + 0x7fffu + ((bits >> 16) & 1u);
}
PRISM_INLINE Vec rounded(Vec v, const float*) { return v; }
PRISM_INLINE Vec rounded(Vec v, const uint16_t*) { return (Vec)(nearest_bf16(v) & 0xffff0000u); }
PRISM_INLINE void store(uint16_t* p, Vec v) {
  *reinterpret_cast<VecHalfAt*>(p) = __builtin_convertvector(nearest_bf16(v) >> 16, VecHalf);
}

PRISM_INLINE float lane_sum(Vec v) {
  float lanes[kLanes];
  store(lanes, v);
#pragma GCC unroll 4
  for (int width = kLanes / 2; width > 0; width /= 2)
#pragma GCC unroll 8
    for (int i = 0; i < width; i++) lanes[i] += lanes[i + width];
  return lanes[0];
}

// The last, partial vector of a row goes through a zero-padded copy.
template <typename T>
PRISM_INLINE Vec load_part(const T* p, int64_t n) {
  float lanes[kLanes] = {};
  for (int64_t i = 0; i < n; i++) lanes[i] = load_one(p + i);
  return load(lanes);
}
template <typename T>
PRISM_INLINE void store_part(T* p, Vec v, int64_t n) {
  T lanes[kLanes];
  store(lanes, v);
  for (int64_t i = 0; i < n; i++) p[i] = lanes[i];
}

template <typename T>
PRISM_TARGET static void rms_norm(const T* x, const T* weight, int64_t n, float eps, T* out) {
  const int64_t whole = n / kLanes * kLanes;
  Vec acc[4] = {};
  for (int64_t i = 0; i < whole; i += kLanes) {
    const Vec v = load(x + i);
    acc[i / kLanes % 4] += v * v;
  }
  const Vec tail = load_part(x + whole, n - whole);
  acc[0] += tail * tail;
  const float mean = lane_sum((acc[0] + acc[1]) + (acc[2] + acc[3])) / (float)n;
  const float scale = 1.0f / __builtin_sqrtf(mean + eps);
  for (int64_t i = 0; i < whole; i += kLanes)
    store(out + i, load(weight + i) * rounded(load(x + i) * scale, x));
  if (whole < n)
    store_part(out + whole, load_part(weight + whole, n - whole) * rounded(tail * scale, x),
               n - whole);
}

template <typename T>
PRISM_TARGET static void rotate(const T* x, const T* cosine, const T* sine, int64_t half, T* out) {
  int64_t i = 0;
  for (; i + kLanes <= half; i += kLanes) {
    const Vec low = load(x + i), high = load(x + half + i);
    store(out + i, rounded(low * load(cosine + i), x) - rounded(high * load(sine + i), x));
    store(out + half + i, rounded(high * load(cosine + half + i), x) +
                              rounded(low * load(sine + half + i), x));
  }
  if (i == half) return;
  const int64_t n = half - i;
  const Vec low = load_part(x + i, n), high = load_part(x + half + i, n);
  store_part(out + i,
             rounded(low * load_part(cosine + i, n), x) - rounded(high * load_part(sine + i, n), x),
             n);
  store_part(out + half + i,
             rounded(high * load_part(cosine + half + i, n), x) +
                 rounded(low * load_part(sine + half + i, n), x),
             n);
}

template <typename T>
PRISM_TARGET static void widen(const T* x, int64_t n, float scale, float* out) {
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) store(out + i, load(x + i) * scale);
  for (; i < n; i++) out[i] = load_one(x + i) * scale;
}

template <typename T>
PRISM_TARGET static void scale_to(const float* x, int64_t n, float scale, T* out) {
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) store(out + i, load(x + i) * scale);
  if (i < n) store_part(out + i, load_part(x + i, n - i) * scale, n - i);
}

PRISM_TARGET static float row_max(const float* s, int64_t n) {
  Vec most = Vec{} - __builtin_inff();
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    const Vec v = load(s + i);
    most = v > most ? v : most;
  }
  float lanes[kLanes];
  store(lanes, most);
  float result = lanes[0];
  for (int v = 1; v < kLanes; v++) result = lanes[v] > result ? lanes[v] : result;
  for (; i < n; i++) result = s[i] > result ? s[i] : result;
  return result;
}

PRISM_TARGET static float exp_sum(float* s, int64_t n, float most) {
  Vec sum{};
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    const Vec e = exponential(load(s + i) - most);
    store(s + i, e);
    sum += e;
  }
  float result = lane_sum(sum);
  if (i < n) {
    float lanes[kLanes] = {};
    store(lanes, exponential(load_part(s + i, n - i) - most));
    for (int64_t j = 0; j < n - i; j++) result += s[i + j] = lanes[j];
  }
  return result;
}

template <typename T>
PRISM_TARGET static void key_scores(const float* q, const T* keys, int64_t n, int64_t dim,
                                    float* out) {
  for (int64_t j = 0; j < n; j++, keys += dim) {
    Vec acc[2] = {};
    int64_t i = 0;
    for (; i + 2 * kLanes <= dim; i += 2 * kLanes) {
      acc[0] += load(q + i) * load(keys + i);
      acc[1] += load(q + i + kLanes) * load(keys + i + kLanes);
    }
    for (; i + kLanes <= dim; i += kLanes) acc[0] += load(q + i) * load(keys + i);
    float sum = lane_sum(acc[0] + acc[1]);
    for (; i < dim; i++) sum += q[i] * load_one(keys + i);
    out[j] = sum;
  }
}

template <typename T>
PRISM_TARGET static void mix_values(const float* p, const T* values, int64_t n, int64_t dim,
                                    float* out) {
  int64_t i = 0;
  for (; i + 4 * kLanes <= dim; i += 4 * kLanes) {
    Vec acc[4];
#pragma GCC unroll 4
    for (int v = 0; v < 4; v++) acc[v] = load(out + i + v * kLanes);
    for (int64_t j = 0; j < n; j++)
#pragma GCC unroll 4
      for (int v = 0; v < 4; v++) acc[v] += p[j] * load(values + j * dim + i + v * kLanes);
#pragma GCC unroll 4
    for (int v = 0; v < 4; v++) store(out + i + v * kLanes, acc[v]);
  }
  for (; i + kLanes <= dim; i += kLanes) {
    Vec acc = load(out + i);
    for (int64_t j = 0; j < n; j++) acc += p[j] * load(values + j * dim + i);
    store(out + i, acc);
  }
  for (; i < dim; i++)
    for (int64_t j = 0; j < n; j++) out[i] += p[j] * load_one(values + j * dim + i);
}

template <typename T>
PRISM_TARGET static void add_rows(float scale, const T* const* rows, int64_t count, int64_t n,
                                  float* out) {
  int64_t i = 0;
  for (; i + 4 * kLanes <= n; i += 4 * kLanes) {
    Vec sum[4] = {};
    for (int64_t r = 0; r < count; r++)
#pragma GCC unroll 4
      for (int v = 0; v < 4; v++) sum[v] += load(rows[r] + i + v * kLanes);
#pragma GCC unroll 4
    for (int v = 0; v < 4; v++)
      store(out + i + v * kLanes, load(out + i + v * kLanes) + scale * sum[v]);
  }
  for (; i < n; i++) {
    float sum = 0.0f;
    for (int64_t r = 0; r < count; r++) sum += load_one(rows[r] + i);
    out[i] += scale * sum;
  }
}

template <typename T>
constexpr prism::RowKernels<T> kRowKernels{rms_norm<T>, rotate<T>,     widen<T>,
                                           scale_to<T>, key_scores<T>, mix_values<T>,
                                           add_rows<T>};
