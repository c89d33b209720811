// The kernels of grad_square.cuh, run on the CPU block by block and lane by lane, against float64
// loops; and the arithmetic of their schedule by itself, on every small case and on drawn ones.
#include "cuda/grad_square.cuh"

#include <algorithm>
#include <cstring>
#include <string>

#include "cuda/tests/checks.h"

namespace floe::cuda {
namespace {

struct Case {
  const char* name;
  std::vector<int64_t> lengths;
  int64_t outside;  // rows before the first sample, and after the last
  int R, D, units;
  int pad;  // columns of memory between the rows
};

const Case kCases[] = {
    {"ragged", {1, 0, 15, 16, 17, 33}, 2, 9, 115, 2, 0},
    {"aligned, one step after another", {64, 64, 65, 63, 1}, 0, 16, 128, 1, 0},
    {"one sample in four units", {700}, 0, 16, 136, 4, 8},
    {"a long one among short ones", {3, 5, 400, 2, 0, 1, 7}, 5, 24, 40, 5, 0},
    {"cut at both ends", {330, 300, 310}, 0, 8, 130, 4, 6},
    {"rows of no sample, cut", {10}, 300, 5, 16, 4, 0},
    {"no sample at all", {}, 70, 3, 7, 1, 0},
    {"samples of one row", std::vector<int64_t>(90, 1), 0, 40, 70, 3, 0},
    {"two tiles each way", {20, 50}, 1, 150, 260, 1, 2},
};

// Everything that the three kernels write, and the call that says where.
template <typename Tile>
struct Run {
  using x_t = typename Tile::XType;
  using g_t = typename Tile::GType;

  const Case& c;
  int64_t N, S, tiles_r, tiles_d, num_parts, finish_columns;
  int ld_x, ld_g;
  std::vector<int64_t> offsets;
  Buffer<x_t> x;
  Buffer<g_t> g;
  Buffer<float> scale, parts, norm_parts, total_parts, joint_norms, rank_parts, norms, fisher, grad;
  Buffer<Unit> unit;

  Run(const Case& c, std::mt19937& random)
      : c(c),
        N(2 * c.outside),
        S(static_cast<int64_t>(c.lengths.size())),
        tiles_r((c.R + Tile::kColumnsG - 1) / Tile::kColumnsG),
        tiles_d((c.D + Tile::kColumnsX - 1) / Tile::kColumnsX),
        num_parts(tiles_r * tiles_d * Tile::kWarps),
        finish_columns((c.D + kFinishColumns - 1) / kFinishColumns),
        ld_x(c.D + c.pad),
        ld_g(c.R + c.pad),
        offsets(offsets_of(c.lengths, c.outside)),
        x((N += offsets.back() - c.outside) * ld_x),
        g(N * ld_g),
        scale(S),
        parts(c.units * 4 * c.R * c.D),
        norm_parts(S * num_parts),
        total_parts(c.units * num_parts),
        joint_norms(c.units * c.R * finish_columns),
        rank_parts(c.R * finish_columns),
        norms(S),
        fisher(c.R * c.D),
        grad(c.R * c.D),
        unit(c.units) {
    fill_uniform(x, random), fill_uniform(g, random), fill_uniform(scale, random);
  }

  void go(int scale_each, char reduce) {
    const auto source = [](const auto& buffer, int ld, int columns) {
      const int64_t bytes = static_cast<int64_t>(ld) * sizeof(buffer[0]);
      return Source{reinterpret_cast<const char*>(buffer.get()), bytes, columns, bytes % 16 == 0};
    };
    GradSquare call{};
    call.x = source(x, ld_x, c.D), call.g = source(g, ld_g, c.R);
    call.segments = {offsets.data(), N, S};
    call.scale = scale_each < 0 ? nullptr : scale.get();
    call.scale_each = scale_each > 0;
    call.units = c.units, call.with_square = reduce != 'm';
    call.parts = parts.get(), call.norm_parts = norm_parts.get();
    call.total_parts = total_parts.get(), call.unit = unit.get();
    call.joint_norms = joint_norms.get();
    call.rank_parts = reduce == 'r' ? rank_parts.get() : nullptr;
    call.fisher = fisher.get(), call.norms = norms.get();
    launch({static_cast<unsigned>(tiles_r), static_cast<unsigned>(c.units),
            static_cast<unsigned>(tiles_d)},
           Tile::kThreads, grad_square_shared<Tile>(), [&] { grad_square_kernel<Tile>(call); });
    launch({static_cast<unsigned>(finish_columns), static_cast<unsigned>(c.R)}, 256, 32,
           [&] { grad_square_finish_kernel<float>(call, grad.get()); });
    const auto jobs = static_cast<unsigned>(S + (reduce == 'r' ? c.R : 1));
    launch({(jobs + 7) / 8}, 256, 0,
           [&] { grad_square_norms_kernel(call, num_parts, finish_columns); });
  }

