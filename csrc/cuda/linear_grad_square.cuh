// The squared Frobenius norm of every sample's weight gradient, which is never written: a tile of
// it, or of the sample's two Gram matrices where that is cheaper (|g^T x|^2 = <g g^T, x x^T>),
// lives in registers and leaves one number. Compiled, not yet run.
//
// Dims: N tokens, R columns of g, D columns of x, S samples, I items (tiles).
#pragma once

#include "cuda/grad_square_schedule.h"
#include "cuda/grad_square_tiles.cuh"
#include "cuda/linear_grad_square_schedule.h"
#include "cuda/sums.cuh"

namespace floe::cuda {

struct LinearGradSquare {
  Source g, x;
  Segments segments;
  const float* scale;   // null, () or (S,)
  int scale_each;       // 1 for (S,), else 0
  int64_t* first_item;  // (S + 1,)
  float* item_parts;    // (most_items,), of which first_item[S] are used
  int64_t most_items;   // more than these come of offsets that decrease, and are left out
  float* norms;         // (S,)
};

// One 128 x 128 tile of a product by 256 threads, on tensor cores; 8 warps of 64 x 32 each.
template <typename scalar_t>
struct MmaSquare {
  using Type = scalar_t;
  static constexpr int kDepth = 64, kStages = 3, kSums = 64;

  static FLOE_DEVICE int warp_row() { return threadIdx.x / 32 % 2 * 64; }
  static FLOE_DEVICE int warp_column() { return threadIdx.x / 64 * 32; }
  static FLOE_DEVICE int row(int i) {
    return warp_row() + i / 16 * 16 + i / 2 % 2 * 8 + threadIdx.x % 32 / 4;
  }
  static FLOE_DEVICE int column(int i) {
    return warp_column() + i / 4 % 4 * 8 + threadIdx.x % 4 * 2 + i % 2;
  }

  static FLOE_DEVICE void multiply(float (&sums)[kSums], const uint32_t (&a)[4],
                                   const uint32_t (&b)[2][4], int m) {
#pragma unroll
    for (int n = 0; n < 4; ++n) {
      multiply_add<scalar_t>(sums + (m * 4 + n) * 4, a, b[n / 2][n % 2], b[n / 2][n % 2 + 2]);
    }
  }

  // a^T b for tiles (kDepth, 128) of which `depth` rows count.
  static FLOE_DEVICE void across_rows(float (&sums)[kSums], const char* a_tile, const char* b_tile,
                                      const char* zero_row, int depth) {
    const Shared left = shared_address(a_tile), right = shared_address(b_tile);
    const Shared zeros = shared_address(zero_row);
    const int lane = threadIdx.x % 32;
    const int chunk_a = warp_row() / 8 + lane / 8 % 2, chunk_b = warp_column() / 8 + lane / 8 % 2;
    for (int k = 0; k < depth; k += 16) {
      const int at = k + lane / 16 * 8 + lane % 8;
      uint32_t a[4], b[2][4];
#pragma unroll
      for (int n = 0; n < 2; ++n) {
        const Shared from = right + swizzled<16>(at, chunk_b + n * 2) * 16;
        load_matrices_transposed(b[n], at < depth ? from : zeros);
      }
#pragma unroll
      for (int m = 0; m < 4; ++m) {
        const Shared from = left + swizzled<16>(at, chunk_a + m * 2) * 16;
        load_matrices_transposed(a, at < depth ? from : zeros);
        multiply(sums, a, b, m);
      }
    }
  }

  // a b^T for tiles (128, kDepth) of which the warp's parts may be beyond the sample.
  static FLOE_DEVICE void across_columns(float (&sums)[kSums], const char* a_tile,
                                         const char* b_tile, int rows_a, int rows_b) {
    if (warp_row() >= rows_a || warp_column() >= rows_b) return;
    const Shared left = shared_address(a_tile), right = shared_address(b_tile);
    const int lane = threadIdx.x % 32;
    const int row_a = warp_row() + lane % 16, row_b = warp_column() + lane % 16;
#pragma unroll
    for (int k = 0; k < kDepth; k += 16) {
      const int chunk = k / 8 + lane / 16;
      uint32_t a[4], b[2][4];
#pragma unroll
      for (int n = 0; n < 2; ++n) {
        load_matrices(b[n], right + swizzled<8>(row_b + n * 16, chunk) * 16);
      }
#pragma unroll
      for (int m = 0; m < 4; ++m) {
        load_matrices(a, left + swizzled<8>(row_a + m * 16, chunk) * 16);
        multiply(sums, a, b, m);
      }
    }
  }
};

// The same in float32 on the ordinary units: every thread has 8 x 8 sums, 16 apart.
struct FmaSquare {
  using Type = float;
  static constexpr int kDepth = 32, kStages = 3, kSums = 64;

