// The extension as torch operators (torch.ops.prism.*): checks shapes and dtypes, then calls plain C++.
// Operators, not pybind functions: no Python header is needed, the library loads into any Python, torch
// releases the interpreter lock around each call, and graphs and compilers see one op.
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include "forward.h"
#include "route.h"
#include "swap_search.h"

namespace {

using at::Tensor;

void check(const Tensor& tensor, const char* name, at::ScalarType dtype, at::IntArrayRef shape) {
  TORCH_CHECK(tensor.scalar_type() == dtype, "prism: ", name, " is ", tensor.scalar_type(),
              ", expected ", dtype);
  TORCH_CHECK(tensor.sizes() == shape, "prism: ", name, " has shape ", tensor.sizes(),
              ", expected ", shape);
  TORCH_CHECK(tensor.is_contiguous(), "prism: ", name, " is not contiguous");
}

void check_index(const Tensor& index, int64_t tokens, int64_t slots) {
  check(index, "index", at::kLong, {tokens, slots});
  const int64_t* value = index.const_data_ptr<int64_t>();
  for (int64_t i = 0; i < tokens * slots; i++)
    TORCH_CHECK(value[i] >= 0, "prism: index holds ", value[i]);
}

const prism::KernelTable& table(c10::string_view name) {
  if (name.empty()) return prism::kernels();
  const prism::KernelTable* found = prism::kernels_by_name(std::string(name).c_str());
  TORCH_CHECK(found != nullptr, "prism: this machine has no kernels named ", name);
  return *found;
}

Tensor sub_expert_forward(const Tensor& x, const Tensor& index, const Tensor& weights,
                          const std::optional<Tensor>& state, const Tensor& gate_up,
                          const Tensor& down, int64_t experts, int64_t sub_experts, int64_t width,
                          c10::string_view isa) {
  TORCH_CHECK(x.dim() == 2 && index.dim() == 2, "prism: x and index are not matrices");
  const int64_t tokens = x.size(0), hidden = x.size(1), slots = index.size(1);
  const prism::Layout layout{experts, sub_experts, hidden, width};
  const int64_t s = experts * sub_experts, wp = layout.padded_width();
  TORCH_CHECK(x.scalar_type() == at::kFloat || x.scalar_type() == at::kBFloat16,
              "prism: x is ", x.scalar_type(), ", expected float32 or bfloat16");
  TORCH_CHECK(x.scalar_type() == at::kFloat || hidden % 2 == 0, "prism: odd hidden size in bf16");
  check(x, "x", x.scalar_type(), {tokens, hidden});
  check_index(index, tokens, slots);
  check(weights, "weights", at::kFloat, {tokens, slots});
  check(gate_up, "gate_up", x.scalar_type(), {s, 2 * wp * hidden});
  check(down, "down", x.scalar_type(), {s, wp * layout.padded_hidden()});
  if (state.has_value()) check(*state, "state", at::kByte, {tokens, slots, sub_experts});
  Tensor out = at::zeros({tokens, layout.padded_hidden()}, x.options().dtype(at::kFloat));
  const prism::Batch batch{tokens, slots, x.const_data_ptr(), index.const_data_ptr<int64_t>(),
                           weights.const_data_ptr<float>(),
                           state.has_value() ? state->const_data_ptr<uint8_t>() : nullptr};
  if (x.scalar_type() == at::kFloat)
    prism::forward(table(isa), layout, batch, gate_up.const_data_ptr<float>(),
                   down.const_data_ptr<float>(), out.mutable_data_ptr<float>());
  else
    prism::forward(table(isa), layout, batch,
                   static_cast<const uint16_t*>(gate_up.const_data_ptr()),
                   static_cast<const uint16_t*>(down.const_data_ptr()),
                   out.mutable_data_ptr<float>());
  return layout.padded_hidden() == hidden ? out : out.narrow(1, 0, hidden).contiguous();
}

prism::Routing routing(const Tensor& index, const Tensor& weights, at::IntArrayRef shape) {
  const int64_t tokens = index.size(0), slots = index.size(1);
  check_index(index, tokens, slots);
  check(weights, "weights", at::kFloat, {tokens, slots});
  TORCH_CHECK(shape[1] <= prism::kMaxSubExperts, "prism: ", shape[1], " sub-experts");
  return {tokens, slots, shape[0], shape[1], shape[2], index.const_data_ptr<int64_t>(),
          weights.const_data_ptr<float>()};
}

// Sub-routers and means come in fp32 or in bf16.
at::ScalarType table_type(const Tensor& table) {
  return table.scalar_type() == at::kBFloat16 ? at::kBFloat16 : at::kFloat;
}

Tensor select_sub_experts(const Tensor& x, const Tensor& index, const Tensor& weights, const Tensor& router,
              const Tensor& bias, const Tensor& log_theta) {
  TORCH_CHECK(router.dim() == 3 && index.dim() == 2, "prism: router or index of wrong rank");
  const prism::Routing r = routing(index, weights, router.sizes());
  check(x, "x", at::kFloat, {r.tokens, r.hidden});
  check(router, "router_weight", table_type(router), router.sizes());
  check(bias, "router_bias", at::kFloat, {r.experts, r.sub_experts});
  check(log_theta, "log_theta", at::kFloat, {r.tokens});
  Tensor state = at::empty({r.tokens, r.slots, r.sub_experts}, x.options().dtype(at::kByte));
  const auto run = [&](const auto* table) {
    prism::select(prism::kernels(), r, x.const_data_ptr<float>(), table,
                  bias.const_data_ptr<float>(), log_theta.const_data_ptr<float>(),
                  state.mutable_data_ptr<uint8_t>());
  };
  if (router.scalar_type() == at::kFloat)
    run(router.const_data_ptr<float>());
  else
    run(static_cast<const uint16_t*>(router.const_data_ptr()));
  return state;
}

void add_means(const Tensor& out, const Tensor& index, const Tensor& weights, const Tensor& state,
                const Tensor& means, const Tensor& knot) {
  TORCH_CHECK(means.dim() == 4 && index.dim() == 2, "prism: means or index of wrong rank");
  const prism::Routing r = routing(index, weights, means.sizes().slice(1));
  check(out, "out", at::kFloat, {r.tokens, r.hidden});
  check(state, "state", at::kByte, {r.tokens, r.slots, r.sub_experts});
  check(means, "means", table_type(means), means.sizes());
  check(knot, "knot", at::kLong, {r.tokens});
  const int64_t* value = knot.const_data_ptr<int64_t>();
  for (int64_t t = 0; t < r.tokens; t++)
    TORCH_CHECK(value[t] >= 0 && value[t] < means.size(0), "prism: knot holds ", value[t]);
  const auto run = [&](const auto* table) {
    prism::compensate(prism::kernels(), r, state.const_data_ptr<uint8_t>(), table, value,
                      out.mutable_data_ptr<float>());
  };
  if (means.scalar_type() == at::kFloat)
    run(means.const_data_ptr<float>());
  else
    run(static_cast<const uint16_t*>(means.const_data_ptr()));
}

std::tuple<Tensor, double> swap_search(const Tensor& mass, int64_t groups, const Tensor& start,
                                       int64_t proposals, int64_t seed) {
  TORCH_CHECK(mass.dim() == 2 && mass.size(1) > 0, "prism: mass is no [neurons, tokens] matrix");
  TORCH_CHECK(groups == 4 || groups == 8 || groups == 16 || groups == 32,
              "prism: groups is ", groups, ", expected 4, 8, 16 or 32");
  const int64_t neurons = mass.size(0);
  TORCH_CHECK(neurons > 0 && neurons % groups == 0, "prism: ", neurons, " neurons in ", groups, " groups");
  check(mass, "mass", at::kFloat, mass.sizes());
  check(start, "start", at::kInt, {neurons});
  Tensor order = start.clone();
  std::vector<bool> seen(neurons, false);
  for (int64_t i = 0; i < neurons; i++) {
    const int32_t value = order.const_data_ptr<int32_t>()[i];
    TORCH_CHECK(value >= 0 && value < neurons && !seen[value], "prism: start is no permutation");
    seen[value] = true;
  }
  const double objective =
      prism::swap_search(mass.const_data_ptr<float>(), neurons, mass.size(1), groups, proposals,
                         static_cast<uint64_t>(seed), order.mutable_data_ptr<int32_t>());
  return {order, objective};
}

std::string isa_name() { return prism::kernels().name; }

}  // namespace

TORCH_LIBRARY(prism, m) {
  m.def(
      "sub_expert_forward(Tensor x, Tensor index, Tensor weights, Tensor? state, Tensor gate_up, "
      "Tensor down, int experts, int sub_experts, int width, str isa=\"\") -> Tensor");
  m.def(
      "select(Tensor x, Tensor index, Tensor weights, Tensor router_weight, Tensor router_bias, "
      "Tensor log_theta) -> Tensor");
  m.def(
      "compensate(Tensor(a!) out, Tensor index, Tensor weights, Tensor state, Tensor means, "
      "Tensor knot) -> ()");
  m.def(
      "swap_search(Tensor mass, int groups, Tensor start, int proposals, int seed) "
      "-> (Tensor, float)");
  m.def("isa_name() -> str", isa_name);
}

TORCH_LIBRARY_IMPL(prism, CPU, m) {
  m.impl("sub_expert_forward", sub_expert_forward);
  m.impl("select", select_sub_experts);
  m.impl("compensate", add_means);
  m.impl("swap_search", swap_search);
}
