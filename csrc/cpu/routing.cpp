#include "cpu/routing.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/Dispatch_v2.h>

#include <tuple>
#include <vector>

namespace floe {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Tokens one thread should own before waking a second is worth it.
constexpr int64_t kTokensPerTask = 256;

template <typename scalar_t>
void run(const Tensor& logits, bool renormalize, Tensor& gates, Tensor& experts) {
  const int64_t N = logits.size(0), E = logits.size(1), K = gates.size(1);
  const auto* logits_ptr = logits.const_data_ptr<scalar_t>();
  auto* gates_ptr = gates.mutable_data_ptr<scalar_t>();
  auto* experts_ptr = experts.mutable_data_ptr<int64_t>();

  torch::stable::parallel_for(0, N, kTokensPerTask, [&](int64_t begin, int64_t end) {
    std::vector<int64_t> order(E);  // one scratch per task, not per token
    for (int64_t n = begin; n < end; ++n) {
      cpu::topk_softmax_row(logits_ptr + n * E, E, K, renormalize, gates_ptr + n * K,
                            experts_ptr + n * K, order.data());
    }
  });
}

// floe::topk_softmax on CPU. Shapes are the caller's promise: functional/routing.py checked them.
std::tuple<Tensor, Tensor> topk_softmax(const Tensor& logits_in, int64_t K, bool renormalize) {
  const Tensor logits = torch::stable::contiguous(logits_in);
  Tensor gates = torch::stable::new_empty(logits, {logits.size(0), K});
  Tensor experts = torch::stable::new_empty(logits, {logits.size(0), K}, ScalarType::Long);
  THO_DISPATCH_V2(logits.scalar_type(), "floe::topk_softmax",
                  AT_WRAP([&] { run<scalar_t>(logits, renormalize, gates, experts); }),
                  AT_EXPAND(AT_FLOATING_TYPES), ScalarType::Half, ScalarType::BFloat16);
  return {gates, experts};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(floe, CPU, m) { m.impl("topk_softmax", TORCH_BOX(&topk_softmax)); }

}  // namespace floe
