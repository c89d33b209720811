// Softmax of the k largest of E logits, one warp a token. Compiled, not yet run.
//
// Dims: N tokens, E experts (up to 1024), K experts kept per token.
#pragma once

#include "cuda/device.cuh"

namespace floe::cuda {

constexpr int kRouteThreads = 128;

// What is not a number comes first, then the larger; of equals the lower index. As torch.sort does.
template <typename wide_t>
FLOE_DEVICE bool goes_before(wide_t a, int index_a, wide_t b, int index_b) {
  const bool nan_a = a != a, nan_b = b != b;
  if (nan_a != nan_b) return nan_a;
  if (!nan_a && a != b) return a > b;
  return index_a < index_b;
}

// logits (N, E) in rows of `stride`; gates and experts (N, K). A lane has kEach logits.
template <typename scalar_t, typename wide_t, int kEach>
__global__ void __launch_bounds__(kRouteThreads)
    topk_softmax_kernel(const scalar_t* logits, int64_t stride, int64_t N, int E, int K,
                        bool renormalize, scalar_t* gates, int64_t* experts) {
  const int lane = threadIdx.x % 32;
  const int64_t n = static_cast<int64_t>(blockIdx.x) * (kRouteThreads / 32) + threadIdx.x / 32;
  if (n >= N) return;  // whole warps
  const scalar_t* const row = logits + n * stride;
  wide_t value[kEach];
  uint32_t left = 0;  // of this lane's logits, those that are not picked yet
#pragma unroll
  for (int i = 0; i < kEach; ++i) {
    const bool live = i * 32 + lane < E;
    value[i] = live ? static_cast<wide_t>(widen(row[i * 32 + lane])) : wide_t{0};
    left |= static_cast<uint32_t>(live) << i;
  }

  wide_t top = 0, total = 0;
  for (int k = 0; k < K; ++k) {
    wide_t best = 0;
    int index = E;  // none: after every other, for its index is the largest
    bool found = false;
#pragma unroll
    for (int i = 0; i < kEach; ++i) {
      const bool better = !found || goes_before(value[i], i * 32 + lane, best, index);
      if ((left >> i & 1) && better) best = value[i], index = i * 32 + lane, found = true;
    }
#pragma unroll
    for (int lanes = 16; lanes; lanes /= 2) {
      const wide_t other = shuffle_xor(best, lanes);
      const int other_index = shuffle_xor(index, lanes);
      const bool better =
          other_index < E && (index == E || goes_before(other, other_index, best, index));
      if (better) best = other, index = other_index;
    }
    if (index % 32 == lane) left &= ~(1u << index / 32);
    if (k == 0) {
      top = best;  // NaN if any is, and the largest else: no exponent is above 0
      if (!renormalize) {
        wide_t sum = 0;
#pragma unroll
        for (int i = 0; i < kEach; ++i) {
          if (i * 32 + lane < E) sum += exponential(value[i] - top);
        }
        total = sum_warp(sum);
      }
    }
    if (renormalize) total += exponential(best - top);
    if (lane == 0) experts[n * K + k] = index;
  }
  sync_warp();  // lane 0's picks are the other lanes' to read
  for (int k = lane; k < K; k += 32) {
    const auto logit = static_cast<wide_t>(widen(row[experts[n * K + k]]));
    gates[n * K + k] = narrow<scalar_t>(exponential(logit - top) / total);
  }
}

}  // namespace floe::cuda
