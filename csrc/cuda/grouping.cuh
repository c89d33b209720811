// A stable counting sort of (token, slot) pairs by expert, with the offsets of every (expert,
// sample): samples are ranges of tokens, so a stable sort by expert sorts by both. Two launches,
// no atomics, nothing on the host. Compiled, not yet run.
//
// Dims: N tokens, K experts per token, E experts (up to 1024), B samples, W warps.
#pragma once

#include "cuda/device.cuh"
#include "cuda/grouping.h"
#include "cuda/sums.cuh"

namespace floe::cuda {

struct SortPairs {
  const int64_t* experts;  // (N, K)
  const uint8_t* mask;     // (N,), 0 for a token without experts; or null
  const int64_t* samples;  // (B + 1,) first tokens, not decreasing; tokens outside have no experts
  int64_t N, B;
  int K, E;
  SortPlan plan;
  int32_t* block_counts;  // (blocks, E + 1)
  int32_t* warp_counts;   // (W, E + 1): how many the block's earlier warps have
  int64_t* pair;          // (N * K,): sorted; those without an expert last
  int64_t* offsets;       // (E * B + 1,)

  // The expert of pair p, or E.
  FLOE_DEVICE int key(int64_t p) const {
    // dividing 64 bits takes longer than the rest
    const int64_t token = p >> 31 ? p / K : static_cast<uint32_t>(p) / static_cast<uint32_t>(K);
    const int64_t expert = experts[p];
    const bool live = (!mask || mask[token]) && token >= samples[0] && token < samples[B];
    return live && expert >= 0 && expert < E ? static_cast<int>(expert) : E;
  }
};

// Takes the warp's pairs from `begin` on, up to 32 and before `end`, in order: visits each with its
// key and its place among the key's, counted in `count` (E + 1,), which is the warp's own.
template <typename visit_t>
FLOE_DEVICE void take_pairs(const SortPairs& call, int32_t* count, int64_t begin, int64_t end,
                            visit_t visit) {
  const int lane = threadIdx.x % 32;
  const int64_t p = begin + lane;
  const int key = p < end ? call.key(p) : -1;
  const unsigned same = match_any(key);
  const int before = count_bits(same & ((1u << lane) - 1));
  int32_t place = 0;
  if (key >= 0) place = count[key] + before;
  sync_warp();  // all have read the counts
  if (key >= 0) {
    if (before == 0) count[key] += count_bits(same);
    visit(p, key, place);
  }
  sync_warp();
}

constexpr int kSortThreads = 32 * kSortWarps;
static_assert(kSortThreads == kSumThreads);

FLOE_HOST_DEVICE int count_shared(int E) { return kSortWarps * (E + 1) * 4; }

// Grid: plan.blocks.
static __global__ void __launch_bounds__(kSortThreads) count_pairs_kernel(const SortPairs call) {
  FLOE_DYNAMIC_SHARED(shared);
  auto* const counts = reinterpret_cast<int32_t*>(shared);  // (kSortWarps, E + 1)
  const int bins = call.E + 1;
  for (int i = threadIdx.x; i < kSortWarps * bins; i += kSortThreads) counts[i] = 0;
  sync_block();
  const int64_t warp = static_cast<int64_t>(blockIdx.x) * kSortWarps + threadIdx.x / 32;
  const int64_t end = call.plan.begin(warp + 1);
  for (int64_t p = call.plan.begin(warp); p < end; p += 32) {
    take_pairs(call, counts + threadIdx.x / 32 * bins, p, end, [](int64_t, int, int32_t) {});
  }
  sync_block();
  for (int bin = threadIdx.x; bin < bins; bin += kSortThreads) {
    int32_t before = 0;
    for (int w = 0; w < kSortWarps; ++w) {
      const int64_t row = static_cast<int64_t>(blockIdx.x) * kSortWarps + w;
      call.warp_counts[row * bins + bin] = before;
      before += counts[w * bins + bin];
    }
    call.block_counts[static_cast<int64_t>(blockIdx.x) * bins + bin] = before;
  }
}

FLOE_HOST_DEVICE int place_shared(int E) { return (E + 1 + kSortWarps) * 8 + count_shared(E); }

// Grid: plan.blocks. Every block adds the counts of all blocks up for itself.
static __global__ void __launch_bounds__(kSortThreads) place_pairs_kernel(const SortPairs call) {
  FLOE_DYNAMIC_SHARED(shared);
  const int bins = call.E + 1, lane = threadIdx.x % 32, own = threadIdx.x / 32;
  auto* const start = reinterpret_cast<int64_t*>(shared);  // (E + 1,) of this block's pairs
  auto* const sums = start + bins;                         // (kSortWarps,)
  auto* const counts = reinterpret_cast<int32_t*>(sums + kSortWarps);

  // bins in chunks of a block's threads: the bins before a chunk, then a scan within it
  int64_t before_chunk = 0;
  for (int first = 0; first < bins; first += kSortThreads) {
    const int bin = first + threadIdx.x;
    int64_t earlier = 0, all = 0;
    for (int b = 0; b < call.plan.blocks && bin < bins; ++b) {
      const int64_t count = call.block_counts[static_cast<int64_t>(b) * bins + bin];
      all += count;
      if (b < static_cast<int>(blockIdx.x)) earlier += count;
    }
    const int64_t before = scan_block(all, sums, before_chunk);
    if (bin < bins) start[bin] = before + earlier;
  }
  for (int i = threadIdx.x; i < kSortWarps * bins; i += kSortThreads) {
    const int64_t row = static_cast<int64_t>(blockIdx.x) * kSortWarps;
    counts[i] = call.warp_counts[row * bins + i];
  }
  sync_block();

  const int64_t warp = static_cast<int64_t>(blockIdx.x) * kSortWarps + own;
  const bool is_last = warp + 1 == call.plan.warps();
  int32_t* const count = counts + own * bins;
  int64_t p = call.plan.begin(warp);
  const int64_t end = call.plan.begin(warp + 1);
  const int64_t K = call.K;
  // samples whose first pair is the warp's: it knows what stands before them
  const auto first_token = [&](int64_t w) { return (w * call.plan.span + K - 1) / K; };
  int64_t sample = warp ? lower_bound(call.samples, call.B, first_token(warp)) : 0;
  const auto last_sample =
      is_last ? call.B : lower_bound(call.samples, call.B, first_token(warp + 1));
  while (true) {
    // a step ends where a sample begins
    const int64_t boundary = sample < last_sample ? call.samples[sample] * K : end;
    const int64_t until = boundary < end ? boundary : end;
    for (int64_t step = p; step < until; step += 32) {
      take_pairs(call, count, step, until, [&](int64_t pair, int key, int32_t place) {
        call.pair[start[key] + place] = pair;
      });
    }
    if (until > p) p = until;
    if (sample >= last_sample) break;
    for (int expert = lane; expert < call.E; expert += 32) {
      call.offsets[expert * call.B + sample] = start[expert] + count[expert];
    }
    ++sample;
  }
  if (is_last && lane == 0) call.offsets[call.E * call.B] = start[call.E - 1] + count[call.E - 1];
}

}  // namespace floe::cuda
