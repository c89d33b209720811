// floe::experimental_topk_softmax and floe::experimental_sort_pairs; the schemas are Python's,
// ops/experimental.py.
#include <algorithm>
#include <tuple>

#include "cuda/grouping.cuh"
#include "cuda/operator_call.h"
#include "cuda/routing.cuh"

namespace floe::cuda {
namespace {

template <typename scalar_t, typename wide_t>
void route(const Tensor& logits, bool renormalize, const Tensor& gates, const Tensor& experts) {
  const int64_t N = logits.size(0), E = logits.size(1), K = gates.size(1);
  const auto kernel = E <= 32    ? topk_softmax_kernel<scalar_t, wide_t, 1>
                      : E <= 64  ? topk_softmax_kernel<scalar_t, wide_t, 2>
                      : E <= 256 ? topk_softmax_kernel<scalar_t, wide_t, 8>
                                 : topk_softmax_kernel<scalar_t, wide_t, 32>;
  const int64_t blocks = (N + kRouteThreads / 32 - 1) / (kRouteThreads / 32);
  launch(kernel, dim3(static_cast<unsigned>(blocks)), kRouteThreads, 0, current_stream(logits),
         static_cast<const scalar_t*>(logits.const_data_ptr()), logits.stride(0), N,
         static_cast<int>(E), static_cast<int>(K), renormalize,
         static_cast<scalar_t*>(gates.mutable_data_ptr()), experts.mutable_data_ptr<int64_t>());
}

std::tuple<Tensor, Tensor> topk_softmax(const Tensor& logits_in, int64_t K, bool renormalize) {
  const DeviceGuard guard(logits_in.get_device_index());
  const Tensor logits = with_rows(logits_in);
  const int64_t N = logits.size(0), E = logits.size(1);
  STD_TORCH_CHECK(E <= kMostExperts, "experimental_topk_softmax takes up to ", kMostExperts,
                  " experts, got ", E);
  Tensor gates = torch::stable::new_empty(logits, {N, K});
  Tensor experts = torch::stable::new_empty(logits, {N, K}, ScalarType::Long);
  if (N == 0) return {gates, experts};
  const auto go = logits.scalar_type() == ScalarType::Double     ? route<double, double>
                  : logits.scalar_type() == ScalarType::Float    ? route<float, float>
                  : logits.scalar_type() == ScalarType::BFloat16 ? route<BFloat16, float>
                                                                 : route<Float16, float>;
  go(logits, renormalize, gates, experts);
  return {gates, experts};
}

std::tuple<Tensor, Tensor> sort_pairs(const Tensor& experts_in, int64_t E,
                                      std::optional<Tensor> mask_in, const Tensor& samples_in) {
  const DeviceGuard guard(experts_in.get_device_index());
  const Tensor experts = torch::stable::contiguous(experts_in);
  const Tensor samples = torch::stable::contiguous(samples_in);
  const std::optional<Tensor> mask =
      mask_in ? std::optional(torch::stable::contiguous(*mask_in)) : std::nullopt;
  const int64_t N = experts.size(0), K = experts.size(1), B = samples.size(0) - 1;
  STD_TORCH_CHECK(E >= 1 && E <= kMostExperts, "num_experts must be in 1..", kMostExperts, ", got ",
                  E);
  STD_TORCH_CHECK(K >= 1, "experts must have a column, got none");
  const SortPlan plan = plan_sort(N * K);
  STD_TORCH_CHECK(plan.span * kSortWarps < int64_t{1} << 31,
                  "experts must have fewer than 2^38 elements, got ", N * K);
  Tensor pair = torch::stable::new_empty(experts, {N * K});
  Tensor offsets = torch::stable::new_empty(experts, {E * B + 1});
  const auto counts = [&](int64_t rows) {
    return torch::stable::new_empty(experts, {rows * (E + 1)}, ScalarType::Int);
  };
  const Tensor block_counts = counts(plan.blocks), warp_counts = counts(plan.warps());

  SortPairs call{};
  call.experts = experts.const_data_ptr<int64_t>();
  call.mask = mask ? static_cast<const uint8_t*>(mask->const_data_ptr()) : nullptr;
  call.samples = samples.const_data_ptr<int64_t>();
  call.N = N, call.B = B, call.K = static_cast<int>(K), call.E = static_cast<int>(E);
  call.plan = plan;
  call.block_counts = block_counts.mutable_data_ptr<int32_t>();
  call.warp_counts = warp_counts.mutable_data_ptr<int32_t>();
  call.pair = pair.mutable_data_ptr<int64_t>();
  call.offsets = offsets.mutable_data_ptr<int64_t>();
  const cudaStream_t stream = current_stream(experts);
  const dim3 blocks(static_cast<unsigned>(plan.blocks));
  launch(count_pairs_kernel, blocks, kSortThreads, count_shared(call.E), stream, call);
  launch(place_pairs_kernel, blocks, kSortThreads, place_shared(call.E), stream, call);
  return {pair, offsets};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(floe, CUDA, m) {
  m.impl("experimental_topk_softmax", TORCH_BOX(&topk_softmax));
  m.impl("experimental_sort_pairs", TORCH_BOX(&sort_pairs));
}

}  // namespace floe::cuda
