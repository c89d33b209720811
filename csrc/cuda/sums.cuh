// Sums and scans whose order is the same in every run. Compiled, not yet run.
#pragma once

#include "cuda/device.cuh"

namespace floe::cuda {

constexpr int kSumThreads = 256, kSumWarps = kSumThreads / 32;

// The sum over a block of 256 threads; all of them get it. `scratch` has a place for each warp.
FLOE_DEVICE float sum_block(float value, float* scratch) {
  value = sum_warp(value);
  sync_block();  // what was read of an earlier sum has been read
  if (threadIdx.x % 32 == 0) scratch[threadIdx.x / 32] = value;
  sync_block();
  float total = 0;
  for (int warp = 0; warp < kSumWarps; ++warp) total += scratch[warp];
  return total;
}

// One warp's sum of n numbers; all lanes get it.
FLOE_DEVICE float sum_numbers(const float* numbers, int64_t n) {
  float total = 0;
  for (int64_t i = threadIdx.x % 32; i < n; i += 32) total += numbers[i];
  return sum_warp(total);
}

// The sum over the threads before this one of a block of 256, plus `carry`, to which the sum over
// all is added. `scratch` has a place for each warp.
FLOE_DEVICE int64_t scan_block(int64_t value, int64_t* scratch, int64_t& carry) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  int64_t scan = value;  // over the lanes up to this one
  for (int lanes = 1; lanes < 32; lanes *= 2) {
    const int64_t other = shuffle_up(scan, lanes);
    if (lane >= lanes) scan += other;
  }
  if (lane == 31) scratch[warp] = scan;
  sync_block();
  int64_t before = carry;
  for (int w = 0; w < kSumWarps; ++w) {
    if (w < warp) before += scratch[w];
    carry += scratch[w];
  }
  sync_block();
  return before + scan - value;
}

// The last of 0..count - 1 whose entry of an increasing table is at most `value`; the first is.
// Every warp looks for itself, 32 places at a time.
template <typename table_t>
FLOE_DEVICE int64_t search_warp(int64_t count, int64_t value, table_t table) {
  int64_t low = 0, high = count;
  while (high - low > 1) {
    const int64_t step = (high - low + 31) / 32, at = low + step * (threadIdx.x % 32);
    low += step * (count_bits(ballot(at < high && table(at) <= value)) - 1);
    high = low + step < high ? low + step : high;
  }
  return low;
}

}  // namespace floe::cuda
