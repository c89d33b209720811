// floe::experimental_segment_grad_square; the schema is Python's, ops/experimental.py.
#include <string>
#include <tuple>

#include "cuda/grad_square.cuh"
#include "cuda/operator_call.h"

namespace floe::cuda {
namespace {

// Blocks that a tile of so many threads should make: what 132 multiprocessors hold at once.
template <typename Tile>
constexpr int64_t kBlocksWanted = 132 * (Tile::kThreads > 256 ? 1 : 2);

struct Outputs {
  Tensor grad, fisher, norms;
};

template <typename Tile, typename scalar_t>
void run(GradSquare call, bool by_rank, const Outputs& out, cudaStream_t stream) {
  const int64_t R = call.R(), D = call.D(), S = call.segments.samples;
  const int64_t tiles_r = (R + Tile::kColumnsG - 1) / Tile::kColumnsG;
  const int64_t tiles_d = (D + Tile::kColumnsX - 1) / Tile::kColumnsX;
  const int64_t finish_columns = (D + kFinishColumns - 1) / kFinishColumns;
  const int64_t num_parts = tiles_r * tiles_d * Tile::kWarps;
  const int64_t units = count_units(call.segments.rows, tiles_r * tiles_d, kBlocksWanted<Tile>);
  call.units = static_cast<int>(units);

  const Tensor& like = out.norms;
  const Tensor parts = floats(like, units * 4 * R * D), norm_parts = floats(like, S * num_parts);
  const Tensor total_parts = floats(like, units * num_parts);
  const Tensor joint_norms = floats(like, units * R * finish_columns);
  const Tensor rank_parts = floats(like, by_rank ? R * finish_columns : 0);
  const Tensor unit = torch::stable::new_empty(like, {units * static_cast<int64_t>(sizeof(Unit))},
                                               ScalarType::Byte);
  const auto pointer = [](const Tensor& t) { return t.mutable_data_ptr<float>(); };
  call.parts = pointer(parts), call.norm_parts = pointer(norm_parts);
  call.total_parts = pointer(total_parts), call.joint_norms = pointer(joint_norms);
  call.rank_parts = by_rank ? pointer(rank_parts) : nullptr;
  call.unit = static_cast<Unit*>(unit.mutable_data_ptr());

  const auto size = [](int64_t n) { return static_cast<unsigned>(n); };
  launch(grad_square_kernel<Tile>, dim3(size(tiles_r), size(units), size(tiles_d)), Tile::kThreads,
         grad_square_shared<Tile>(), stream, call);
  launch(grad_square_finish_kernel<scalar_t>, dim3(size(finish_columns), size(R)), 256,
         8 * sizeof(float), stream, call, static_cast<scalar_t*>(out.grad.mutable_data_ptr()));
  const int64_t jobs = S + (by_rank ? R : 1);
  launch(grad_square_norms_kernel, dim3(size((jobs + 7) / 8)), 256, 0, stream, call, num_parts,
         finish_columns);
}

template <typename scalar_t>
void run_narrow(const GradSquare& call, bool by_rank, const Outputs& out, cudaStream_t stream) {
  const auto go = call.R() <= 16   ? run<MmaTile<scalar_t, 16>, scalar_t>
                  : call.R() <= 32 ? run<MmaTile<scalar_t, 32>, scalar_t>
                  : call.R() <= 64 ? run<MmaTile<scalar_t, 64>, scalar_t>
                                   : run<MmaTile<scalar_t, 128>, scalar_t>;
  go(call, by_rank, out, stream);
}

template <typename x_t>
void run_wide(const GradSquare& call, bool by_rank, const Outputs& out, cudaStream_t stream) {
  const auto go = call.R() <= 16 ? run<FmaTile<x_t, 16>, float> : run<FmaTile<x_t, 64>, float>;
  go(call, by_rank, out, stream);
}

std::tuple<Tensor, Tensor, Tensor> segment_grad_square(const Tensor& g_in, const Tensor& x_in,
                                                       const Tensor& offsets_in,
                                                       std::optional<Tensor> scale_in,
                                                       std::string reduce) {
  const DeviceGuard guard(x_in.get_device_index());
  const ScalarType type = promoted(g_in.scalar_type(), x_in.scalar_type());
  STD_TORCH_CHECK(type != ScalarType::Double,
                  "experimental_segment_grad_square takes float32, bfloat16 and float16, "
                  "got float64");
  // a 16-bit x beside a float32 g is read as it is; g is the small one
  const bool reads_x = type == ScalarType::Float && g_in.scalar_type() == ScalarType::Float;
  const Tensor x = with_rows(reads_x ? x_in : torch::stable::to(x_in, type));
  const Tensor g = with_rows(torch::stable::to(g_in, type));
  const Tensor offsets = torch::stable::contiguous(offsets_in);
  const std::optional<Tensor> scale = as_scale(scale_in);
  const int64_t N = g.size(0), R = g.size(1), D = x.size(1), S = offsets.size(0) - 1;
  STD_TORCH_CHECK(R <= 65535 && D < int64_t{1} << 23,
                  "g and x must have at most 65535 and 2^23 - 1 columns, got ", R, " and ", D);

  STD_TORCH_CHECK(N < int64_t{1} << 31 && S < (int64_t{1} << 31) - 2,
                  "there must be fewer than 2^31 rows and samples, got ", N, " and ", S);

  const auto make = [&](std::initializer_list<int64_t> shape, ScalarType dtype) {
    return torch::stable::new_empty(x, shape, dtype);
  };
  Outputs out = {make({R, D}, type),
                 reduce == "element" ? make({R, D}, ScalarType::Float)
                 : reduce == "rank"  ? make({R}, ScalarType::Float)
                                     : make({}, ScalarType::Float),
                 make({S}, ScalarType::Float)};
  if (N * R * D == 0) {
    for (Tensor* tensor : {&out.grad, &out.fisher, &out.norms}) torch::stable::zero_(*tensor);
    return {out.grad, out.fisher, out.norms};
  }

  GradSquare call{};
  call.x = source_of(x), call.g = source_of(g);
  call.segments = {offsets.const_data_ptr<int64_t>(), N, S};
  call.scale = scale ? scale->const_data_ptr<float>() : nullptr;
  call.scale_each = scale && scale->dim() == 1;
  call.with_square = reduce != "matrix";
  call.fisher = out.fisher.mutable_data_ptr<float>();
  call.norms = out.norms.mutable_data_ptr<float>();
  const auto go = type == ScalarType::BFloat16              ? run_narrow<BFloat16>
                  : type == ScalarType::Half                ? run_narrow<Float16>
                  : x.scalar_type() == ScalarType::BFloat16 ? run_wide<BFloat16>
                  : x.scalar_type() == ScalarType::Half     ? run_wide<Float16>
                                                            : run_wide<float>;
  go(call, reduce == "rank", out, current_stream(x));
  return {out.grad, out.fisher, out.norms};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(floe, CUDA, m) {
  m.impl("experimental_segment_grad_square", TORCH_BOX(&segment_grad_square));
}

}  // namespace floe::cuda
