// The step of grad_square_kernels.h for a Machine with tile registers. No torch here.
#pragma once

#include "cpu/grad_square_steps.h"
#include "cpu/tile_amx.h"

namespace floe::cpu {
namespace {

template <typename V>
struct GradSquareAmx {
  using Steps = GradSquareSteps<V, BFloat16>;

  // One thread's share.
  static void panels(const SegmentGradSquare& s, int64_t first, int64_t last, void* scratch) {
    const TileScope scope;
    Steps::panels(s, first, last, scratch);
  }

  static constexpr GradSquareKernels table() {
    GradSquareKernels table = Steps::table();
    table.panels = &panels;
    return table;
  }
};

}  // namespace
}  // namespace floe::cpu
