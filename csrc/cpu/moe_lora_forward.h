#pragma once

#include "cpu/moe_lora_call.h"

namespace floe [[gnu::visibility("hidden")]] {

// out is base + the experts' sum; base may be out itself. All in x's dtype.
struct ForwardOutputs {
  const void* base;  // (T, O), or null for zero
  Tensor out;        // (T, O)
  Tensor z;          // (T, C)
  Tensor experts;    // (T, K) int64
  Tensor gates;      // (T, K) float32, or float64
  Tensor logits;     // (T, E)
};

void forward_dense(const Experts& given, const ForwardOutputs& to);

}  // namespace gnu::visibility("hidden")
