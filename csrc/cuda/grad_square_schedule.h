// How the rows of ragged samples are shared out among blocks. No torch, no CUDA: a test on the CPU
// takes every step.
//
// Dims: N rows, S samples, U units (each a range of rows, for every tile of the gradient).
#pragma once

#include <cstdint>

#include "cuda/host_device.h"

namespace floe::cuda {

// Samples with the rows before the first and after the last: segments 0 and S + 1 beside 1..S.
struct Segments {
  const int64_t* offsets;  // (S + 1,)
  int64_t rows;            // N
  int64_t samples;

  FLOE_HOST_DEVICE int64_t count() const { return samples + 2; }

  // The first row of segment j, and the last segment's end; within 0..N whatever offsets hold.
  FLOE_HOST_DEVICE int64_t bound(int64_t j) const {
    if (j <= 0) return 0;
    if (j > samples + 1) return rows;
    const int64_t row = offsets[j - 1];
    return row < 0 ? 0 : row > rows ? rows : row;
  }

  FLOE_HOST_DEVICE bool scored(int64_t j) const { return j > 0 && j <= samples; }
};

// A segment costs its rows, a product of 16 rows for a remainder, and taking the square.
constexpr int64_t kSegmentCost = 16;

// What stands before segment j costs this much: known without a scan, and increasing.
FLOE_HOST_DEVICE int64_t cost_before(const Segments& segments, int64_t j) {
  return segments.bound(j) + kSegmentCost * j;
}

// Where unit u begins, of the whole cost; unit U is the end.
FLOE_HOST_DEVICE int64_t unit_target(const Segments& segments, int64_t u, int64_t units) {
  return cost_before(segments, segments.count()) * u / units;
}

// A unit begins at a row, in a segment; at that segment's own first row unless it is long.
struct Cut {
  int64_t row;
  int64_t segment;
};

// Rows a cut within a segment is a multiple of, counted from the segment's first.
constexpr int64_t kCutRows = 64;

// Cuts where the target says, in segment j, which holds it. A segment within a quarter of a unit's
// share is not cut but goes whole to one side; a longer one is, and its parts meet before they are
// squared.
FLOE_HOST_DEVICE Cut cut_in(const Segments& segments, int64_t j, int64_t target, int64_t units) {
  const int64_t begin = segments.bound(j), rows = segments.bound(j + 1) - begin;
  const int64_t share = cost_before(segments, segments.count()) / units;
  const int64_t into = target - cost_before(segments, j), cost = rows + kSegmentCost;
  const Cut before = {begin, j}, after = {begin + rows, j + 1};
  if (cost <= 2 * kCutRows || cost * 4 <= share) return into * 2 < cost ? before : after;
  const int64_t row = into / kCutRows * kCutRows;
  if (row == 0) return before;
  if (row + kCutRows > rows) return after;
  return {begin + row, j};
}

// What a unit found, for the stage that adds the units up.
struct Unit {
  enum Head : int32_t { kNone, kGoesOn, kEnds };

  int64_t segment;  // of the head
  int32_t head;     // part of a segment that began in an earlier unit
  int32_t whole;    // segments that lie in the unit, of which the sums were written
  int32_t tail;     // part of a segment that goes on in the next unit
};

// Units for so many tiles of the gradient: enough to fill 132 multiprocessors, by shapes alone, so
// that the same shapes give the same bits on every GPU.
FLOE_HOST_DEVICE int64_t count_units(int64_t rows, int64_t tiles, int64_t blocks_wanted) {
  const int64_t wanted = (blocks_wanted + tiles - 1) / tiles, most = rows / (4 * kCutRows);
  const int64_t units = wanted < most ? wanted : most;
  return units < 1 ? 1 : units > 64 ? 64 : units;
}

// Where 16-byte chunk c of row r lies in a tile whose rows have kChunks of them, in chunks from the
// tile's beginning: any 8 consecutive rows of one column of chunks lie in different banks.
template <int kChunks>
FLOE_HOST_DEVICE int swizzled(int r, int c) {
  if constexpr (kChunks >= 8) {
    return r * kChunks + (c ^ (r & 7));
  } else {
    return r * kChunks + (c ^ (r / (8 / kChunks) & (kChunks - 1)));
  }
}

}  // namespace floe::cuda