  static FLOE_DEVICE int row(int i) { return threadIdx.x % 16 + i / 8 * 16; }
  static FLOE_DEVICE int column(int i) { return threadIdx.x / 16 + i % 8 * 16; }

  // Element (r, c) of a tile whose rows have kChunks of 4.
  template <int kChunks>
  static FLOE_DEVICE float element(const char* tile, int r, int c) {
    return reinterpret_cast<const float*>(tile)[swizzled<kChunks>(r, c / 4) * 4 + c % 4];
  }

  template <typename left_t, typename right_t>
  static FLOE_DEVICE void multiply(float (&sums)[kSums], left_t left, right_t right) {
    float b[8];
#pragma unroll
    for (int j = 0; j < 8; ++j) b[j] = right(column(j));
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const float a = left(row(i * 8));
#pragma unroll
      for (int j = 0; j < 8; ++j) sums[i * 8 + j] += a * b[j];
    }
  }

  static FLOE_DEVICE void across_rows(float (&sums)[kSums], const char* a, const char* b,
                                      const char*, int depth) {
#pragma unroll 1
    for (int k = 0; k < depth; ++k) {
      multiply(
          sums, [&](int column) { return element<32>(a, k, column); },
          [&](int column) { return element<32>(b, k, column); });
    }
  }

  static FLOE_DEVICE void across_columns(float (&sums)[kSums], const char* a, const char* b, int,
                                         int) {
#pragma unroll 1
    for (int k = 0; k < kDepth; ++k) {
      multiply(
          sums, [&](int row) { return element<8>(a, row, k); },
          [&](int row) { return element<8>(b, row, k); });
    }
  }
};

constexpr int kItemThreads = 256;

template <typename Square>
constexpr int kSquareBytes =
    kNormTile * Square::kDepth * static_cast<int>(sizeof(typename Square::Type));

// A row of zeros, a place for each warp's sum, then the stages of two operands.
template <typename Square>
constexpr int linear_grad_square_shared() {
  return 16 + kSumWarps * 4 + Square::kStages * 2 * kSquareBytes<Square>;
}

// Scans the samples' items. Grid: 1.
static __global__ void __launch_bounds__(kSumThreads)
    list_items_kernel(const LinearGradSquare call) {
  FLOE_DYNAMIC_SHARED(shared);
  const int64_t samples = call.segments.samples;
  int64_t carry = 0;
  for (int64_t first = 0; first < samples; first += kSumThreads) {
    const int64_t i = first + threadIdx.x;
    int64_t items = 0;
    if (i < samples) {
      const int64_t T = call.segments.bound(i + 2) - call.segments.bound(i + 1);
      items = count_items(T, call.g.columns, call.x.columns);
    }
    const int64_t before = scan_block(items, reinterpret_cast<int64_t*>(shared), carry);
    if (i < samples) call.first_item[i] = before < call.most_items ? before : call.most_items;
  }
  if (threadIdx.x == 0) {
    call.first_item[samples] = carry < call.most_items ? carry : call.most_items;
  }
}

