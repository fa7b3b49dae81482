// Norm, rotary embedding and attention as torch operators; see bindings.cpp.
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <string>

#include "layers.h"

namespace {

using at::Tensor;

const prism::KernelTable& table(c10::string_view name) {
  if (name.empty()) return prism::kernels();
  const prism::KernelTable* found = prism::kernels_by_name(std::string(name).c_str());
  TORCH_CHECK(found != nullptr, "prism: this machine has no kernels named ", name);
  return *found;
}

void check_like(const Tensor& tensor, const char* name, const Tensor& first) {
  TORCH_CHECK(first.scalar_type() == at::kFloat || first.scalar_type() == at::kBFloat16,
              "prism: ", first.scalar_type(), " where float32 or bfloat16 is expected");
  TORCH_CHECK(tensor.scalar_type() == first.scalar_type(), "prism: ", name, " is ",
              tensor.scalar_type(), ", expected ", first.scalar_type());
}

// uint16_t stands for bf16.
template <typename T>
const T* data(const Tensor& tensor) {
  return static_cast<const T*>(tensor.const_data_ptr());
}
template <typename T>
T* mutable_data(const Tensor& tensor) {
  return static_cast<T*>(tensor.mutable_data_ptr());
}

// [tokens, heads, dim] with any strides but the last one's.
template <typename T>
prism::Heads<const T> heads(const Tensor& x) {
  TORCH_CHECK(x.dim() == 3 && x.stride(2) == 1, "prism: no [tokens, heads, dim] rows, but ",
              x.sizes(), " with strides ", x.strides());
  return {data<T>(x), x.size(0), x.size(1), x.size(2), x.stride(0), x.stride(1)};
}

Tensor rms_norm(const Tensor& x, const Tensor& weight, double eps, c10::string_view isa) {
  const int64_t n = weight.numel();
  TORCH_CHECK(x.dim() > 0 && x.size(-1) == n && n > 0 && x.is_contiguous() && weight.is_contiguous(),
              "prism: norm of ", x.sizes(), " with weight ", weight.sizes());
  check_like(weight, "weight", x);
  Tensor out = at::empty(x.sizes(), x.options());
  const auto run = [&]<typename T>(T) {
    prism::rms_norm<T>(table(isa), data<T>(x), data<T>(weight), x.numel() / n, n,
                       static_cast<float>(eps), mutable_data<T>(out));
  };
  x.scalar_type() == at::kFloat ? run(float{}) : run(uint16_t{});
  return out;
}

// x [tokens, heads, dim]; cosine, sine [tokens, dim].
Tensor rotate(const Tensor& x, const Tensor& cosine, const Tensor& sine, c10::string_view isa) {
  TORCH_CHECK(x.dim() == 3 && x.size(2) % 2 == 0, "prism: rotary embedding of ", x.sizes());
  for (const Tensor& part : {cosine, sine}) {
    check_like(part, "cosine or sine", x);
    TORCH_CHECK(part.dim() == 2 && part.size(0) == x.size(0) && part.size(1) == x.size(2) &&
                    part.is_contiguous(),
                "prism: rotary embedding of ", x.sizes(), " by ", part.sizes());
  }
  Tensor out = at::empty(x.sizes(), x.options());
  const auto run = [&]<typename T>(T) {
    prism::rotate<T>(table(isa), heads<T>(x), data<T>(cosine), data<T>(sine), mutable_data<T>(out));
  };
  x.scalar_type() == at::kFloat ? run(float{}) : run(uint16_t{});
  return out;
}

void check_buffer(const Tensor& buffer, const Tensor& rows, const char* name) {
  check_like(buffer, name, rows);
  TORCH_CHECK(buffer.dim() == 3 && buffer.is_contiguous() && buffer.size(0) == rows.size(1) &&
                  buffer.size(2) == rows.size(2),
              "prism: ", name, " ", buffer.sizes(), " for rows ", rows.sizes());
}

// segments int64 [n, 4]: begin, end, kv_start, past.
void check_segments(const Tensor& segments, int64_t rows, int64_t room) {
  TORCH_CHECK(segments.scalar_type() == at::kLong && segments.dim() == 2 && segments.size(1) == 4 &&
                  segments.is_contiguous(),
              "prism: segments are no int64 [n, 4]");
  int64_t next = 0;
  for (int64_t i = 0; i < segments.size(0); i++) {
    const int64_t* s = segments.const_data_ptr<int64_t>() + 4 * i;
    TORCH_CHECK(s[0] == next && s[1] > s[0] && s[2] >= 0 && s[3] >= 0 &&
                    s[2] + s[3] + s[1] - s[0] <= room,
                "prism: segment ", i, " (", s[0], ", ", s[1], ", ", s[2], ", ", s[3],
                ") does not fit a step of ", rows, " rows or a buffer of ", room);
    next = s[1];
  }
  TORCH_CHECK(next == rows, "prism: segments of ", next, " rows in a step of ", rows);
}

Tensor attend(const Tensor& query, const Tensor& key, const Tensor& value, const Tensor& keys,
              const Tensor& values, const Tensor& segments, double scale, c10::string_view isa) {
  TORCH_CHECK(query.dim() == 3 && key.dim() == 3 && value.dim() == 3, "prism: rows of wrong rank");
  TORCH_CHECK(query.size(0) == key.size(0) && query.size(0) == value.size(0) &&
                  key.size(1) == value.size(1) && query.size(1) % key.size(1) == 0 &&
                  query.size(2) == key.size(2) && query.size(2) <= prism::kMaxHeadDim,
              "prism: attention of ", query.sizes(), " over ", key.sizes(), ", ", value.sizes());
  check_like(key, "key", query);
  check_like(value, "value", query);
  check_buffer(keys, key, "keys");
  check_buffer(values, value, "values");
  TORCH_CHECK(keys.size(1) == values.size(1), "prism: keys and values of different room");
  check_segments(segments, query.size(0), keys.size(1));
  Tensor out = at::empty({query.size(0), query.size(1), value.size(2)}, query.options());
  const auto run = [&]<typename T>(T) {
    const prism::AttentionStep<T> step{
        heads<T>(query),
        heads<T>(key),
        heads<T>(value),
        mutable_data<T>(keys),
        mutable_data<T>(values),
        keys.size(1),
        reinterpret_cast<const prism::Segment*>(segments.const_data_ptr<int64_t>()),
        segments.size(0),
        static_cast<float>(scale)};
    prism::attend<T>(table(isa), step, mutable_data<T>(out));
  };
  query.scalar_type() == at::kFloat ? run(float{}) : run(uint16_t{});
  return out;
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(prism, m) {
  m.def("rms_norm(Tensor x, Tensor weight, float eps, str isa=\"\") -> Tensor");
  m.def("rotate(Tensor x, Tensor cosine, Tensor sine, str isa=\"\") -> Tensor");
  m.def(
      "attend(Tensor query, Tensor key, Tensor value, Tensor(a!) keys, Tensor(b!) values, "
      "Tensor segments, float scale, str isa=\"\") -> Tensor");
}

TORCH_LIBRARY_IMPL(prism, CPU, m) {
  m.impl("rms_norm", rms_norm);
  m.impl("rotate", rotate);
  m.impl("attend", attend);
}
