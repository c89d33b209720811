#pragma once

#include "cpu/moe_lora_backward.h"

namespace floe {

// Running sums of per-sample squared gradients, as reference/moe_lora.py's FisherBuffers.
struct [[gnu::visibility("hidden")]] FisherBuffers {
  Tensor offsets;  // (S + 1,) int64
  Optional scale, lora_A, lora_B, router, gate;
};

// Memory for the factors, zero where the backward writes nothing.
RowGradients row_gradients(const Experts& given);

// Adds the samples of one backward to every buffer there is.
void add_fisher(const Experts& given, const BackwardInputs& in, const RowGradients& rows,
                const FisherBuffers& to);

}  // namespace floe
