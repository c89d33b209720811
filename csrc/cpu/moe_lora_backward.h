#pragma once

#include "cpu/moe_lora_call.h"

namespace floe {

// What the forward saved, and what is asked for. grad_out is contiguous, in the dtype of x.
struct [[gnu::visibility("hidden")]] BackwardInputs {
  Tensor grad_out, z, experts, gates, logits;
  bool needs_x, needs_A, needs_B, needs_router;
  bool keeps_rows;  // fill RowGradients, for the Fisher buffers
};

// Row-major factors of the weight gradients, in the dtype of x, where they were asked for.
struct [[gnu::visibility("hidden")]] RowGradients {
  Tensor grad_z;       // (T, C)
  Tensor h;            // (T, R)
  Tensor grad_logits;  // (T, E)
  Tensor gate;         // (T,) float64: the gradient of a gate on the whole adapter
};

template <typename wide>
cpu::AuxLosses<wide> aux_losses(const Experts& given, const cpu::Layer<wide>& layer,
                                const Tensor& experts) {
  if (!given.aux_coefs) return {};
  return {layer, experts.const_data_ptr<int64_t>(), given.aux_coefs->const_data_ptr<float>()};
}

// grad_x holds the base's share of its gradient and gets the experts' added; base_share tells
// whether it holds anything yet.
void backward_dense(const Experts& given, const BackwardInputs& in, bool base_share,
                    const Gradients& out, RowGradients& rows);
void backward_grouped(const Experts& given, const BackwardInputs& in, bool base_share,
                      const Gradients& out, RowGradients& rows);

// Every gradient over the same rows, panel by panel.
void weight_grads(const cpu::Kernels& kernels, const cpu::RowsOf& from,
                  std::vector<cpu::WeightGrad> grads, Loops& loops);

}  // namespace floe
