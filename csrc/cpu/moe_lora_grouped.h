// The grouped regime: what both directions share.
#pragma once

#include <algorithm>

#include "cpu/moe_lora_call.h"
#include "cpu/segments.h"

namespace floe {

// Slots of one expert in a task: several dot tiles over one expert's weights.
inline constexpr int64_t kSlotsPerTask = 32;
// Tokens whose float32 sums of one panel are held at a time. 48 slots of an expert are enough for
// its weights, packed once, to pay; 256 tokens of 48 columns fill L1, 1024 a fifth of L2.
template <typename wide>
int64_t tokens_per_sum(const cpu::Layer<wide>& layer) {
  return std::clamp<int64_t>((48 * layer.E / std::max<int64_t>(layer.K, 1) + 63) / 64 * 64, 128,
                             1024);
}

// Elements between two slots: the largest rank, rounded up so that a unit may be read past it.
template <typename wide>
int64_t slot_stride(const cpu::Layer<wide>& layer) {
  int64_t most = 0;
  for (int64_t e = 0; e < layer.E; ++e) most = std::max(most, layer.rank(e));
  return (most + 7) / 8 * 8;
}

inline cpu::GatherDots gathered(const cpu::Slots& slots, const cpu::Run& run, const void* x,
                                int64_t K, const Tensor& weights, int64_t first_row, int64_t rows,
                                void* sums, int64_t ld_sums) {
  const auto* w = static_cast<const char*>(weights.const_data_ptr());
  const int64_t offset = first_row * K * static_cast<int64_t>(weights.element_size());
  return {x,          K,
          K,          slots.token.data() + run.begin,
          0,          run.end - run.begin,
          nullptr,    0,
          w + offset, dtype_of(weights),
          K,          rows,
          sums,       ld_sums,
          nullptr};
}

// For every panel of columns and chunk of tokens: out = base + the slots' products + second.
// `to` has everything but the tokens and segments of a chunk.
template <typename wide>
void expand_slots(const cpu::Kernels& kernels, const cpu::Layer<wide>& layer,
                  const cpu::Slots& slots, const Tensor& weights, cpu::GatherExpand to) {
  const int64_t step = tokens_per_sum(layer), chunks = (layer.T + step - 1) / step;
  std::vector<cpu::Segment> segments;
  const cpu::Matrix all = matrix(weights);
  for (int64_t c = 0; c < chunks; ++c) {
    for (int64_t e = 0; e < layer.E; ++e) {
      cpu::Matrix own = all;
      own.rows = layer.rank(e);
      own.data = static_cast<const char*>(all.data) +
                 layer.first[e] * all.ld * static_cast<int64_t>(weights.element_size());
      const int64_t begin = slots.find(e, c * step);
      segments.push_back({begin, own.rows ? slots.find(e, (c + 1) * step) : begin, own});
    }
  }
  to.tokens = slots.token.data(), to.num_segments = layer.E;
  const int64_t panels = (to.O + kernels.nr - 1) / kernels.nr;
  torch::stable::parallel_for(0, chunks * panels, 1, [&](int64_t begin, int64_t end) {
    const cpu::Scratch scratch((std::min(layer.T, step) + slot_stride(layer) + 8) * kernels.nr * 8);
    cpu::GatherExpand task = to;
    for (int64_t i = begin; i < end; ++i) {
      const int64_t c = i / panels;
      task.begin = c * step, task.end = std::min(layer.T, task.begin + step);
      task.segments = segments.data() + c * layer.E;
      kernels.gather_expand(task, i % panels, scratch.get());
    }
  });
}

}  // namespace floe
