// The two-source GEMM on an emulated cluster, whole: copies that land late and products that run
// late, in random order, on ragged problems, against plain loops; and the walk over the tiles.
#include <algorithm>
#include <cmath>
#include <map>
#include <random>
#include <set>

#include "cuda/tests/two_source_isa.h"
#include "cuda/tests/two_source_machine.h"

namespace floe::two_source {
namespace {

using isa::Global;

struct Operands {
  std::vector<Global> a, b;  // a source each
  std::vector<isa::Element> bias;
  Global out, writes;
};

// One lane's calls in the epilogue.
struct Call {
  enum { kClaim, kPut, kPublish } kind;
  int buffer = 0, offset = 0, i = 0, column = 0, row = 0;
};
struct LaneRecorder {
  std::vector<Call> calls = {};
  void claim() { calls.push_back({Call::kClaim}); }
  void put(int buffer, int offset, int i, int column) {
    calls.push_back({Call::kPut, buffer, offset, i, column});
  }
  void publish(int buffer, int column, int row) {
    calls.push_back({Call::kPublish, buffer, 0, 0, column, row});
  }
};

template <class Tile, Major first>
struct Emulator {
  Machine<Tile> machine;
  Operands& data;
  std::mt19937& random;
  std::vector<isa::Memory> memory = std::vector<isa::Memory>(Tile::kCluster);
  std::map<int, isa::Sums> sums = {};                            // by thread of the machine
  std::map<int, std::deque<std::function<void()>>> stores = {};  // by warp: not yet read

  static Shared<Tile> shared(int block) { return Shared<Tile>(block << 24 | 0x410); }

  void land(int f) {
    const auto [op, block] = machine.land(f);
    const Box box = op->b ? box_b<Tile>(op->major) : box_a<Tile>();
    isa::tma_load(memory[block], shared(block).stage(op->stage) + op->offset,
                  (op->b ? data.b : data.a)[op->source], box.inner, box.outer, op->inner,
                  op->outer);
  }

  void finish(int t) {
    const Op& op = machine.finish(t);
    const int block = t / kActors, warpgroup = t % kActors - 1;
    const uint32_t stage = shared(block).stage(op.stage);
    const uint64_t a = descriptor_a(stage, warpgroup), b = descriptor_b<Tile>(stage, op.major);
    auto& held =
        sums.try_emplace(t, 128, std::vector<double>(Tile::kColumns / 2, NAN)).first->second;
    for (int i = 0; i < op.value; ++i) {
      isa::wgmma(memory[block], held, Tile::kColumns, a + i * descriptor_step(Major::kDepth),
                 b + i * descriptor_step(op.major), op.major == Major::kColumn, op.b || i);
    }
  }

  void store(int t, Origin at) {
    const int block = t / kActors;
    for (int w = 0; w < 4; ++w) {
      const int warp = (t % kActors - 1) * 4 + w;
      LaneRecorder lanes[32];
      for (int lane = 0; lane < 32; ++lane) store_tile<Tile>(at, warp, lane, lanes[lane]);
      for (size_t c = 0; c < lanes[0].calls.size(); ++c) replay(t, block, warp, lanes, c);
    }
    for (auto& thread : sums[t]) std::fill(thread.begin(), thread.end(), NAN);
  }

  isa::Element rounded(double sum, int column) const {
    if (column < data.out.columns) sum += data.bias[column];
    expect(std::abs(sum) < 30000, "a sum is missing or not in range");
    return static_cast<isa::Element>(sum);
  }

  void replay(int t, int block, int warp, LaneRecorder (&lanes)[32], size_t c) {
    const Call& call = lanes[0].calls[c];
    auto& queue = stores[block * kConsumerWarps + warp];
    const auto address = [&](int buffer) { return shared(block).staging(warp, buffer); };
    if (call.kind == Call::kClaim) {
      while (queue.size() > 1) queue.front()(), queue.pop_front();
    } else if (call.kind == Call::kPublish) {
      queue.push_back([this, block, call, from = address(call.buffer)] {
        const Box box = box_out();
        isa::tma_store(data.out, data.writes, memory[block], from, box.inner, box.outer,
                       call.column, call.row);
      });
    } else {
      uint32_t rows[32];
      isa::Element held[32][4][2];
      for (int lane = 0; lane < 32; ++lane) {
        const Call& own = lanes[lane].calls[c];
        const auto& mine = sums[t][warp % 4 * 32 + lane];
        rows[lane] = address(own.buffer) + own.offset;
        for (int j = 0; j < 4; ++j) {  // as Consumer::put packs them
          for (int e = 0; e < 2; ++e) {
            held[lane][j][e] = rounded(mine[own.i + 2 * j + e], own.column + j / 2 * 8 + e);
          }
        }
      }
      isa::stmatrix(memory[block], rows, held);
    }
  }

