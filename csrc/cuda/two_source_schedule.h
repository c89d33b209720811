// What the two-source GEMM does when and where, without saying how: every index, address,
// descriptor and the order of every wait. The kernel runs these functions with `ports` that are
// instructions; tests/two_source_*.cpp run the same functions on a CPU, with ports that are an
// emulated SM.
//
// Dims: T rows (tokens), N columns of the output; each source s adds a (T, K_s) times (K_s, N).
#pragma once

#include <cstdint>

#include "cuda/host_device.h"

namespace floe::two_source {

constexpr int kSources = 3;       // at most: [x | h], or [dy | dz | dlogits]
constexpr int kRowBytes = 128;    // of shared memory: what TMA's and wgmma's swizzle permutes
constexpr int kStepDepth = 64;    // of one step: the 16-bit elements of such a row
constexpr int kPanel = 64;        // columns that one such row holds where columns are adjacent
constexpr int kAtomBytes = 1024;  // the swizzle repeats after 8 rows
constexpr int kBlockDepth = 16;   // of one wgmma
constexpr int kWarpRows = 16;     // of the output that one consumer warp holds
constexpr int kConsumers = 2;     // warpgroups, of 64 rows each
constexpr int kConsumerWarps = 4 * kConsumers;
constexpr int kGroup = 8;  // rows of cluster tiles walked together: see Walk
constexpr int kMaxSharedBytes = 227 << 10;

// How one operand lies in memory: adjacent elements follow K (x, weight, h), or the output's
// columns (lora_B, and everything that the backward multiplies by).
enum class Major { kDepth, kColumn };

// A cluster is `cluster` blocks, one below the other, which share the tile of B: each loads its
// part of it into all of them.
template <int columns, int stages, int cluster>
struct Tile {
  static constexpr int kRows = 64 * kConsumers;
  static constexpr int kColumns = columns;
  static constexpr int kStages = stages;
  static constexpr int kCluster = cluster;
  static constexpr int kBytesA = kRows * kRowBytes;
  static constexpr int kStageBytes = kBytesA + kColumns * kRowBytes;
  static constexpr int kRingBytes = kStages * kStageBytes;
  static constexpr int kStagingBytes = kWarpRows * kRowBytes;  // a buffer; every warp has two
  static constexpr int kBarrierBytes = 2 * kStages * 8;
  // dynamic shared memory starts on 16 bytes only: the ring is moved up to the next atom
  static constexpr int kSharedBytes =
      kAtomBytes + kRingBytes + 2 * kConsumerWarps * kStagingBytes + kBarrierBytes;
  static constexpr int kEmptyArrivals = kConsumerWarps * kCluster;
  static_assert(kSharedBytes <= kMaxSharedBytes);
};

// What one block shares, at addresses of the shared window: the ring's stages (A, then B), the
// consumer warps' staging buffers, the barriers.
template <class Tile>
struct Shared {
  uint32_t ring;

  FLOE_HOST_DEVICE explicit Shared(uint32_t dynamic)
      : ring((dynamic + kAtomBytes - 1) / kAtomBytes * kAtomBytes) {}
  FLOE_HOST_DEVICE uint32_t stage(int s) const { return ring + s * Tile::kStageBytes; }
  FLOE_HOST_DEVICE uint32_t staging(int warp, int buffer) const {
    return ring + Tile::kRingBytes + (warp * 2 + buffer) * Tile::kStagingBytes;
  }
  FLOE_HOST_DEVICE uint32_t full(int s) const { return staging(kConsumerWarps, 0) + s * 8; }
  FLOE_HOST_DEVICE uint32_t empty(int s) const { return full(Tile::kStages + s); }
};

using Wide = Tile<256, 4, 2>;
using Narrow = Tile<128, 6, 1>;  // twice as many tiles, for outputs that would leave SMs idle

struct Problem {
  int rows, columns;
  int sources;
  int depth[kSources];  // all > 0
};

struct Origin {
  int row, column;  // of a tile's first element
};

// The tensor maps' boxes, innermost dimension first.
struct Box {
  int inner, outer;
};
template <class Tile>
FLOE_HOST_DEVICE constexpr Box box_a() {
  return {kStepDepth, Tile::kRows};
}
template <class Tile>
FLOE_HOST_DEVICE constexpr Box box_b(Major major) {
  if (major == Major::kColumn) return {kPanel, kStepDepth};
  return {kStepDepth, Tile::kColumns / Tile::kCluster};
}
FLOE_HOST_DEVICE constexpr Box box_out() { return {kPanel, kWarpRows}; }

FLOE_HOST_DEVICE constexpr int64_t tiles(int64_t extent, int64_t tile) {
  return (extent + tile - 1) / tile;
}

// Cluster tiles of the output: those of the last row may reach below the last token.
template <class Tile>
FLOE_HOST_DEVICE constexpr int64_t cluster_tiles(int64_t rows, int64_t columns) {
  return tiles(rows, Tile::kRows * Tile::kCluster) * tiles(columns, Tile::kColumns);
}

// Whether the wide tile ends sooner on this many SMs: half as many tiles, each of twice the work.
// A narrow tile reads a third more bytes an operation, taken to cost it a quarter; not measured.
inline bool prefers_wide(int64_t rows, int64_t columns, int64_t sms) {
  const int64_t wide = tiles(cluster_tiles<Wide>(rows, columns), sms / Wide::kCluster);
  return 8 * wide <= 5 * tiles(cluster_tiles<Narrow>(rows, columns), sms);
}

// The tiles of one cluster, out of `clusters` that share the output. Neighbours in time are kGroup
// rows of tiles, walked column by column, so that what runs at once (66 pairs on an H100) reads
// about as many rows of A as columns of B, and finds the rest in L2.
template <class Tile>
struct Walk {
  int rows, columns;  // in cluster tiles
  int next, clusters;

