// The grouped regime: what both directions share.
#pragma once

#include <algorithm>
#include <utility>

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

// For every group of panels and chunk of tokens: out = base + the slots' products + second.
// `to` has everything but the tokens and segments of a chunk. `slots` must outlive the loops.
template <typename wide>
void expand_slots(const cpu::Kernels& kernels, const cpu::Layer<wide>& layer,
                  const cpu::Slots& slots, const Tensor& weights, cpu::GatherExpand to,
                  Loops& loops) {
  const int64_t T = layer.T, E = layer.E, step = tokens_per_sum(layer);
  const int64_t chunks = (T + step - 1) / step, ld = slot_stride(layer);
  std::vector<cpu::Segment> segments;
  const cpu::Matrix all = matrix(weights);
  for (int64_t c = 0; c < chunks; ++c) {
    for (int64_t e = 0; e < E; ++e) {
      cpu::Matrix own = all;
      own.rows = layer.rank(e);
      own.data = static_cast<const char*>(all.data) +
                 layer.first[e] * all.ld * static_cast<int64_t>(weights.element_size());
      const int64_t begin = slots.find(e, c * step);
      segments.push_back({begin, own.rows ? slots.find(e, (c + 1) * step) : begin, own});
    }
  }
  to.tokens = slots.token.data(), to.num_segments = E;
  const int64_t panels = (to.O + kernels.nr - 1) / kernels.nr;
  int64_t together = cpu::expand_panels(kernels, std::min(T, step), ld);
  // few tasks: as many for every thread, so that none waits for another's last
  const int64_t threads = torch::stable::get_num_threads();
  const int64_t rounds = (panels + together * threads - 1) / (together * threads);
  if (chunks == 1 && rounds < 4 && panels > 0) {
    together = (panels + rounds * threads - 1) / (rounds * threads);
  }
  const int64_t groups = (panels + together - 1) / together;
  loops.add(
      chunks * groups, [=, &kernels, segments = std::move(segments)](int64_t begin, int64_t end) {
        const cpu::Scratch scratch(cpu::expand_scratch(kernels, std::min(T, step), ld, together));
        cpu::GatherExpand task = to;
        for (int64_t i = begin; i < end; ++i) {
          const int64_t c = i / groups, p = i % groups * together;
          task.begin = c * step, task.end = std::min(T, task.begin + step);
          task.segments = segments.data() + c * E;
          kernels.gather_expand(task, p, std::min(panels, p + together), scratch.get());
        }
      });
}

}  // namespace floe
