// Weight gradient, per-sample squares and norms from one read of the operands.
//
// A block owns one tile of the gradient and one unit of rows. It streams the rows through shared
// memory without regard to samples, and takes the square wherever one ends. Units are added up in
// order by a second kernel, which also joins the parts of a sample that is cut between units
// before it squares them; a third adds the norms of the tiles. No atomics: the bits depend on
// shapes and offsets alone. Compiled, not yet run.
//
// Dims: N rows, R columns of g, D columns of x, S samples, U units, P parts of a norm.
#pragma once

#include "cuda/grad_square_tiles.cuh"
#include "cuda/sums.cuh"

namespace floe::cuda {

struct GradSquare {
  Source x, g;
  Segments segments;
  const float* scale;  // null, () or (S,)
  int scale_each;      // 1 for (S,), else 0
  int units;
  bool with_square;       // false where only the norms and their sum are wanted
  float* parts;           // (U, 4, R, D): the kinds below; what a unit does not have is not written
  float* norm_parts;      // (S, P), a whole segment's, one a tile and warp
  float* total_parts;     // (U, P): the squares of all whole segments
  Unit* unit;             // (U,)
  float* joint_norms;     // (U, R * ceil(D / 256)): of the segment that ends in the unit's head
  float* rank_parts;      // (R, ceil(D / 256)), or null
  float *fisher, *norms;  // (R, D), (R,) or (); (S,)

  enum Kind { kGrad, kSquare, kHead, kTail };

