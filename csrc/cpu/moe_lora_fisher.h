#pragma once

#include <array>

#include "cpu/moe_lora_backward.h"

namespace floe {

// Running sums of per-sample squared gradients, as reference/moe_lora.py's FisherBuffers.
struct [[gnu::visibility("hidden")]] FisherBuffers {
  Tensor offsets;  // (S + 1,) int64
  Optional scale, lora_A, lora_B, router, gate;
};

// Memory for the factors, zero where the backward writes nothing.
RowGradients row_gradients(const Experts& given);

// Adds the samples of one backward to every buffer there is. floe::segment_grad_square sums the
// ordinary gradient from the same read of its operands: it becomes that of `out` where that is
// still empty and `wanted` (lora_A, lora_B, router).
void add_fisher(const Experts& given, const BackwardInputs& in, const RowGradients& rows,
                const FisherBuffers& to, std::array<bool, 3> wanted, Gradients& out);

}  // namespace floe
