// One block's tile of a product x^T g: how its operands reach shared memory, and its sums.
//
// Dims: d columns of x, r columns of g, t rows (tokens) of a stage. Compiled, not yet run.
#pragma once

#include <type_traits>

#include "cuda/device.cuh"
#include "cuda/grad_square_schedule.h"

namespace floe::cuda {

// Columns column..column + kColumns of rows first..first + rows of a matrix in global memory.
struct Source {
  const char* data;  // row 0, column 0
  int64_t row_bytes;
  int columns;   // the matrix has; zeros follow
  bool aligned;  // data and rows begin at multiples of 16 bytes
};

template <typename scalar_t, int kColumns, int kRows, int kThreads, bool kSwizzled>
FLOE_DEVICE void load_tile(char* shared, const Source& source, int64_t first, int rows,
                           int column) {
  constexpr int kPerChunk = 16 / sizeof(scalar_t), kChunks = kColumns / kPerChunk;
  constexpr int kStep =
      kThreads / kChunks;  // rows between a thread's chunks, which lie in a column
  static_assert(kThreads % kChunks == 0 && (!kSwizzled || kStep % 8 == 0));
  const int thread =
      here(threadIdx.x);  // all of this again at every stage: the sums need registers
  const int row = thread / kChunks, chunk = thread % kChunks;
  const int at = column + chunk * kPerChunk;
  int live = source.columns - at;
  live = live < 0 ? 0 : live > kPerChunk ? kPerChunk : live;
  const char* from = source.data + (first + row) * source.row_bytes;
  if (live) from += at * sizeof(scalar_t);  // an address beyond the matrix is not even made
  const int place = (kSwizzled ? swizzled<kChunks>(row, chunk) : row * kChunks + chunk) * 16;
  if (source.aligned) {
    const Shared to = shared_address(shared) + place;
    const int bytes = live * static_cast<int>(sizeof(scalar_t));
#pragma unroll
    for (int i = 0; i < kRows; i += kStep) {
      if (row + i < rows) copy_async(to + i * kChunks * 16, from, bytes);
      from += kStep * source.row_bytes;
    }
  } else {
#pragma unroll 1
    for (int i = 0; i < kRows && row + i < rows; i += kStep) {
      const auto* values = reinterpret_cast<const scalar_t*>(from + i * source.row_bytes);
      auto* to = reinterpret_cast<scalar_t*>(shared + place + i * kChunks * 16);
#pragma unroll 1
      for (int j = 0; j < kPerChunk; ++j) to[j] = j < live ? values[j] : narrow<scalar_t>(0.0f);
    }
  }
}

// 16-bit operands on tensor cores: d on M, r on N, tokens on K, and sums in float32. Both operands
// lie in shared memory as in global memory, tokens outermost; ldmatrix transposes them.
template <typename scalar_t, int kR>
struct MmaTile {
  using XType = scalar_t;
  using GType = scalar_t;
  static constexpr int kColumnsX = 128, kColumnsG = kR, kRows = 64, kStages = 3;
  static constexpr bool kSwizzled = true;

  static constexpr int kWarpR = kR < 32 ? kR : 32;  // a warp's part: 32 columns of x, these of g
  static constexpr int kWarpsD = kColumnsX / 32, kWarps = kWarpsD * (kR / kWarpR);
  static constexpr int kThreads = 32 * kWarps, kBlocksPerSM = 512 / kThreads;
  static constexpr int kTilesD = 2, kTilesR = kWarpR / 8, kSums = kTilesD * kTilesR * 4;
  static constexpr int kXBytes = kRows * kColumnsX * 2, kGBytes = kRows * kR * 2;

  // The tile's column of x and of g that sum i of this thread belongs to.
  static FLOE_DEVICE int column_x(int i) {
    const int warp = threadIdx.x / 32 % kWarpsD, lane = threadIdx.x % 32;
    return warp * 32 + i / (kTilesR * 4) * 16 + i / 2 % 2 * 8 + lane / 4;
  }
  static FLOE_DEVICE int column_g(int i) {
    const int warp = threadIdx.x / 32 / kWarpsD, lane = threadIdx.x % 32;
    return warp * kWarpR + i / 4 % kTilesR * 8 + lane % 4 * 2 + i % 2;
  }