  void run() {
    while (!machine.over() || !machine.flights.empty()) {
      std::vector<std::function<void()>> choices;
      for (int t = 0; t < machine.threads(); ++t) {
        if (machine.ready(t)) {
          choices.push_back([&, t] {
            const Op& op = machine.advance(t);
            if (op.kind == Kind::kStore) store(t, op.at);
          });
        }
        if (!machine.running[t].empty()) choices.push_back([&, t] { finish(t); });
      }
      for (size_t f = 0; f < machine.flights.size(); ++f) choices.push_back([&, f] { land(f); });
      expect(!choices.empty(), "a deadlock");
      choices[random() % choices.size()]();
    }
    for (auto& [warp, queue] : stores) {
      for (auto& copy : queue) copy();
    }
  }
};

template <class Tile, Major first>
void multiply(const Problem& problem, int clusters, std::mt19937& random) {
  const auto fill = [&](Global& m) {
    for (auto& value : m.data) value = static_cast<isa::Element>(random() % 9) - 4;
  };
  const int T = problem.rows, N = problem.columns;
  Operands data = {{}, {}, {}, Global(T, N, -32768), Global(T, N)};
  for (int s = 0; s < problem.sources; ++s) {
    const int K = problem.depth[s];
    const bool deep = s == 0 && first == Major::kDepth;
    fill(data.a.emplace_back(T, K));
    fill(deep ? data.b.emplace_back(N, K) : data.b.emplace_back(K, N));
  }
  for (int n = 0; n < N; ++n) data.bias.push_back(static_cast<isa::Element>(random() % 999));

  for (int cluster = 0; cluster < clusters; ++cluster) {
    const auto programs = record<Tile, first>(problem, cluster, clusters);
    Emulator<Tile, first>{Machine<Tile>(programs), data, random}.run();
  }
  for (int t = 0; t < T; ++t) {
    for (int n = 0; n < N; ++n) {
      long sum = data.bias[n];
      for (int s = 0; s < problem.sources; ++s) {
        const bool deep = s == 0 && first == Major::kDepth;
        for (int k = 0; k < problem.depth[s]; ++k) {
          sum += long{data.a[s].at(t, k)} * (deep ? data.b[s].at(n, k) : data.b[s].at(k, n));
        }
      }
      expect(data.writes.at(t, n) == 1, "an element is not written once");
      expect(data.out.at(t, n) == sum, "a wrong element");
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
  multiply<Tile, kDeep>({1, 8, 1, {1}}, 1, random);
  multiply<Tile, kDeep>({300, 264, 2, {200, 40}}, 1, random);
  multiply<Tile, kDeep>({129, 520, 2, {448, 16}}, 2, random);
  multiply<Tile, kFlat>({63, 256, 2, {64, 136}}, 1, random);
  multiply<Tile, kFlat>({257, 304, 3, {136, 72, 8}}, 2, random);
  multiply<Tile, kFlat>({64, 40, 3, {72, 16, 3}}, 3, random);
  for (int i = 0; i < 6; ++i) {
    const auto draw = [&](int most) { return static_cast<int>(random() % most) + 1; };
    const Problem problem = {draw(400), draw(400), draw(3), {draw(300), draw(130), draw(70)}};
    i % 2 ? multiply<Tile, kDeep>(problem, draw(3), random)
          : multiply<Tile, kFlat>(problem, draw(3), random);
  }
}

}  // namespace
}  // namespace floe::two_source

int main() {
  std::mt19937 random(1);
  floe::two_source::walk_is_compact();
  try {
    floe::two_source::run<floe::two_source::Wide>(random);
    floe::two_source::run<floe::two_source::Narrow>(random);
  } catch (const char* what) {
    floe::two_source::fail(what);
  }
  std::printf("no failures\n");
}
