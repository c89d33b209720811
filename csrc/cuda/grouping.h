// How pairs (token, slot) are shared out among warps that sort them. No torch, no CUDA.
//
// Dims: N tokens, K experts per token, E experts, B samples, W warps.
#pragma once

#include <cstdint>

#include "cuda/host_device.h"

namespace floe::cuda {

constexpr int kSortWarps = 8, kSortBlocks = 128;  // warps a block, and blocks at most
constexpr int kMostExperts = 1024;

// Warp w owns the pairs w * span .. (w + 1) * span, cut off at the end.
struct SortPlan {
  int64_t pairs, span;
  int blocks;

  FLOE_HOST_DEVICE int64_t begin(int64_t warp) const {
    const int64_t at = warp * span;
    return at < pairs ? at : pairs;
  }
  FLOE_HOST_DEVICE int64_t warps() const { return int64_t{kSortWarps} * blocks; }
};

// Spans of whole steps of 32, at least four of them: enough warps, and few counts to add up.
FLOE_HOST_DEVICE SortPlan plan_sort(int64_t pairs) {
  const int64_t most = int64_t{kSortWarps} * kSortBlocks;
  int64_t span = ((pairs + most - 1) / most + 31) / 32 * 32;
  if (span < 128) span = 128;
  const int64_t blocks = (pairs + span * kSortWarps - 1) / (span * kSortWarps);
  return {pairs, span, static_cast<int>(blocks < 1 ? 1 : blocks)};
}

// The first of the sorted rows that is not below `row`.
FLOE_HOST_DEVICE int64_t lower_bound(const int64_t* rows, int64_t count, int64_t row) {
  int64_t low = 0;
  while (count > 0) {
    const int64_t half = count / 2;
    if (rows[low + half] < row) {
      low += half + 1, count -= half + 1;
    } else {
      count = half;
    }
  }
  return low;
}

}  // namespace floe::cuda
