// The schema is Python's, ops/moe_lora.py; shapes are the caller's promise.
#include <torch/csrc/stable/library.h>

#include <array>
#include <string>

#include "cpu/moe_lora_backward.h"
#include "cpu/moe_lora_fisher.h"
#include "cpu/moe_lora_forward.h"

namespace floe {
namespace {

template <std::size_t N>
Tensor call_aten(const char* name, std::array<StableIValue, N> stack) {
  STABLE_TORCH_ERROR_CODE_CHECK(torch_call_dispatcher(name, "", stack.data(), TORCH_ABI_VERSION));
  return torch::stable::detail::to<Tensor>(stack[0]);
}

Tensor linear(const Tensor& x, const Tensor& weight, const Optional& bias) {
  using torch::stable::detail::from;
  return call_aten<3>("aten::linear", {from(x), from(weight), from(bias)});
}

Tensor mm(const Tensor& a, const Tensor& b) {
  using torch::stable::detail::from;
  return call_aten<2>("aten::mm", {from(a), from(b)});
}

ForwardOutputs outputs(const Experts& given, int64_t K) {
  const int64_t T = given.x.size(0), E = static_cast<int64_t>(given.ranks.size());
  const ScalarType wide =
      given.x.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
  return {nullptr,
          {},
          new_tensor(given.x, {T, given.lora_A.size(0)}, given.x.scalar_type()),
          new_tensor(given.x, {T, K}, ScalarType::Long),
          new_tensor(given.x, {T, K}, wide),
          new_tensor(given.x, {T, E}, wide)};
}

Forward run_forward(const Experts& given, ForwardOutputs to) {
  const int64_t K = to.experts.size(1);
  (runs_grouped(given, K) ? forward_grouped : forward_dense)(given, to);
  return {to.out, to.z, to.experts, to.gates, to.logits};
}

Forward moe_lora_linear(const Tensor& x, const Tensor& weight, const Optional& bias,
                        const Tensor& lora_A, const Tensor& lora_B, const Tensor& router_weight,
                        const Tensor& scaling, std::vector<int64_t> ranks, int64_t top_k,
                        bool shared_A, bool renormalize, const Optional& token_mask,
                        double dropout_p, const Optional& dropout_seed, const Optional& aux_coefs,
                        const Optional&, const Optional&, const Optional&, const Optional&,
                        const Optional&, const Optional&) {
  const Experts given(x, lora_A, lora_B, router_weight, scaling, std::move(ranks), shared_A,
                      renormalize, token_mask, dropout_p, dropout_seed, aux_coefs);
  ForwardOutputs to = outputs(given, top_k);
  to.out = as_contiguous(linear(given.x, weight, bias));
  to.base = to.out.const_data_ptr();
  return run_forward(given, to);
}

Forward moe_lora(const Tensor& x, const Tensor& base_out, const Tensor& lora_A,
                 const Tensor& lora_B, const Tensor& router_weight, const Tensor& scaling,
                 std::vector<int64_t> ranks, int64_t top_k, bool shared_A, bool renormalize,
                 const Optional& token_mask, double dropout_p, const Optional& dropout_seed,
                 const Optional& aux_coefs, const Optional&, const Optional&, const Optional&,
                 const Optional&, const Optional&, const Optional&) {
  const Experts given(x, lora_A, lora_B, router_weight, scaling, std::move(ranks), shared_A,
                      renormalize, token_mask, dropout_p, dropout_seed, aux_coefs);
  ForwardOutputs to = outputs(given, top_k);
  const Tensor base = as_contiguous(base_out);
  to.out = new_tensor(given.x, {base.size(0), base.size(1)}, given.x.scalar_type());
  const bool same = base.scalar_type() == given.x.scalar_type();
  to.base = same ? base.const_data_ptr() : nullptr;
  Forward out = run_forward(given, to);
  if (!same) {
    const Tensor delta = torch::stable::to(std::get<0>(out), base.scalar_type());
    std::get<0>(out) = torch::stable::subtract(base, delta, -1);
  }
  return out;
}

Gradients moe_lora_backward(const Tensor& grad_out, const Tensor& x, const Optional& weight,
                            const Tensor& lora_A, const Tensor& lora_B, const Tensor& router_weight,
                            const Tensor& scaling, const Tensor& z, const Tensor& experts,
                            const Tensor& gates, const Tensor& logits, std::vector<int64_t> ranks,
                            bool shared_A, bool renormalize, const Optional& token_mask,
                            double dropout_p, const Optional& dropout_seed,
                            const Optional& aux_coefs, std::vector<bool> needs,
                            const Optional& fisher_offsets, const Optional& fisher_scale,
                            const Optional& fisher_A, const Optional& fisher_B,
                            const Optional& fisher_router, const Optional& fisher_gate) {
  const Experts given(x, lora_A, lora_B, router_weight, scaling, std::move(ranks), shared_A,
                      renormalize, token_mask, dropout_p, dropout_seed, aux_coefs);
  const bool fisher = fisher_offsets.has_value();
  // the squares' kernel sums these gradients too; in x's dtype, so float32 parameters use ours
  const bool same = given.lora_A.scalar_type() == given.x.scalar_type();
  const auto ours = [&](std::size_t i, const Optional& buffer) {
    return needs[i] && !(fisher && buffer && same);
  };
  const BackwardInputs in{as_dtype(grad_out, given.x.scalar_type()),
                          as_contiguous(z),
                          as_contiguous(experts),
                          as_contiguous(gates),
                          as_contiguous(logits),
                          needs[0],
                          ours(1, fisher_A),
                          ours(2, fisher_B),
                          ours(3, fisher_router),
                          fisher};
  const auto like = [](const Tensor& t, bool wanted) {
    return wanted ? new_tensor(t, {t.size(0), t.size(1)}, t.scalar_type())
                  : new_tensor(t, {0}, t.scalar_type());
  };
  const bool base_share = weight && needs[0];
  Gradients out{base_share ? as_contiguous(mm(in.grad_out, *weight)) : like(given.x, needs[0]),
                like(given.lora_A, in.needs_A), like(given.lora_B, in.needs_B),
                like(given.router_weight, in.needs_router)};
  RowGradients rows;
  if (fisher) rows = row_gradients(given);
  const int64_t K = in.experts.size(1);
  (runs_grouped(given, K) ? backward_grouped : backward_dense)(given, in, base_share, out, rows);
  if (fisher) {
    add_fisher(given, in, rows,
               {*fisher_offsets, fisher_scale, fisher_A, fisher_B, fisher_router, fisher_gate},
               {needs[1], needs[2], needs[3]}, out);
  }
  return {std::get<0>(out), as_dtype(std::get<1>(out), lora_A.scalar_type()),
          as_dtype(std::get<2>(out), lora_B.scalar_type()),
          as_dtype(std::get<3>(out), router_weight.scalar_type())};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(floe, CPU, m) {
  m.impl("moe_lora_linear", TORCH_BOX(&moe_lora_linear));
  m.impl("moe_lora", TORCH_BOX(&moe_lora));
  m.impl("moe_lora_backward", TORCH_BOX(&moe_lora_backward));
}

}  // namespace floe
