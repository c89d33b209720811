// The two-source kernel itself on an emulated cluster, on ragged problems, against plain loops; the
// walk over the tiles; what a block shares.
#include <algorithm>
#include <map>
#include <random>
#include <set>

#include "cuda/tests/two_source_sm.h"
#include "cuda/two_source_gemm.cuh"

namespace floe::two_source {
namespace {

using isa::expect;
using isa::Global;

template <class Tile, Major first>
void multiply(const Problem& problem, int clusters, bool with_bias, std::mt19937& random) {
  const auto fill = [&](Global& m) {
    for (auto& value : m.data) value = static_cast<isa::Element>(random() % 9) - 4;
  };
  const int T = problem.rows, N = problem.columns;
  std::vector<Global> a, b;
  Global out(T, N, -32768), writes(T, N), bias(1, N + N % 2);
  if (with_bias) fill(bias);
  for (int s = 0; s < problem.sources; ++s) {
    const int K = problem.depth[s];
    const bool deep = s == 0 && first == Major::kDepth;
    fill(a.emplace_back(T, K));
    fill(deep ? b.emplace_back(N, K) : b.emplace_back(K, N));
  }
  Arguments args = {};
  args.problem = problem;
  args.bias = with_bias ? bias.data.data() : nullptr;
  args.out = {&out, &writes, box_out()};
  for (int s = 0; s < problem.sources; ++s) {
    args.a[s] = {&a[s], nullptr, box_a<Tile>()};
    args.b[s] = {&b[s], nullptr, box_b<Tile>(s == 0 ? first : Major::kColumn)};
  }

  for (int c = 0; c < clusters; ++c) {
    sm::run(Tile::kCluster, c, clusters, [&] { two_source_gemm<Tile, first, isa::Element>(args); });
  }
  for (int t = 0; t < T; ++t) {
    for (int n = 0; n < N; ++n) {
      long sum = bias.at(0, n);
      for (int s = 0; s < problem.sources; ++s) {
        const bool deep = s == 0 && first == Major::kDepth;
        for (int k = 0; k < problem.depth[s]; ++k) {
          sum += long{a[s].at(t, k)} * (deep ? b[s].at(n, k) : b[s].at(k, n));
        }
      }
      expect(writes.at(t, n) == 1, "an element is not written once");
      expect(out.at(t, n) == sum, "a wrong element");
    }
  }
}

// Every tile once, whoever takes it, in groups as tall as promised; all of it in range.
template <class Tile>
void walk(const Problem& problem, int clusters) {
  std::map<std::pair<int, int>, int> seen;
  for (int c = 0; c < clusters; ++c) {
    for (Walk<Tile> walk(problem, c, clusters); walk.busy(); walk.advance()) {
      for (int rank = 0; rank < Tile::kCluster; ++rank) {
        const Origin at = walk.origin(rank);
        expect(at.row % Tile::kRows == 0 && at.column % Tile::kColumns == 0, "no tile's corner");
        expect(at.column >= 0 && at.column < problem.columns, "a column outside the output");
        expect(at.row >= 0 && at.row < problem.rows + (Tile::kCluster - 1) * Tile::kRows,
               "a row outside the output");
        ++seen[{at.row, at.column}];
      }
    }
  }
  const auto count = cluster_tiles<Tile>(problem.rows, problem.columns) * Tile::kCluster;
  expect(static_cast<int64_t>(seen.size()) == count, "a tile is missing");
  for (const auto& [at, times] : seen) expect(times == 1, "a tile is done twice");
}

// What 66 pairs touch at once on a large output is near the least that as many tiles can touch.
void walk_is_compact() {
  const Problem problem = {8192, 4096, 1, {64}};
  std::set<int> rows, columns;
  for (int c = 0; c < 66; ++c) {
    const Origin at = Walk<Wide>(problem, c, 66).origin(0);
    rows.insert(at.row), columns.insert(at.column);
  }
  expect(rows.size() * 2 * Wide::kRows + columns.size() * Wide::kColumns <= 4608, "a long wave");
}

// Tiles are chosen by when the last SM ends.
void choice_of_tile() {
  expect(prefers_wide(8192, 4096, 132), "wide: 8 rounds against 16 of half the work");
  expect(prefers_wide(1024, 4096, 132), "wide: one round against two");
  expect(!prefers_wide(512, 4096, 132), "narrow: one round either way");
  expect(!prefers_wide(1, 4096, 132), "narrow: one round either way");
  expect(!prefers_wide(1025, 4096, 132), "narrow: the second round of wide tiles is all but empty");
}

template <class Tile>
void memory_is_disjoint() {
  for (uint32_t start = 0x400; start < 0x800; start += 16) {
    const Shared<Tile> shared(start);
    std::vector<std::pair<uint32_t, uint32_t>> parts;
    for (int s = 0; s < Tile::kStages; ++s) {
      expect(shared.stage(s) % kAtomBytes == 0, "a stage is not at an atom");
      parts.push_back({shared.stage(s), Tile::kStageBytes});
      parts.push_back({shared.full(s), 8}), parts.push_back({shared.empty(s), 8});
    }
    for (int i = 0; i < 2 * kConsumerWarps; ++i) {
      expect(shared.staging(i / 2, i % 2) % kAtomBytes == 0, "a buffer is not at an atom");
      parts.push_back({shared.staging(i / 2, i % 2), Tile::kStagingBytes});
    }
    std::sort(parts.begin(), parts.end());
    uint32_t end = start;
    for (const auto& [at, bytes] : parts) expect(at >= end, "two parts overlap"), end = at + bytes;
    expect(end - start <= Tile::kSharedBytes, "more shared memory than was asked for");
  }
}

template <class Tile>
void run(std::mt19937& random) {
  memory_is_disjoint<Tile>();
  for (int rows = 1; rows < 2600; rows += 123) {
    for (int columns = 8; columns < 1500; columns += 248) {
      for (const int clusters : {1, 2, 7, 66, 400}) walk<Tile>({rows, columns, 1, {64}}, clusters);
    }
  }
  for (int i = 0; i < 20; ++i) {
    walk<Tile>(
        {static_cast<int>(random() % 100000) + 1, static_cast<int>(random() % 20000) + 1, 1, {64}},
        static_cast<int>(random() % 200) + 1);
  }
  constexpr Major kDeep = Major::kDepth, kFlat = Major::kColumn;
  multiply<Tile, kDeep>({1, 8, 1, {1}}, 1, false, random);
  multiply<Tile, kDeep>({300, 264, 2, {200, 40}}, 1, true, random);
  multiply<Tile, kDeep>({129, 520, 2, {448, 16}}, 2, true, random);
  multiply<Tile, kFlat>({63, 256, 2, {64, 136}}, 1, false, random);
  multiply<Tile, kFlat>({257, 304, 3, {136, 72, 8}}, 2, false, random);
  multiply<Tile, kFlat>({64, 40, 3, {72, 16, 3}}, 3, false, random);  // two have nothing to do
  for (int i = 0; i < 10; ++i) {
    const auto draw = [&](int most) { return static_cast<int>(random() % most) + 1; };
    const Problem problem = {draw(400), draw(400), draw(3), {draw(300), draw(130), draw(70)}};
    i % 2 ? multiply<Tile, kDeep>(problem, draw(3), true, random)
          : multiply<Tile, kFlat>(problem, draw(3), false, random);
  }
}

}  // namespace
}  // namespace floe::two_source

int main() {
  std::mt19937 random(1);
  floe::two_source::walk_is_compact();
  floe::two_source::choice_of_tile();
  floe::two_source::run<floe::two_source::Wide>(random);
  floe::two_source::run<floe::two_source::Narrow>(random);
  std::printf("no failures\n");
}
