// floe::segment_grad_square on CPU: pieces and panels, threads, and the ordered sums over panels.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <vector>

#include "cpu/grad_square_call.h"
#include "cpu/grad_square_kernels.h"

namespace floe {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Multiplications one thread should own before waking a second is worth it.
constexpr int64_t kWorkPerTask = 1 << 18;

cpu::Dtype dtype_of(ScalarType type) {
  switch (type) {
    case ScalarType::Double:
      return cpu::Dtype::kFloat64;
    case ScalarType::Float:
      return cpu::Dtype::kFloat32;
    case ScalarType::BFloat16:
      return cpu::Dtype::kBFloat16;
    default:
      return cpu::Dtype::kFloat16;
  }
}

ScalarType promoted(ScalarType a, ScalarType b) {
  if (a == b) return a;
  if (a == ScalarType::Double || b == ScalarType::Double) return ScalarType::Double;
  return ScalarType::Float;  // two different 16-bit types meet in float32
}

// Every row once, in order; an empty sample is a piece of no rows.
std::vector<cpu::Piece> pieces_of(const int64_t* offsets, int64_t samples, int64_t rows) {
  std::vector<cpu::Piece> pieces;
  pieces.reserve(samples + 2);
  pieces.push_back({0, offsets[0], -1});
  for (int64_t i = 0; i < samples; ++i) {
    pieces.push_back({offsets[i], offsets[i + 1] - offsets[i], i});
  }
  pieces.push_back({offsets[samples], rows - offsets[samples], -1});
  return pieces;
}

// out[i] = the sum of parts (panels, size) over panels, in order.
template <typename acc>
void sum_panels(const double* parts, int64_t panels, int64_t size, void* out) {
  for (int64_t i = 0; i < size; ++i) {
    double total = 0;
    for (int64_t p = 0; p < panels; ++p) total += parts[p * size + i];
    static_cast<acc*>(out)[i] = static_cast<acc>(total);
  }
}

// torch's own conversion of a string argument (2.10 to 2.13) never frees it: 48 bytes a call, and
// the holes between them. A handle it passes on.
std::tuple<Tensor, Tensor, Tensor> boxed(const Tensor& g, const Tensor& x, const Tensor& offsets,
                                         std::optional<Tensor> scale, StringHandle reduce) {
  std::size_t length = 0;
  const char* data = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(torch_string_length(reduce, &length));
  STABLE_TORCH_ERROR_CODE_CHECK(torch_string_c_str(reduce, &data));
  const std::string word(data, length);
  STABLE_TORCH_ERROR_CODE_CHECK(torch_delete_string(reduce));
  return segment_grad_square(g, x, offsets, scale, word);
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor> segment_grad_square(const Tensor& g_in, const Tensor& x_in,
                                                       const Tensor& offsets_in,
                                                       const std::optional<Tensor>& scale_in,
                                                       const std::string& reduce) {
  const ScalarType type = promoted(g_in.scalar_type(), x_in.scalar_type());
  const bool is_double = type == ScalarType::Double;
  const ScalarType wide = is_double ? ScalarType::Double : ScalarType::Float;
  const Tensor g = torch::stable::contiguous(torch::stable::to(g_in, type));
  const Tensor x = torch::stable::contiguous(torch::stable::to(x_in, type));
  const Tensor offsets = torch::stable::contiguous(offsets_in);
  const int64_t N = g.size(0), R = g.size(1), D = x.size(1), S = offsets.size(0) - 1;

  const cpu::GradSquareKernels& kernels = cpu::grad_square_kernels(dtype_of(type), cpu::isa());
  const int64_t panels = (D + kernels.columns - 1) / kernels.columns;
  const auto zeros = [&](std::initializer_list<int64_t> size, ScalarType dtype) {
    return torch::stable::fill_(torch::stable::new_empty(g, size, dtype), 0.0);
  };
  Tensor grad = zeros({R, D}, type), norms = zeros({S}, wide);
  const Tensor norm_parts = zeros({panels, S}, ScalarType::Double);
  Tensor fisher = reduce == "element" ? zeros({R, D}, wide)
                  : reduce == "rank"  ? zeros({R}, wide)
                                      : zeros({}, wide);
  const Tensor row_parts = zeros({reduce == "rank" ? panels : 0, R}, ScalarType::Double);

  std::optional<Tensor> scale;
  if (scale_in) {
    scale = torch::stable::contiguous(torch::stable::to(*scale_in, ScalarType::Float));
  }
  const std::vector<cpu::Piece> pieces = pieces_of(offsets.const_data_ptr<int64_t>(), S, N);
  cpu::SegmentGradSquare job{};
  job.N = N, job.R = R, job.D = D, job.S = S;
  job.g = g.const_data_ptr(), job.x = x.const_data_ptr();
  job.ld_g = R, job.ld_x = D;
  job.pieces = pieces.data(), job.num_pieces = static_cast<int64_t>(pieces.size());
  job.scale = scale ? scale->const_data_ptr<float>() : nullptr;
  job.scale_each = scale && scale->dim() == 1;
  job.grad = grad.mutable_data_ptr(), job.norms = norm_parts.mutable_data_ptr<double>();
  job.fisher = reduce == "element" ? fisher.mutable_data_ptr() : nullptr;
  job.fisher_rows = reduce == "rank" ? row_parts.mutable_data_ptr<double>() : nullptr;

  const auto bytes = [&](int64_t size) {
    return torch::stable::new_empty(g, {size}, ScalarType::Byte);
  };
  const Tensor tiles = bytes(kernels.tiles_size(job) * kernels.element_size);
  job.tiles = tiles.mutable_data_ptr();
  const int64_t work = N * R + 1;
  torch::stable::parallel_for(0, job.num_pieces, kWorkPerTask * job.num_pieces / work + 1,
                              [&](int64_t begin, int64_t end) {
                                kernels.tile_rows(job, begin, end, tiles.mutable_data_ptr());
                              });
  const int64_t grain = kWorkPerTask / (work * kernels.columns) + 1;
  torch::stable::parallel_for(0, panels, grain, [&](int64_t begin, int64_t end) {
    const Tensor scratch = bytes(kernels.scratch_size(job));
    kernels.panels(job, begin, end, scratch.mutable_data_ptr());
  });

  const auto sum = is_double ? sum_panels<double> : sum_panels<float>;
  sum(job.norms, panels, S, norms.mutable_data_ptr());
  if (reduce == "rank") sum(job.fisher_rows, panels, R, fisher.mutable_data_ptr());
  if (reduce == "matrix") sum(job.norms, panels * S, 1, fisher.mutable_data_ptr());
  return {grad, fisher, norms};
}

STABLE_TORCH_LIBRARY_IMPL(floe, CPU, m) { m.impl("segment_grad_square", TORCH_BOX(&boxed)); }

}  // namespace floe