  // Against float64, with a bound on what float32 sums in any order may differ by.
  void check(int scale_each, char reduce) const {
    const int64_t size = static_cast<int64_t>(c.R) * c.D;
    std::vector<double> total(size), total_error(size), square(size), square_error(size);
    std::vector<double> norm(S), norm_error(S);
    const Segments segments{offsets.data(), N, S};
    for (int64_t j = 0; j < S + 2; ++j) {
      const double factor =
          scale_each < 0 ? 1 : scale[scale_each > 0 && segments.scored(j) ? j - 1 : 0];
      const int64_t begin = segments.bound(j), end = segments.bound(j + 1);
      for (int64_t i = 0; i < size; ++i) {
        double sum = 0, magnitude = 0;
        for (int64_t t = begin; t < end; ++t) {
          const double product =
              double{widen(g[t * ld_g + i / c.D])} * widen(x[t * ld_x + i % c.D]);
          sum += product, magnitude += std::abs(product);
        }
        const double error = kRounding * static_cast<double>(end - begin + c.units) * magnitude;
        total[i] += sum, total_error[i] += error + kRounding * static_cast<double>(N) * magnitude;
        if (!segments.scored(j)) continue;
        const double z = sum * factor, dz = error * std::abs(factor) + 2 * kRounding * std::abs(z);
        square[i] += z * z, square_error[i] += 2 * std::abs(z) * dz + dz * dz;
        norm[j - 1] += z * z, norm_error[j - 1] += 2 * std::abs(z) * dz + dz * dz;
      }
    }
    double all = 0, all_error = 0;
    std::vector<double> rank(c.R), rank_error(c.R);
    const double many = kRounding * static_cast<double>(size + S + c.units);
    for (int64_t i = 0; i < size; ++i) {
      expect_close("grad", i, grad[i], total[i], total_error[i]);
      if (reduce == 'e') {
        const double error = square_error[i] + kRounding * (S + c.units + 4.0) * square[i];
        expect_close("fisher", i, fisher[i], square[i], error);
      }
      rank[i / c.D] += square[i], rank_error[i / c.D] += square_error[i] + many * square[i];
    }
    for (int r = 0; r < c.R; ++r) {
      if (reduce == 'r') expect_close("rank", r, fisher[r], rank[r], rank_error[r]);
      all += rank[r], all_error += rank_error[r];
    }
    if (reduce == 'm') expect_close("matrix", 0, fisher[0], all, all_error);
    for (int64_t i = 0; i < S; ++i) {
      expect_close("norms", i, norms[i], norm[i], norm_error[i] + many * norm[i]);
    }
  }
};

// Every third case for the wide tiles, of which a case has many threads.
template <typename Tile>
void run_kernels(const char* tile) {
  std::mt19937 random(7);
  int turn = 0;
  for (const Case& c : kCases) {
    if (Tile::kSums > 16 && (&c - kCases) % 3 != 2 && &c != kCases) continue;
    const int before = failures;
    for (const char reduce : {'e', 'r', 'm'}) {
      if (reduce != 'e' && (&c - kCases) % 3 != 1 && &c != kCases) continue;
      const int scale_each = c.lengths.empty() ? -1 : turn++ % 3 - 1;
      Run<Tile> run(c, random);
      run.go(scale_each, reduce);
      run.check(scale_each, reduce);
      if (reduce != 'e' || (&c - kCases) % 4 != 0) continue;
      // other orders of blocks and threads, the same bits
      Run<Tile> again(c, random);
      std::memcpy(static_cast<void*>(again.x.get()), run.x.get(), run.x.size * sizeof(run.x[0]));
      std::memcpy(static_cast<void*>(again.g.get()), run.g.get(), run.g.size * sizeof(run.g[0]));
      std::memcpy(again.scale.get(), run.scale.get(), run.S * sizeof(float));
      again.go(scale_each, reduce);
      for (const auto& [a, b] : {std::pair{&run.grad, &again.grad},
                                 {&run.fisher, &again.fisher},
                                 {&run.norms, &again.norms}}) {
        FLOE_EXPECT(!std::memcmp(a->get(), b->get(), a->size * sizeof(float)), "bits differ");
      }
    }
    if (failures != before) std::printf("  in \"%s\" of %s\n", c.name, tile);
  }
}

// A row of NaN spoils its own sample's norm and no other.
template <typename Tile>
void spoil_one_row() {
  std::mt19937 random(8);
  const Case c = {"", {1, 3, 30, 2, 40}, 1, 4, 24, 1, 0};
  for (const bool in_x : {false, true}) {
    Run<Tile> run(c, random);
    const float nan = std::numeric_limits<float>::quiet_NaN();
    if (in_x) run.x[7 * run.ld_x + 3] = narrow<typename Tile::XType>(nan);
    if (!in_x) run.g[7 * run.ld_g + 3] = narrow<typename Tile::GType>(nan);
    run.go(-1, 'e');
    for (int64_t i = 0; i < run.S; ++i) {
      FLOE_EXPECT(std::isnan(run.norms[i]) == (i == 2), "sample %d", static_cast<int>(i));
    }
  }
}

void check_cuts(const std::vector<int64_t>& offsets, int64_t rows, int64_t units) {
  const Segments segments{offsets.data(), rows, static_cast<int64_t>(offsets.size()) - 1};
  const int64_t share = cost_before(segments, segments.count()) / units;
  Cut before{};
  for (int64_t u = 0; u < units; ++u) {
    const int64_t target = unit_target(segments, u, units);
    int64_t j = 0;
    while (j + 1 < segments.count() && cost_before(segments, j + 1) <= target) ++j;
    const Cut cut = cut_in(segments, j, target, units);
    FLOE_EXPECT(u || (cut.row == 0 && cut.segment == 0), "the first unit begins at the beginning");
    FLOE_EXPECT(cut.row >= before.row && cut.segment >= before.segment && cut.row <= rows,
                "units are in order");
    const int64_t begin = segments.bound(cut.segment), end = segments.bound(cut.segment + 1);
    FLOE_EXPECT(begin <= cut.row && (cut.row < end || begin == cut.row),
                "the row is its segment's");
    if (cut.row > begin) {
      FLOE_EXPECT((cut.row - begin) % kCutRows == 0 && end - begin >= kCutRows, "a cut is aligned");
      FLOE_EXPECT((end - begin + kSegmentCost) * 4 > share, "a short segment is not cut");
    }
    if (u) {
      const int64_t cost = cut.row - before.row + kSegmentCost * (cut.segment - before.segment);
      const int64_t most = share + share / 4 + 2 * (2 * kCutRows + kSegmentCost) + 2;
      FLOE_EXPECT(cost <= most, "a unit's cost %lld is above %lld", static_cast<long long>(cost),
                  static_cast<long long>(most));
    }
    before = cut;
  }
}

void check_schedule() {
  // every way to cut 4 samples of lengths that matter, with rows outside
  const int64_t lengths[] = {0, 1, 63, 64, 130, 500};
  for (int code = 0; code < 6 * 6 * 6 * 6; ++code) {
    std::vector<int64_t> some;
    for (int i = 0, rest = code; i < 4; ++i, rest /= 6) some.push_back(lengths[rest % 6]);
    const auto offsets = offsets_of(some, code % 3 * 40);
    for (const int64_t units : {1, 2, 3, 7, 64}) {
      check_cuts(offsets, offsets.back() + code % 2 * 90, units);
    }
  }
  std::mt19937_64 random(3);
  for (int draw = 0; draw < 300; ++draw) {
    std::vector<int64_t> some(random() % 300);
    const int most = random() % 24;  // up to 16 million rows a sample, and billions in all
    for (int64_t& length : some) length = random() % (int64_t{1} << (random() % (most + 1)));
    const auto offsets = offsets_of(some, random() % 100);
    check_cuts(offsets, offsets.back() + random() % 100, 1 + random() % 64);
  }
  FLOE_EXPECT(count_units(0, 1, 264) == 1 && count_units(1 << 20, 32, 264) == 9, "count_units");
}

// The search that a warp makes finds what a plain search finds.
void check_search() {
  std::mt19937_64 random(4);
  for (int draw = 0; draw < 40; ++draw) {
    std::vector<int64_t> some(random() % 3000);
    for (int64_t& length : some) length = random() % 3 ? random() % 9 : 0;
    const auto offsets = offsets_of(some);
    const Segments segments{offsets.data(), offsets.back(), static_cast<int64_t>(some.size())};
    const int64_t units = 1 + random() % 20, u = random() % units;
    const int64_t target = unit_target(segments, u, units);
    int64_t j = 0;
    while (j + 1 < segments.count() && cost_before(segments, j + 1) <= target) ++j;
    const Cut expected = cut_in(segments, j, target, units);
    launch({1}, 32, 0, [&] {
      const Cut cut = find_cut(segments, u, units);
      FLOE_EXPECT(cut.row == expected.row && cut.segment == expected.segment, "find_cut");
    });
  }
}

// Rows anywhere, 8 in a row: each 16 bytes from other banks.
template <int kChunks>
void check_banks() {
  std::vector<bool> taken(64 * kChunks);
  for (int r = 0; r < 64; ++r) {
    for (int c = 0; c < kChunks; ++c) {
      const int place = swizzled<kChunks>(r, c);
      FLOE_EXPECT(place >= 0 && place < 64 * kChunks && !taken[place], "%d %d", r, c);
      taken[place] = true;
      unsigned banks = 0;
      for (int i = 0; i < 8; ++i) banks |= 1u << swizzled<kChunks>(r + i, c) % 8;
      FLOE_EXPECT(banks == 0xff, "rows from %d of %d chunks share banks", r, kChunks);
    }
  }
}

// Each element of a tile is one thread's, once.
template <typename Tile>
void check_ownership() {
  std::vector<int> owners(Tile::kColumnsX * Tile::kColumnsG);
  launch({1}, Tile::kThreads, 0, [&] {
    for (int i = 0; i < Tile::kSums; ++i) {
      ++owners[Tile::column_g(i) * Tile::kColumnsX + Tile::column_x(i)];
    }
  });
  for (const int count : owners) FLOE_EXPECT(count == 1, "an element has %d owners", count);
}

template <typename Tile>
void check_tile(const char* name) {
  check_ownership<Tile>();
  run_kernels<Tile>(name);
  spoil_one_row<Tile>();
  std::printf("%s: %d threads, %d bytes shared\n", name, Tile::kThreads,
              grad_square_shared<Tile>());
}

}  // namespace
}  // namespace floe::cuda

int main() {
  using namespace floe::cuda;
  check_banks<2>(), check_banks<4>(), check_banks<8>(), check_banks<16>();
  check_schedule();
  check_search();
  check_tile<MmaTile<BFloat16, 16>>("bfloat16, 16");
  check_tile<MmaTile<Float16, 32>>("float16, 32");
  check_tile<MmaTile<BFloat16, 64>>("bfloat16, 64");
  check_tile<MmaTile<Float16, 128>>("float16, 128");
  check_tile<FmaTile<float, 16>>("float32, 16");
  check_tile<FmaTile<BFloat16, 64>>("bfloat16 and float32, 64");
  std::printf("%d failures\n", failures);
  return failures != 0;
}