// Grid: any; blocks take items in turn, and an item's number does not depend on which took it.
template <typename Square>
__global__ void __launch_bounds__(kItemThreads, 1)
    linear_grad_square_kernel(const LinearGradSquare call) {
  using scalar_t = typename Square::Type;
  constexpr int kDepth = Square::kDepth, kStages = Square::kStages, kSums = Square::kSums;
  FLOE_DYNAMIC_SHARED(shared);
  char* const zeros = shared;
  auto* const scratch = reinterpret_cast<float*>(shared + 16);
  char* const stages = shared + 16 + kSumWarps * 4;
  if (threadIdx.x < 4) reinterpret_cast<float*>(zeros)[threadIdx.x] = 0;

  const int64_t samples = call.segments.samples, items = call.first_item[samples];
  for (int64_t item = blockIdx.x; item < items; item += gridDim.x) {
    const int64_t sample =
        search_warp(samples, item, [&](int64_t i) { return call.first_item[i]; });
    const int64_t index = item - call.first_item[sample];
    const int64_t begin = call.segments.bound(sample + 1);
    const int64_t T = call.segments.bound(sample + 2) - begin;
    const int R = call.g.columns, D = call.x.columns;
    const bool gram = uses_gram(T, R, D);
    // of the gradient's tiles, those of R fastest; of a Gram matrix's, the lower triangle
    const TilePlace place =
        gram ? triangle_place(index) : TilePlace{index / norm_tiles(R), index % norm_tiles(R)};
    const auto rows_of = [&](int64_t block) {
      const int64_t rest = T - block * kNormTile;
      return rest < kNormTile ? static_cast<int>(rest) : kNormTile;
    };
    const int rows_a = gram ? rows_of(place.row) : 0, rows_b = gram ? rows_of(place.column) : 0;
    const bool diagonal = gram && place.row == place.column;  // one operand serves as both
    // a Gram item goes through the columns of g and then of x, another through the tokens
    const int steps_g = gram ? (R + kDepth - 1) / kDepth : 0;
    const int steps =
        gram ? steps_g + (D + kDepth - 1) / kDepth : static_cast<int>((T + kDepth - 1) / kDepth);
    const auto stage = [&](int step) { return stages + step % kStages * 2 * kSquareBytes<Square>; };
    const auto depth_of = [&](int step) {
      const int64_t rest = T - static_cast<int64_t>(step) * kDepth;
      return rest < kDepth ? static_cast<int>(rest) : kDepth;
    };
    const auto load = [&](int step) {
      char* const a = stage(step);
      char* const b = a + kSquareBytes<Square>;
      if (step < steps && gram) {
        const Source& source = step < steps_g ? call.g : call.x;
        const int column = (step < steps_g ? step : step - steps_g) * kDepth;
        load_tile<scalar_t, kDepth, kNormTile, kItemThreads, true>(
            a, source, begin + place.row * kNormTile, rows_a, column);
        if (!diagonal) {
          load_tile<scalar_t, kDepth, kNormTile, kItemThreads, true>(
              b, source, begin + place.column * kNormTile, rows_b, column);
        }
      } else if (step < steps) {
        const int64_t row = begin + static_cast<int64_t>(step) * kDepth;
        load_tile<scalar_t, kNormTile, kDepth, kItemThreads, true>(
            a, call.x, row, depth_of(step), static_cast<int>(place.row) * kNormTile);
        load_tile<scalar_t, kNormTile, kDepth, kItemThreads, true>(
            b, call.g, row, depth_of(step), static_cast<int>(place.column) * kNormTile);
      }
      commit_copies();
    };

    sync_block();  // the item before has been read
    for (int step = 0; step < kStages - 1; ++step) load(step);
    float first[kSums] = {}, sums[kSums] = {};
#pragma unroll 1
    for (int step = 0; step < steps; ++step) {
      wait_copies<kStages - 2>();
      sync_block();
      load(step + kStages - 1);
      const char* const a = stage(step);
      const char* const b = diagonal ? a : a + kSquareBytes<Square>;
      if (gram) {
        if (step == steps_g) {
#pragma unroll
          for (int i = 0; i < kSums; ++i) first[i] = sums[i], sums[i] = 0;
        }
        Square::across_columns(sums, a, b, rows_a, rows_b);
      } else {
        Square::across_rows(sums, a, b, zeros, depth_of(step));
      }
    }
    float norm = 0;
#pragma unroll
    for (int i = 0; i < kSums; ++i) {
      // rows beyond the sample are not even loaded
      const bool live = Square::row(i) < rows_a && Square::column(i) < rows_b;
      norm += !gram ? sums[i] * sums[i] : live ? first[i] * sums[i] : 0.0f;
    }
    norm = sum_block(norm, scratch);
    if (threadIdx.x == 0) call.item_parts[item] = gram && !diagonal ? 2 * norm : norm;
  }
}

// A warp for each sample.
static __global__ void __launch_bounds__(256) add_items_kernel(const LinearGradSquare call) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * 8 + threadIdx.x / 32;
  if (i >= call.segments.samples) return;
  const int64_t first = call.first_item[i];
  const float sum = sum_numbers(call.item_parts + first, call.first_item[i + 1] - first);
  const float scale = call.scale ? call.scale[i * call.scale_each] : 1.0f;
  // terms of Gram matrices have both signs; rounded, a sum near zero may be below it
  if (threadIdx.x % 32 == 0) call.norms[i] = (sum < 0 ? 0.0f : sum) * scale * scale;
}

}  // namespace floe::cuda
