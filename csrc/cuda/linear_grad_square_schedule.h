// How the norms of per-sample gradients are cut into items of one tile each. No torch, no CUDA.
//
// Dims: N tokens, R and D the sides of the weight, S samples of T tokens.
#pragma once

#include <cmath>
#include <cstdint>

#include "cuda/host_device.h"

namespace floe::cuda {

constexpr int kNormTile = 128;

FLOE_HOST_DEVICE int64_t norm_tiles(int64_t size) { return (size + kNormTile - 1) / kNormTile; }

// Whether a sample goes through its two Gram matrices, which then take fewer products than its
// gradient.
FLOE_HOST_DEVICE bool uses_gram(int64_t T, int64_t R, int64_t D) { return T * (R + D) < R * D; }

// Tiles of the gradient, or of a Gram matrix's lower triangle.
FLOE_HOST_DEVICE int64_t count_items(int64_t T, int64_t R, int64_t D) {
  if (T <= 0) return 0;
  if (!uses_gram(T, R, D)) return norm_tiles(R) * norm_tiles(D);
  return norm_tiles(T) * (norm_tiles(T) + 1) / 2;
}

// No batch of N tokens in S samples has more items: those that use Gram matrices are shorter than
// RD / (R + D), the others are not, so that there are few.
FLOE_HOST_DEVICE int64_t bound_items(int64_t N, int64_t S, int64_t R, int64_t D) {
  const int64_t longest = R * D / (R + D) + 1 < N ? R * D / (R + D) + 1 : N;
  const int64_t shortest = R * D / (R + D) > 1 ? R * D / (R + D) : 1;
  const int64_t direct = N / shortest < S ? N / shortest : S;
  return (norm_tiles(longest) + 1) * (N / kNormTile + S) / 2 +
         direct * norm_tiles(R) * norm_tiles(D);
}

struct TilePlace {
  int64_t row, column;
};

// Item `index` of a triangle counted row by row: (0, 0), (1, 0), (1, 1), (2, 0), ...
FLOE_HOST_DEVICE TilePlace triangle_place(int64_t index) {
  auto row = static_cast<int64_t>((sqrt(8.0 * static_cast<double>(index) + 1) - 1) / 2);
  while (row * (row + 1) / 2 > index) --row;
  while ((row + 1) * (row + 2) / 2 <= index) ++row;
  return {row, index - row * (row + 1) / 2};
}

}  // namespace floe::cuda
