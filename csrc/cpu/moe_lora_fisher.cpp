#include "cpu/moe_lora_fisher.h"

#include <cstring>

#include "cpu/grad_square_call.h"

namespace floe {
namespace {

// x with masked rows zero and, where wanted, dropout applied; itself where there is neither.
Tensor cleaned(const Experts& given, const Tensor& x, bool with_dropout) {
  const cpu::Dropout& dropout = given.dropout;
  with_dropout &= dropout.active;
  if (!given.token_mask && !with_dropout) return x;
  const bool* mask = given.token_mask ? given.token_mask->const_data_ptr<bool>() : nullptr;
  const int64_t T = x.size(0), columns = x.size(1);
  Tensor out = torch::stable::new_empty(x, {T, columns});
  with_scalar(dtype_of(x), [&](auto zero) {
    using scalar_t = decltype(zero);
    using wide = cpu::wide_t<scalar_t>;
    const auto* from = static_cast<const scalar_t*>(x.const_data_ptr());
    auto* to = static_cast<scalar_t*>(out.mutable_data_ptr());
    torch::stable::parallel_for(0, T, 16, [&](int64_t begin, int64_t end) {
      for (int64_t t = begin; t < end; ++t) {
        const scalar_t* row = from + t * columns;
        scalar_t* result = to + t * columns;
        if (mask && !mask[t]) {
          std::memset(static_cast<void*>(result), 0, columns * sizeof(scalar_t));
        } else if (!with_dropout) {
          std::memcpy(static_cast<void*>(result), row, columns * sizeof(scalar_t));
        } else {
          for (int64_t c = 0; c < columns; ++c) {
            const bool kept = cpu::philox(dropout.key, static_cast<uint64_t>(t * columns + c)) >=
                              dropout.threshold;
            const wide value = cpu::widen(row[c]) * static_cast<wide>(dropout.scale);
            result[c] = kept ? cpu::narrow<scalar_t>(value) : scalar_t{};
          }
        }
      }
    });
  });
  return out;
}

// buffer += the sum of the samples' squared gradients; its shape says how far it is summed. Returns
// the gradient of all samples.
Tensor add_squares(Tensor buffer, const Tensor& g, const Tensor& x, const FisherBuffers& to) {
  static const char* const kReduce[] = {"matrix", "rank", "element"};
  auto [grad, fisher, norms] =
      segment_grad_square(g, x, to.offsets, to.scale, kReduce[buffer.dim()]);
  torch::stable::copy_(buffer, torch::stable::subtract(buffer, fisher, -1));
  return grad;
}

// gate (S,) += scale * the sum of every sample's tokens; the gradient itself, not its square.
void add_gates(Tensor gate, const double* tokens, const FisherBuffers& to) {
  const Tensor offsets = as_contiguous(to.offsets);
  const auto* bounds = offsets.const_data_ptr<int64_t>();
  const int64_t S = offsets.size(0) - 1;
  Tensor sums = torch::stable::new_empty(gate, {S}, ScalarType::Double);
  auto* sum = sums.mutable_data_ptr<double>();
  for (int64_t s = 0; s < S; ++s) {
    sum[s] = 0;
    for (int64_t t = bounds[s]; t < bounds[s + 1]; ++t) sum[s] += tokens[t];
  }
  if (to.scale) {
    const Tensor scale = as_dtype(*to.scale, ScalarType::Double);
    const auto* values = scale.const_data_ptr<double>();
    for (int64_t s = 0; s < S; ++s) sum[s] *= values[scale.dim() ? s : 0];
  }
  torch::stable::copy_(gate, torch::stable::subtract(gate, sums, -1));
}

}  // namespace

RowGradients row_gradients(const Experts& given) {
  const int64_t T = given.x.size(0), E = static_cast<int64_t>(given.ranks.size());
  using torch::stable::new_zeros;
  return {new_zeros(given.x, {T, given.lora_A.size(0)}),
          new_zeros(given.x, {T, given.lora_B.size(0)}), new_zeros(given.x, {T, E}),
          new_zeros(given.x, {T}, ScalarType::Double)};
}

void add_fisher(const Experts& given, const BackwardInputs& in, const RowGradients& rows,
                const FisherBuffers& to, std::array<bool, 3> wanted, Gradients& out) {
  const auto add = [&](const Optional& buffer, const Tensor& g, const Tensor& x, bool dropout,
                       bool take, Tensor& grad) {
    if (!buffer) return;
    const Tensor sum = add_squares(*buffer, g, cleaned(given, x, dropout), to);
    if (take && grad.dim() == 1) grad = sum;
  };
  add(to.lora_A, rows.grad_z, given.x, true, wanted[0], std::get<1>(out));
  add(to.lora_B, rows.h, in.grad_out, false, wanted[1], std::get<2>(out));
  add(to.router, rows.grad_logits, given.x, false, wanted[2], std::get<3>(out));
  if (to.gate) add_gates(*to.gate, rows.gate.const_data_ptr<double>(), to);
}

}  // namespace floe