  // sums += the products of rows begin..end of the stage. Lanes whose row is beyond the end read
  // zeros: the next sample's rows must not count, not even as NaN times zero.
  static FLOE_DEVICE void multiply(float (&sums)[kSums], const char* x_tile, const char* g_tile,
                                   const char* zero_row, int begin, int end) {
    const Shared x = shared_address(x_tile), g = shared_address(g_tile);
    const Shared zeros = shared_address(zero_row);
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    // lanes name the same rows of both operands, so one comparison serves both
    const int chunk_x = warp % kWarpsD * 4 + lane / 8 % 2;
    const int chunk_g = warp / kWarpsD * (kWarpR / 8) + lane / 8 % 2;
#pragma unroll 1
    for (int t = begin; t < end; t += 16) {
      const int row = t + lane / 16 * 8 + lane % 8;
      uint32_t a[kTilesD][4];
#pragma unroll
      for (int m = 0; m < kTilesD; ++m) {
        const Shared from = x + swizzled<kColumnsX / 8>(row, chunk_x + m * 2) * 16;
        load_matrices_transposed(a[m], row < end ? from : zeros);
      }
#pragma unroll
      for (int n = 0; n < kTilesR; n += 2) {
        uint32_t b[4];
        const Shared from = g + swizzled<kR / 8>(row, chunk_g + n) * 16;
        load_matrices_transposed(b, row < end ? from : zeros);
#pragma unroll
        for (int m = 0; m < kTilesD; ++m) {
          multiply_add<scalar_t>(sums + (m * kTilesR + n) * 4, a[m], b[0], b[2]);
          multiply_add<scalar_t>(sums + (m * kTilesR + n + 1) * 4, a[m], b[1], b[3]);
        }
      }
    }
  }
};

// Float32 g on the ordinary units: exact to float32, where a split into three tf32 products is
// not, and bound by memory for the ranks that adapters have. x may be 16-bit: it is read as it is.
template <typename x_t, int kR>
struct FmaTile {
  using XType = x_t;
  using GType = float;
  static constexpr int kColumnsX = 128, kColumnsG = kR, kRows = 32, kStages = 3;
  static constexpr bool kSwizzled = false;

  static constexpr int kGroups = kR < 64 ? 1 : 2;  // of four columns of x a thread has
  static constexpr int kThreads = kColumnsX / (4 * kGroups) * (kR / 4), kWarps = kThreads / 32;
  static constexpr int kBlocksPerSM = kR < 64 ? 4 : 1;
  static constexpr int kWarpsD = kColumnsX / (4 * kGroups) / 8, kSums = kGroups * 16;
  static constexpr int kXBytes = kRows * kColumnsX * sizeof(x_t), kGBytes = kRows * kR * 4;

  static FLOE_DEVICE int column_x(int i) {
    const int place = threadIdx.x / 32 % kWarpsD * 8 + threadIdx.x % 8;
    return i / 16 * (kColumnsX / kGroups) + place * 4 + i / 4 % 4;
  }
  static FLOE_DEVICE int column_g(int i) {
    return (threadIdx.x / 32 / kWarpsD * 4 + threadIdx.x % 32 / 8) * 4 + i % 4;
  }

  static FLOE_DEVICE void multiply(float (&sums)[kSums], const char* x, const char* g, const char*,
                                   int begin, int end) {
    const auto* x_row = reinterpret_cast<const x_t*>(x) + column_x(0);
    const auto* g_row = reinterpret_cast<const float*>(g) + column_g(0);
#pragma unroll 2
    for (int t = begin; t < end; ++t) {
      float right[4];
#pragma unroll
      for (int j = 0; j < 4; ++j) right[j] = g_row[t * kR + j];
#pragma unroll
      for (int i = 0; i < kSums; i += 4) {
        const int column = i / 16 * (kColumnsX / kGroups) + i / 4 % 4;
        const float left = widen(x_row[t * kColumnsX + column]);
#pragma unroll
        for (int j = 0; j < 4; ++j) sums[i + j] += left * right[j];
      }
    }
  }
};

}  // namespace floe::cuda
