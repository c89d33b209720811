// floe::experimental_linear_grad_square; the schema is Python's, ops/experimental.py.
#include <algorithm>

#include "cuda/linear_grad_square.cuh"
#include "cuda/operator_call.h"

namespace floe::cuda {
namespace {

// Blocks take items until there are none: a few for each multiprocessor even out their lengths.
constexpr int64_t kMostBlocks = 4 * 132;

template <typename Square>
void run(const LinearGradSquare& call, int64_t bound, cudaStream_t stream) {
  launch(list_items_kernel, dim3(1), kSumThreads, kSumWarps * 8, stream, call);
  launch(linear_grad_square_kernel<Square>,
         dim3(static_cast<unsigned>(std::min(bound, kMostBlocks))), kItemThreads,
         linear_grad_square_shared<Square>(), stream, call);
  launch(add_items_kernel, dim3(static_cast<unsigned>((call.segments.samples + 7) / 8)), 256, 0,
         stream, call);
}

Tensor linear_grad_square(const Tensor& g_in, const Tensor& x_in, const Tensor& offsets_in,
                          std::optional<Tensor> scale_in) {
  const DeviceGuard guard(x_in.get_device_index());
  const ScalarType type = promoted(g_in.scalar_type(), x_in.scalar_type());
  STD_TORCH_CHECK(type != ScalarType::Double,
                  "experimental_linear_grad_square takes float32, bfloat16 and float16, "
                  "got float64");
  const Tensor g = with_rows(torch::stable::to(g_in, type));
  const Tensor x = with_rows(torch::stable::to(x_in, type));
  const Tensor offsets = torch::stable::contiguous(offsets_in);
  const std::optional<Tensor> scale = as_scale(scale_in);
  const int64_t N = g.size(0), R = g.size(1), D = x.size(1), S = offsets.size(0) - 1;
  STD_TORCH_CHECK(R < int64_t{1} << 23 && D < int64_t{1} << 23,
                  "g and x must have fewer than 2^23 columns, got ", R, " and ", D);
  Tensor norms = torch::stable::new_empty(x, {S}, ScalarType::Float);
  if (N * R * D == 0 || S == 0) return torch::stable::zero_(norms);

  const int64_t bound = bound_items(N, S, R, D);
  const Tensor first_item = torch::stable::new_empty(x, {S + 1}, ScalarType::Long);
  const Tensor item_parts = floats(x, bound);
  LinearGradSquare call{};
  call.g = source_of(g), call.x = source_of(x);
  call.segments = {offsets.const_data_ptr<int64_t>(), N, S};
  call.scale = scale ? scale->const_data_ptr<float>() : nullptr;
  call.scale_each = scale && scale->dim() == 1;
  call.first_item = first_item.mutable_data_ptr<int64_t>();
  call.item_parts = item_parts.mutable_data_ptr<float>(), call.most_items = bound;
  call.norms = norms.mutable_data_ptr<float>();
  const auto go = type == ScalarType::BFloat16 ? run<MmaSquare<BFloat16>>
                  : type == ScalarType::Half   ? run<MmaSquare<Float16>>
                                               : run<FmaSquare>;
  go(call, bound, current_stream(x));
  return norms;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(floe, CUDA, m) {
  m.impl("experimental_linear_grad_square", TORCH_BOX(&linear_grad_square));
}

}  // namespace floe::cuda
