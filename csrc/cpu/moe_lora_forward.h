#pragma once

#include "cpu/moe_lora_call.h"

namespace floe {

// out is base + the experts' sum; base may be out itself. All in x's dtype.
struct [[gnu::visibility("hidden")]] ForwardOutputs {
  const void* base;  // (T, O), or null for zero
  Tensor out;        // (T, O)
  Tensor z;          // (T, C)
  Tensor experts;    // (T, K) int64
  Tensor gates;      // (T, K) float32, or float64
  Tensor logits;     // (T, E)
};

void forward_dense(const Experts& given, const ForwardOutputs& to);
void forward_grouped(const Experts& given, const ForwardOutputs& to);

// Logits, gates and experts of tokens t0..t0 + M.
template <typename wide>
void route_tokens(const Experts& given, const cpu::Kernels& kernels, const cpu::Layer<wide>& layer,
                  const ForwardOutputs& to, int64_t t0, int64_t M) {
  const Tensor& w = given.router_weight;
  auto* logits = static_cast<wide*>(to.logits.mutable_data_ptr());
  kernels.gather_dots({given.x.const_data_ptr(), layer.I, layer.I, nullptr, t0, M, nullptr, 0,
                       w.const_data_ptr(), dtype_of(w), layer.I, layer.E, logits + t0 * layer.E,
                       layer.E, nullptr});
  std::vector<int64_t> order;
  for (int64_t t = t0; t < t0 + M; ++t) {
    cpu::route(layer, t, logits, static_cast<wide*>(to.gates.mutable_data_ptr()),
               to.experts.mutable_data_ptr<int64_t>(), order);
  }
}

}  // namespace floe