  FLOE_HOST_DEVICE int R() const { return g.columns; }
  FLOE_HOST_DEVICE int D() const { return x.columns; }
  FLOE_HOST_DEVICE float* part(int64_t u, Kind kind) const {
    return parts + (u * 4 + kind) * R() * D();
  }
  FLOE_HOST_DEVICE float scale_of(int64_t segment) const {
    return scale ? scale[(segment - 1) * scale_each] : 1.0f;
  }
};

constexpr int kFinishColumns = 256;

// Where unit u begins.
FLOE_DEVICE Cut find_cut(const Segments& segments, int64_t u, int64_t units) {
  if (u == units) return {segments.rows, segments.count()};
  const int64_t target = unit_target(segments, u, units);
  const int64_t segment =
      search_warp(segments.count(), target, [&](int64_t j) { return cost_before(segments, j); });
  return cut_in(segments, segment, target, units);
}

// Before the stages: a row of zeros, the unit's first row, and the squares so far, one a warp.
template <typename Tile>
constexpr int kSharedHeader = 32 + (Tile::kWarps + 3) / 4 * 16;

template <typename Tile>
constexpr int grad_square_shared() {
  return kSharedHeader<Tile> + Tile::kStages * (Tile::kXBytes + Tile::kGBytes);
}

template <typename Tile>
FLOE_DEVICE void store_part(const GradSquare& call, GradSquare::Kind kind,
                            const float (&sums)[Tile::kSums]) {
  const int d = here(blockIdx.z) * Tile::kColumnsX + Tile::column_x(0);
  const int r = here(blockIdx.x) * Tile::kColumnsG + Tile::column_g(0);
  float* const to = call.part(here(blockIdx.y), kind) + static_cast<int64_t>(r) * call.D() + d;
#pragma unroll
  for (int i = 0; i < Tile::kSums; ++i) {
    const int more_d = Tile::column_x(i) - Tile::column_x(0);
    const int more_r = here(Tile::column_g(i) - Tile::column_g(0));
    if (d + more_d < call.D() && r + more_r < call.R()) to[more_r * call.D() + more_d] = sums[i];
  }
}

// Grid: (tiles of R, units, tiles of D), tiles of R fastest, for they read the same x.
template <typename Tile>
__global__ void __launch_bounds__(Tile::kThreads, Tile::kBlocksPerSM)
    grad_square_kernel(const GradSquare call) {
  FLOE_DYNAMIC_SHARED(shared);
  char* const zeros = shared;
  char* const stages = shared + kSharedHeader<Tile>;
  auto* const total = reinterpret_cast<float*>(shared + 32) + threadIdx.x / 32;
  if (threadIdx.x < 4) reinterpret_cast<float*>(zeros)[threadIdx.x] = 0;
  if (threadIdx.x % 32 == 0) *total = 0;

  const Segments& segments = call.segments;
  const int column_g = blockIdx.x * Tile::kColumnsG, column_x = blockIdx.z * Tile::kColumnsX;
  const int u = blockIdx.y;
  const Cut first = find_cut(segments, u, call.units);
  // rows are counted from the unit's first: fewer than 2^31, like the samples
  const int rows = static_cast<int>(find_cut(segments, u + 1, call.units).row - first.row);
  const auto bound = [&](int segment) {
    const int64_t row = segments.bound(segment) - first.row;
    return row > rows ? rows + 1 : static_cast<int>(row);
  };
  const auto stage = [&](int step) {
    return stages + step % Tile::kStages * (Tile::kXBytes + Tile::kGBytes);
  };
  const auto load = [&](int done) {
    if (done < rows) {
      const int some = rows - done < Tile::kRows ? rows - done : Tile::kRows;
      char* const x = stage(done / Tile::kRows);
      load_tile<typename Tile::XType, Tile::kColumnsX, Tile::kRows, Tile::kThreads,
                Tile::kSwizzled>(x, call.x, first.row + done, some, column_x);
      load_tile<typename Tile::GType, Tile::kColumnsG, Tile::kRows, Tile::kThreads,
                Tile::kSwizzled>(x + Tile::kXBytes, call.g, first.row + done, some, column_g);
    }
    commit_copies();  // also where there is nothing: the waits count groups
  };
#pragma unroll
  for (int step = 0; step < Tile::kStages - 1; ++step) load(step * Tile::kRows);

  int segment = static_cast<int>(first.segment), end = bound(segment + 1);
  while (end <= 0 && segment < segments.count()) end = bound(++segment + 1);
  enum { kInHead = 1, kEndedHead = 2, kHasWhole = 4 };  // a head began in an earlier unit
  int state = bound(segment) < 0 ? kInHead : 0;
  if (threadIdx.x == 0 && blockIdx.x == 0 && blockIdx.z == 0) call.unit[u].segment = segment;
  // where warp's share of what belongs to row `index` of a table of parts goes
  const auto part_of = [&](float* table, int64_t index) {
    const int tile = here(blockIdx.z) * gridDim.x + blockIdx.x;
    return table + (index * gridDim.z * gridDim.x + tile) * Tile::kWarps + threadIdx.x / 32;
  };

  float sums[Tile::kSums] = {}, grad[Tile::kSums] = {}, square[Tile::kSums] = {};
#pragma unroll 1
  for (int row = 0; row < rows; row += Tile::kRows) {
    wait_copies<Tile::kStages - 2>();
    sync_block();
    load(row + (Tile::kStages - 1) * Tile::kRows);
    const char* const x = stage(row / Tile::kRows);
    const int filled = rows - row < Tile::kRows ? rows - row : Tile::kRows;
#pragma unroll 1
    for (int begin = 0; begin < filled;) {
      int stop = end - row < filled ? end - row : filled;
      if (stop < begin) stop = begin;  // offsets that decrease are an error, but not a wild read
      Tile::multiply(sums, x, x + Tile::kXBytes, zeros, begin, stop);
      begin = stop;
      if (row + stop < end) break;  // the sample goes on in the next step
      if (state & kInHead) {
        store_part<Tile>(call, GradSquare::kHead, sums);
        state = kEndedHead;
      } else {
        state |= kHasWhole;
        const bool scored = segments.scored(segment);
        const float scale = scored ? call.scale_of(segment) : 0.0f;
        float norm = 0;
#pragma unroll
        for (int i = 0; i < Tile::kSums; ++i) {
          grad[i] += sums[i];
          const float scaled = scored ? sums[i] * scale : 0.0f;  // not NaN * 0
          square[i] += scaled * scaled;
          norm += scaled * scaled;
        }
        norm = sum_warp(norm);
        if (scored && threadIdx.x % 32 == 0) {
          *total += norm;
          *part_of(call.norm_parts, segment - 1) = norm;
        }
      }
#pragma unroll
      for (int i = 0; i < Tile::kSums; ++i) sums[i] = 0;
      do {
        end = bound(++segment + 1);
      } while (end <= row + stop && segment < segments.count());
    }
  }

  const bool goes_on = end > rows && bound(segment) < rows;
  const bool in_head = state & kInHead;
  if (goes_on) {
    const auto kind = in_head ? GradSquare::kHead : GradSquare::kTail;
    store_part<Tile>(call, kind, sums);
  }
  if (state & kHasWhole) {
    store_part<Tile>(call, GradSquare::kGrad, grad);
    if (call.with_square) {
      store_part<Tile>(call, GradSquare::kSquare, square);
    }
  }
  if (threadIdx.x % 32 == 0) *part_of(call.total_parts, u) = *total;
  if (threadIdx.x == 0 && blockIdx.x == 0 && blockIdx.z == 0) {
    Unit& unit = call.unit[u];
    unit.head = state & kEndedHead ? Unit::kEnds : goes_on && in_head ? Unit::kGoesOn : Unit::kNone;
    unit.whole = (state & kHasWhole) != 0, unit.tail = goes_on && !in_head;
  }
}

// Adds the units up in order. Grid: (ceil(D / 256), R); 256 threads, one column of x each.
template <typename scalar_t>
__global__ void __launch_bounds__(256)
    grad_square_finish_kernel(const GradSquare call, scalar_t* grad_out) {
  FLOE_DYNAMIC_SHARED(shared);
  auto* const scratch = reinterpret_cast<float*>(shared);
  const int r = blockIdx.y, d = blockIdx.x * kFinishColumns + threadIdx.x;
  const bool live = d < call.D();
  const int64_t at = static_cast<int64_t>(r) * call.D() + d;
  const int64_t num_blocks = static_cast<int64_t>(gridDim.x) * gridDim.y;
  const auto read = [&](int u, GradSquare::Kind kind) {
    return live ? call.part(u, kind)[at] : 0.0f;
  };

  float joint = 0, grad = 0, square = 0;  // joint: of the sample that is cut; a tail begins it
  for (int u = 0; u < call.units; ++u) {
    const Unit unit = call.unit[u];
    if (unit.head != Unit::kNone) joint += read(u, GradSquare::kHead);
    if (unit.head == Unit::kEnds) {
      grad += joint;
      if (call.segments.scored(unit.segment)) {
        const float scaled = joint * call.scale_of(unit.segment);
        square += scaled * scaled;
        const float norm = sum_block(scaled * scaled, scratch);
        if (threadIdx.x == 0) {
          call.joint_norms[u * num_blocks + r * static_cast<int64_t>(gridDim.x) + blockIdx.x] =
              norm;
        }
      }
    }
    if (unit.whole) {
      grad += read(u, GradSquare::kGrad);
      if (call.with_square) square += read(u, GradSquare::kSquare);
    }
    if (unit.tail) joint = read(u, GradSquare::kTail);
  }
  if (live) grad_out[at] = narrow<scalar_t>(grad);
  if (!call.with_square) return;
  if (!call.rank_parts) {
    if (live) call.fisher[at] = square;
    return;
  }
  square = sum_block(square, scratch);
  if (threadIdx.x == 0) {
    call.rank_parts[r * static_cast<int64_t>(gridDim.x) + blockIdx.x] = square;
  }
}

// A warp for each sample's norm, then for each row of F or for all of it.
static __global__ void __launch_bounds__(256)
    grad_square_norms_kernel(const GradSquare call, int64_t num_parts, int64_t finish_columns) {
  const int64_t job = static_cast<int64_t>(blockIdx.x) * 8 + threadIdx.x / 32;
  const int lane = threadIdx.x % 32;
  const int64_t samples = call.segments.samples, num_blocks = finish_columns * call.R();
  if (job < samples) {
    const int64_t segment = job + 1;
    int where = 0;  // 1 + the unit in which it ends, had it begun in an earlier one
    for (int u = lane; u < call.units; u += 32) {
      const Unit unit = call.unit[u];
      if (unit.head == Unit::kEnds && unit.segment == segment) where = u + 1;
    }
    for (int lanes = 16; lanes; lanes /= 2) {
      const int other = shuffle_xor(where, lanes);
      where = other > where ? other : where;
    }
    float norm = 0;
    if (where) {
      norm = sum_numbers(call.joint_norms + (where - 1) * num_blocks, num_blocks);
    } else if (call.segments.bound(segment) < call.segments.bound(segment + 1)) {
      norm = sum_numbers(call.norm_parts + job * num_parts, num_parts);
    }
    if (lane == 0) call.norms[job] = norm;
  } else if (call.rank_parts && job < samples + call.R()) {
    const int64_t r = job - samples;
    const float sum = sum_numbers(call.rank_parts + r * finish_columns, finish_columns);
    if (lane == 0) call.fisher[r] = sum;
  } else if (!call.with_square && job == samples) {
    float sum = sum_numbers(call.total_parts, call.units * num_parts);
    for (int u = 0; u < call.units; ++u) {
      const Unit unit = call.unit[u];
      if (unit.head == Unit::kEnds && call.segments.scored(unit.segment)) {
        sum += sum_numbers(call.joint_norms + u * num_blocks, num_blocks);
      }
    }
    if (lane == 0) *call.fisher = sum;
  }
}

}  // namespace floe::cuda
