// One call of the MoE-LoRA operators: tensors made contiguous, and pointers to them.
//
// Dims: T tokens, I inputs, O outputs, E experts, K kept, R packed columns, C columns of z.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <array>
#include <functional>
#include <initializer_list>
#include <optional>
#include <tuple>
#include <vector>

#include "cpu/moe_lora_gates.h"
#include "cpu/moe_lora_kernels.h"
#include "cpu/scratch.h"

namespace floe {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Optional = std::optional<Tensor>;

using Forward =
    std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;        // out, z, experts, gates, logits
using Gradients = std::tuple<Tensor, Tensor, Tensor, Tensor>;  // x, lora_A, lora_B, router

inline cpu::Dtype dtype_of(const Tensor& t) {
  switch (t.scalar_type()) {
    case ScalarType::Double:
      return cpu::Dtype::kFloat64;
    case ScalarType::BFloat16:
      return cpu::Dtype::kBFloat16;
    case ScalarType::Half:
      return cpu::Dtype::kFloat16;
    default:
      return cpu::Dtype::kFloat32;
  }
}

inline cpu::Matrix matrix(const Tensor& t) {
  return {t.const_data_ptr(), dtype_of(t), t.size(0), t.size(1), t.size(1)};
}

// These two ask ATen for what the stable ABI looks up by name on every call, at a microsecond each.
inline Tensor as_contiguous(const Tensor& t) {
  return t.is_contiguous() ? t : torch::stable::contiguous(t);
}

inline Tensor new_tensor(const Tensor& like, std::initializer_list<int64_t> sizes,
                         ScalarType type) {
  auto dtype = torch::stable::detail::to<int32_t>(torch::stable::detail::from(type));
  AtenTensorHandle out;
  STABLE_TORCH_ERROR_CODE_CHECK(
      aoti_torch_aten_new_empty(like.get(), sizes.begin(), static_cast<int64_t>(sizes.size()),
                                &dtype, nullptr, nullptr, 0, nullptr, &out));
  return Tensor(out);
}

inline Tensor as_dtype(const Tensor& t, ScalarType dtype) {
  return as_contiguous(t.scalar_type() == dtype ? t : torch::stable::to(t, dtype));
}

// Calls f with a value of the type that stores `dtype`.
template <typename F>
void with_scalar(cpu::Dtype dtype, const F& f) {
  switch (dtype) {
    case cpu::Dtype::kFloat64:
      return f(double{});
    case cpu::Dtype::kFloat32:
      return f(float{});
    case cpu::Dtype::kBFloat16:
      return f(cpu::BFloat16{});
    case cpu::Dtype::kFloat16:
      return f(cpu::Float16{});
  }
}

// Calls f(value of x's type, value of the type of its operands in tiles, kernels).
template <typename F>
void with_elements(const Tensor& x, const F& f) {
  const cpu::Kernels& kernels = cpu::moe_lora_kernels(dtype_of(x), cpu::isa());
  with_scalar(dtype_of(x), [&](auto zero) {
    using scalar_t = decltype(zero);
    if constexpr (std::is_same_v<scalar_t, cpu::BFloat16>) {
      if (kernels.elem == cpu::Dtype::kBFloat16) return f(zero, zero, kernels);
    }
    f(zero, cpu::wide_t<scalar_t>{}, kernels);
  });
}

// What both directions are given.
struct [[gnu::visibility("hidden")]] Experts {
  Tensor x, lora_A, lora_B, router_weight, scaling;  // contiguous
  std::vector<int64_t> ranks;
  bool shared_A, renormalize;
  Optional token_mask, aux_coefs;
  cpu::Dropout dropout;

  Experts(const Tensor& x, const Tensor& lora_A, const Tensor& lora_B, const Tensor& router_weight,
          const Tensor& scaling, std::vector<int64_t> ranks, bool shared_A, bool renormalize,
          const Optional& token_mask, double dropout_p, const Optional& dropout_seed,
          const Optional& aux_coefs);

  template <typename wide>
  cpu::Layer<wide> layer(int64_t K) const {
    cpu::Layer<wide> out;
    out.T = x.size(0), out.I = x.size(1), out.O = lora_B.size(1), out.R = lora_B.size(0);
    out.E = static_cast<int64_t>(ranks.size()), out.K = K, out.C = lora_A.size(0);
    out.shared_A = shared_A, out.renormalize = renormalize;
    out.mask = token_mask ? token_mask->const_data_ptr<bool>() : nullptr;
    out.first.assign(1, 0);
    for (const int64_t rank : ranks) out.first.push_back(out.first.back() + rank);
    const Tensor wide_scaling =
        as_dtype(scaling, std::is_same_v<wide, double> ? ScalarType::Double : ScalarType::Float);
    const auto* values = static_cast<const wide*>(wide_scaling.const_data_ptr());
    out.scaling.assign(values, values + out.R);
    out.scaling.resize((out.R + 63) / 64 * 64);  // read in whole vectors
    return out;
  }
};

// Which of the two equal ways to compute is the faster. Dense runs all R columns through one
// product and masks, grouped only those of the experts that each token keeps.
bool runs_grouped(const Experts& given, int64_t K);

// Rows a task works on: enough to reuse the packed weights, few enough for every thread.
int64_t rows_per_task(int64_t T);

// Bytes between the dropout bits of two rows: whole words, so that any read of them is inside.
inline int64_t keep_stride(int64_t columns) { return (columns + 63) / 64 * 8 + 8; }

// Loops of which none waits for another, in one parallel region: every thread takes its share of
// each. What a body refers to must outlive run().
class [[gnu::visibility("hidden")]] Loops {
 public:
  using Body = std::function<void(int64_t begin, int64_t end)>;
  void add(int64_t count, Body body) { loops_.push_back({count, std::move(body)}); }
  void run() const;

 private:
  struct Loop {
    int64_t count;
    Body body;
  };
  std::vector<Loop> loops_;
};

// The panels of several matrices, all packed in one parallel loop.
class [[gnu::visibility("hidden")]] Panels {
 public:
  explicit Panels(const cpu::Kernels& kernels) : kernels_(kernels) {}
  // Returns the place of the panels, which pack() fills.
  void* columns(const Tensor& w);  // sums run over the columns of w
  void* rows(const Tensor& w);     // sums run over the rows of w
  void pack_in(Loops& loops) const;

 private:
  struct Job {
    cpu::Matrix w;
    bool rows;
    int64_t panels;
    cpu::Scratch memory;
  };
  void* add(const Tensor& w, bool rows);

  const cpu::Kernels& kernels_;
  std::vector<Job> jobs_;
};

// The dropout bits of x, (T, keep_stride(I)) bytes, which `loops` fill; no memory where nothing is
// dropped.
cpu::Scratch keep_bits(const cpu::Kernels& kernels, const cpu::Dropout& dropout, int64_t T,
                       int64_t I, Loops& loops);

}  // namespace floe