  FLOE_HOST_DEVICE Walk(const Problem& problem, int cluster, int clusters)
      : rows(tiles(problem.rows, Tile::kRows * Tile::kCluster)),
        columns(tiles(problem.columns, Tile::kColumns)),
        next(cluster),
        clusters(clusters) {}

  FLOE_HOST_DEVICE bool busy() const { return next < rows * columns; }
  FLOE_HOST_DEVICE void advance() { next += clusters; }
  FLOE_HOST_DEVICE Origin origin(int rank) const {
    const int first = next / (kGroup * columns) * kGroup, within = next % (kGroup * columns);
    const int height = rows - first < kGroup ? rows - first : kGroup;
    const int row = first + within % height;
    return {(row * Tile::kCluster + rank) * Tile::kRows, within / height * Tile::kColumns};
  }
};

// Where producer and consumers are in the ring. A barrier's phase of parity p is over once it has
// flipped; at the start the phase before the first one, of parity 1, counts as over.
template <int stages>
struct Ring {
  int stage = 0;
  uint32_t parity = 0;

  FLOE_HOST_DEVICE void advance() {
    if (++stage == stages) stage = 0, parity ^= 1;
  }
};

// One thread of each block: fills the stages, A whole, B in part but in every block of the cluster.
// A box may reach past the ends of a matrix and past K_s: TMA writes zeros there, and counts them.
template <class Tile, Major first, class Ports>
FLOE_HOST_DEVICE void produce(const Problem& problem, Walk<Tile> walk, Ports& ports) {
  constexpr int kShare = Tile::kColumns / Tile::kCluster;
  const int begin = ports.rank() * kShare;
  Ring<Tile::kStages> ring;
  for (; walk.busy(); walk.advance()) {
    const Origin at = walk.origin(ports.rank());
    for (int s = 0; s < problem.sources; ++s) {
      for (int k = 0; k < problem.depth[s]; k += kStepDepth, ring.advance()) {
        ports.wait_empty(ring.stage, ring.parity ^ 1);
        ports.expect(ring.stage, Tile::kStageBytes);
        ports.load_a(ring.stage, 0, s, k, at.row);
        if (s == 0 && first == Major::kDepth) {
          ports.load_b(ring.stage, Tile::kBytesA + begin * kRowBytes, s, k, at.column + begin);
        } else {
          for (int c = begin; c < begin + kShare; c += kPanel) {
            ports.load_b(ring.stage, Tile::kBytesA + c * kRowBytes, s, at.column + c, k);
          }
        }
      }
    }
  }
}

// What tells wgmma where an operand is: PTX ISA, "Matrix Descriptor Format"; offsets in bytes.
// Above the 18 bits of an address stands the block's rank in its cluster, and there it is not
// wanted.
FLOE_HOST_DEVICE constexpr uint64_t descriptor(uint32_t address, uint32_t leading,
                                               uint32_t stride) {
  constexpr uint64_t kSwizzle128 = uint64_t{1} << 62;
  return kSwizzle128 | uint64_t{stride >> 4} << 32 | leading >> 4 << 16 | (address & 0x3ffff) >> 4;
}

// A warpgroup's 64 rows of A: 8 rows are an atom; the leading offset means nothing here.
FLOE_HOST_DEVICE constexpr uint64_t descriptor_a(uint32_t stage_address, int warpgroup) {
  return descriptor(stage_address + warpgroup * 64 * kRowBytes, 16, kAtomBytes);
}

// B with adjacent depths is as A. With adjacent columns it is panels of 64 columns, one after the
// other, in which 8 depths are an atom.
template <class Tile>
FLOE_HOST_DEVICE constexpr uint64_t descriptor_b(uint32_t stage_address, Major major) {
  const uint32_t leading = major == Major::kColumn ? kStepDepth * kRowBytes : 16;
  return descriptor(stage_address + Tile::kBytesA, leading, kAtomBytes);
}

// What a block of 16 depths adds to a descriptor: 32 bytes of each row, or 16 rows.
FLOE_HOST_DEVICE constexpr uint64_t descriptor_step(Major major) {
  return (major == Major::kColumn ? kBlockDepth * kRowBytes : kBlockDepth * 2) >> 4;
}

// The products of one step, of as many blocks as the source still has: what the straight line of
// instructions needs to know when it is compiled.
template <Major major, class Ports>
FLOE_HOST_DEVICE void multiply(int stage, int blocks, bool accumulate, Ports& ports) {
  switch (blocks) {
    case 1:
      return ports.template multiply<major, 1>(stage, accumulate);
    case 2:
      return ports.template multiply<major, 2>(stage, accumulate);
    case 3:
      return ports.template multiply<major, 3>(stage, accumulate);
    default:
      return ports.template multiply<major, 4>(stage, accumulate);
  }
}

// The steps of one source. A stage is given back one step late, when the products that read it are
// known to be over: those of the next step run meanwhile.
template <Major major, int stages, class Ports>
FLOE_HOST_DEVICE void consume_source(int depth, Ring<stages>& ring, int& held, Ports& ports) {
  for (int k = 0; k < depth; k += kStepDepth, ring.advance()) {
    ports.wait_full(ring.stage, ring.parity);
    multiply<major>(ring.stage, (depth - k + kBlockDepth - 1) / kBlockDepth, held >= 0, ports);
    if (held >= 0) {
      ports.template settle<1>();
      ports.release(held);
    }
    held = ring.stage;
  }
}

// Every thread of a consumer warpgroup.
template <class Tile, Major first, class Ports>
FLOE_HOST_DEVICE void consume(const Problem& problem, Walk<Tile> walk, Ports& ports) {
  Ring<Tile::kStages> ring;
  for (; walk.busy(); walk.advance()) {
    int held = -1;  // the stage that products in flight still read
    consume_source<first>(problem.depth[0], ring, held, ports);
    for (int s = 1; s < problem.sources; ++s) {
      consume_source<Major::kColumn>(problem.depth[s], ring, held, ports);
    }
    ports.template settle<0>();
    ports.release(held);
    ports.store(walk.origin(ports.rank()));
  }
}

// PTX ISA, "Register Fragments" of wgmma: element i of a thread's accumulators, in its warp's rows.
struct Element {
  int row, column;
};
FLOE_HOST_DEVICE constexpr Element fragment(int lane, int i) {
  return {lane / 4 + i / 2 % 2 * 8, i / 4 * 8 + lane % 4 * 2 + i % 2};
}

// Byte of a staging buffer where a lane's 16-byte row goes in the pair-th stmatrix.x4 of a box: its
// four matrices are the upper and lower 8 rows of two neighbouring blocks of 8 columns.
FLOE_HOST_DEVICE constexpr int staged_at(int lane, int pair) {
  const int matrix = lane / 8, row = matrix % 2 * 8 + lane % 8, chunk = pair * 2 + matrix / 2;
  return row * kRowBytes + (chunk ^ row % 8) * 16;
}

// Every warp on its own: 16 rows by 64 columns at a time go through one of its two buffers to the
// output. The copies of one tile run on under the products of the next.
template <class Tile, class Ports>
FLOE_HOST_DEVICE void store_tile(Origin at, int warp, int lane, Ports& ports) {
#pragma unroll
  for (int box = 0; box < Tile::kColumns / kPanel; ++box) {
    const int column = at.column + box * kPanel;
    ports.fetch_bias(column + fragment(lane, 0).column);
    ports.claim();  // waits for all copies but the latest, hence for the other one of this buffer
#pragma unroll
    for (int pair = 0; pair < 4; ++pair) ports.put(box % 2, staged_at(lane, pair), box, pair);
    ports.publish(box % 2, column, at.row + warp * kWarpRows);
  }
}

}  // namespace floe::two_source
