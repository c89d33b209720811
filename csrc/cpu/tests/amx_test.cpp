// tile_amx.h and grad_square_amx.h on emulated tile registers, against float64 on exact
// allocations: for builds with -fsanitize=address,undefined or =thread.
#include "cpu/tests/amx_emulation.h"

// In this order: the intrinsics, then who uses them.
#include <algorithm>
#include <atomic>
#include <cstdlib>

#include "cpu/grad_square_amx.h"
#include "cpu/tests/amx_checks.h"
#include "cpu/tests/amx_pairs.h"

namespace floe::cpu {
namespace {

template <typename F>
void expect_fault(const char* what, const F& f) {
  const int64_t before = registers().multiplied;
  try {
    f();
    expect(false, what);
  } catch (const amx_emulation::Fault&) {
  }
  expect(registers().multiplied == before, what);
  if (registers().in_use()) amx_emulation::release();
}

void test_faults() {
  TileConfig good;
  for (int i = 0; i < 8; ++i) good.row_bytes[i] = 64, good.rows[i] = 16;
  const auto with = [&](auto change) {
    TileConfig config = good;
    change(config);
    _tile_loadconfig(&config);
  };
  expect_fault("palette", [&] { with([](TileConfig& c) { c.palette = 2; }); });
  expect_fault("start row", [&] { with([](TileConfig& c) { c.start_row = 1; }); });
  expect_fault("reserved", [&] { with([](TileConfig& c) { c.reserved[13] = 1; }); });
  expect_fault("tile 8", [&] { with([](TileConfig& c) { c.rows[8] = c.row_bytes[8] = 4; }); });
  expect_fault("rows", [&] { with([](TileConfig& c) { c.rows[7] = 17; }); });
  expect_fault("bytes", [&] { with([](TileConfig& c) { c.row_bytes[0] = 68; }); });
  expect_fault("no bytes", [&] { with([](TileConfig& c) { c.row_bytes[3] = 0; }); });
  expect_fault("not configured", [] { _tile_zero(0); });
  expect_fault("released twice", [] { _tile_release(); });
  const auto product = [&](auto change, bool zeroed) {
    with(change);
    if (zeroed) _tile_zero(0);
    _tile_zero(3);
    _tile_zero(4);
    _tile_dpbf16ps(0, 3, 4);
  };
  expect_fault("not zeroed", [&] { product([](TileConfig&) {}, false); });
  expect_fault("one tile twice", [&] {
    with([](TileConfig&) {});
    _tile_zero(0);
    _tile_dpbf16ps(0, 0, 0);
  });
  expect_fault("rows differ", [&] { product([](TileConfig& c) { c.rows[0] = 8; }, true); });
  expect_fault("columns differ",
               [&] { product([](TileConfig& c) { c.row_bytes[4] = 32; }, true); });
  expect_fault("units differ", [&] { product([](TileConfig& c) { c.row_bytes[3] = 32; }, true); });
  expect_fault("half a unit",
               [&] { product([](TileConfig& c) { c.row_bytes[0] = c.row_bytes[4] = 34; }, true); });
  product([](TileConfig& c) { c.row_bytes[3] = 20, c.rows[4] = 5, c.rows[0] = c.rows[3] = 3; },
          true);
  _tile_release();
}

// The first sum of a tile of units of a times a tile of units of b.
float first_sum(const std::vector<float>& a, float b, float sum) {
  const TileScope scope;
  BFloat16 left[16][32] = {}, right[16][32] = {};
  float sums[16][16] = {};
  for (std::size_t k = 0; k < a.size(); ++k) {
    left[0][k] = narrow<BFloat16>(a[k]);
    right[k / 2][k % 2] = narrow<BFloat16>(b);
  }
  sums[0][0] = sum;
  _tile_loadd(0, sums, 64);
  _tile_loadd(3, left, 64);
  _tile_loadd(4, right, 64);
  _tile_dpbf16ps(0, 3, 4);
  _tile_stored(0, sums, 64);
  return sums[0][0];
}

void test_arithmetic() {
  const auto is = [](float got, float expected, const char* what) {
    expect(std::bit_cast<uint32_t>(got) == std::bit_cast<uint32_t>(expected), what);
  };
  is(first_sum({2, 3}, 5, 7), 32, "a pair");
  // 1 is lost beside 2^24, and would be lost once more if even and odd elements shared a sum
  is(first_sum({0x1p24F, 1, -0x1p24F, 1}, 1, 0), 2, "even and odd elements");
  is(first_sum({0x1p24F, 1}, 1, 0), 0x1p24F, "rounds to even");
  is(first_sum({0x1p24F, 3}, 1, 0), 0x1.000004p24F, "rounds to even");
  is(first_sum({0x1p-127F}, 0x1p100F, 0), 0, "a denormal operand is zero");
  is(first_sum({0x1p-100F}, 0x1p-30F, 0), 0, "a denormal product is zero");
  is(first_sum({-0x1p-100F}, 0x1p-30F, -0.0F), 0, "the even sum is -0, the odd one 0");
  is(first_sum({0x1p-100F}, 0x1p-26F, 0), 0x1p-126F, "the least normal product stays");
  is(first_sum({1}, 0x1p-126F, -0x1.8p-126F), -0.0F, "a denormal sum is zero, and keeps its sign");
  is(first_sum({}, 1, 0x1p-130F), 0, "a denormal in the sums is zero");
}

// M rows of Q units: neighbours, rows a_m apart, or columns of `tall` units as packed tiles have.
void check_product(int64_t M, int64_t Q, int NV, bool by_rows, bool add, std::mt19937& random) {
  const int64_t width = NV * 16, ld = width + 3, a_m = by_rows ? 2 * Q + 5 : 2;
  const int64_t a_q = by_rows ? 2 : 2 * kTileRows, ends = by_rows ? (M - 1) * a_m + 2 * Q : Q * a_q;
  auto a = draw(ends, random);
  for (int64_t i = 0; i < ends && !by_rows; ++i) {
    if (i % a_q / 2 >= M) a[i] = {};
  }
  const auto columns = draw(2 * Q * width, random);  // (Q, width, 2)
  std::vector<uint32_t> b(Q * width);
  std::memcpy(b.data(), columns.data(), b.size() * 4);
  std::vector<float> sums((M - 1) * ld + width, 1000);
  const int64_t before = registers().multiplied;
  {
    const TileScope scope;
    any_tile<AmxPairs>(M, Q, a.data(), a_m, a_q, b.data(), width, sums.data(), ld, add);
  }
  const bool tiles = M >= kFewestRows && M * Q >= kFewestUnits;
  const int64_t blocks = (Q + 15) / 16;
  expect(registers().multiplied - before == (tiles ? blocks * NV : 0), "which path");
  const auto n = static_cast<double>(tiles ? 16 + 1 + blocks + 1 : 2 * Q + 1);
  for (int64_t i = 0; i < static_cast<int64_t>(sums.size()); ++i) {
    const int64_t m = i / ld, column = i % ld;
    double expected = column >= width || add ? 1000 : 0, magnitude = expected;
    for (int64_t k = 0; k < 2 * Q && column < width; ++k) {
      const double term = double{widen(a[m * a_m + k / 2 * a_q + k % 2])} *
                          double{widen(columns[(k / 2 * width + column) * 2 + k % 2])};
      expected += term, magnitude += std::abs(term);
    }
    const double bound = column < width ? n * kRounding * magnitude : 0;
    expect_within("product", double{sums[i]}, expected, bound);
  }
}

void test_products(std::mt19937& random) {
  for (const bool by_rows : {true, false}) {
    for (const int64_t M : {1, 3, 4, 15, 16}) {
      for (const int64_t Q : {1, 7, 8, 15, 16, 17, 33}) {
        check_product(M, Q, 3, by_rows, M % 2, random);
      }
    }
  }
  const auto up_to = [&](int most) { return std::uniform_int_distribution<int>(1, most)(random); };
  for (int i = 0; i < 150; ++i) {
    check_product(up_to(16), up_to(70), up_to(3), up_to(2) == 1, up_to(2) == 1, random);
  }
}

// Everything that segment_grad_square gives, and how far float32 may be off.
struct Bounded {
  double value = 0, bound = 0;
  void add(double more, double error) { value += more, bound += error; }
};

void check_squares(const std::vector<int64_t>& lengths, int64_t R, int64_t D,
                   std::mt19937& random) {
  const GradSquareKernels kernels = GradSquareAmx<AmxPairs>::table();
  SegmentGradSquare s{};
  std::vector<Piece> pieces;
  std::vector<float> scale;
  for (std::size_t i = 0; i < lengths.size(); ++i) {
    const bool outside = i == 0 || i + 1 == lengths.size();
    pieces.push_back({s.N, lengths[i], outside ? -1 : s.S++});
    s.N += lengths[i];
    if (!outside) scale.push_back(0.5F + static_cast<float>(i) / 8);
  }
  s.R = R, s.D = D, s.ld_g = R, s.ld_x = D;
  const auto g = draw(s.N * R, random), x = draw(s.N * D, random);
  s.g = g.data(), s.x = x.data(), s.pieces = pieces.data(), s.num_pieces = std::ssize(pieces);
  s.scale = scale.data(), s.scale_each = true;
  const int64_t panels = (D + kernels.columns - 1) / kernels.columns;
  std::vector<BFloat16> grad(R * D), tiles(kernels.tiles_size(s));
  std::vector<float> fisher(R * D);
  std::vector<double> rows(panels * R), norms(panels * s.S);
  s.grad = grad.data(), s.fisher = fisher.data(), s.fisher_rows = rows.data();
  s.norms = norms.data();
  on_threads(s.num_pieces,
             [&](int64_t begin, int64_t end) { kernels.tile_rows(s, begin, end, tiles.data()); });
  s.tiles = tiles.data();
  std::atomic<int64_t> multiplied = 0;
  on_threads(panels, [&](int64_t begin, int64_t end) {
    void* scratch = std::aligned_alloc(64, kernels.scratch_size(s) / 64 * 64 + 64);
    kernels.panels(s, begin, end, scratch);
    std::free(scratch);
    multiplied += registers().multiplied;
    if (registers().in_use()) throw amx_emulation::Fault("a thread keeps its tiles");
  });
  const int64_t longest = *std::max_element(lengths.begin(), lengths.end());
  if (R >= 8 && longest >= 32) expect(multiplied > 0, "long samples go without tiles");

  std::vector<Bounded> norm(s.S), row(R);
  for (int64_t i = 0; i < R * D; ++i) {
    const int64_t r = i / D, d = i % D, M = least(kTileRows, R - r / kTileRows * kTileRows);
    Bounded sum, square;
    double magnitude_of_sums = 0;
    for (const Piece& piece : pieces) {
      double exact = 0, magnitude = 0;
      for (int64_t t = piece.begin; t < piece.begin + piece.length; ++t) {
        const double term = double{widen(g[t * R + r])} * double{widen(x[t * D + d])};
        exact += term, magnitude += std::abs(term);
      }
      // a tile's block: 16 roundings and two; chunks of a piece add, the last may go without tiles
      const bool by_tiles = M >= kFewestRows && M * (piece.length / 2) >= kFewestUnits;
      const auto n = static_cast<double>(by_tiles ? 18 + piece.length / 16 + 32 : piece.length + 3);
      const double error = n * kRounding * magnitude;
      sum.add(exact, error), magnitude_of_sums += std::abs(exact) + error;
      if (piece.sample < 0) continue;
      const double by = double{scale[piece.sample]}, scaled = by * exact;
      const double of_square =
          by * error * (2 * std::abs(scaled) + by * error) +
          4 * kRounding * (std::abs(scaled) + by * error) * (std::abs(scaled) + by * error);
      square.add(scaled * scaled, of_square);
      norm[piece.sample].add(scaled * scaled, of_square);
    }
    const auto additions = static_cast<double>(pieces.size());
    sum.bound += additions * kRounding * magnitude_of_sums;
    sum.bound += 0x1p-8 * (std::abs(sum.value) + sum.bound);  // stored as bfloat16
    expect_within("grad", double{widen(grad[i])}, sum.value, sum.bound);
    square.bound += additions * kRounding * (square.value + square.bound);
    expect_within("fisher", double{fisher[i]}, square.value, square.bound);
    row[r].add(square.value, square.bound);
  }
  for (int64_t r = 0; r < R; ++r) {
    double got = 0;
    for (int64_t p = 0; p < panels; ++p) got += rows[p * R + r];
    expect_within("row of fisher", got, row[r].value, row[r].bound);
  }
  for (int64_t i = 0; i < s.S; ++i) {
    double got = 0;
    for (int64_t p = 0; p < panels; ++p) got += norms[p * s.S + i];
    // a chain of up to 16 rows in every lane, the vectors, the lanes; then the rows' tiles
    const double additions = 16 + 3 + 16 + 1;
    norm[i].bound += additions * kRounding * (norm[i].value + norm[i].bound);
    expect_within("norm", got, norm[i].value, norm[i].bound);
  }
}

void test_squares(std::mt19937& random) {
  for (const int64_t R : {1, 5, 16, 17, 40}) {
    for (const int64_t D : {1, 47, 101}) check_squares({3, 40, 0, 7, 64, 33, 1, 5}, R, D, random);
  }
  check_squares({0, 300, 5, 257, 1}, 18, 20, random);  // longer than a chunk
  check_squares({20, 70, 31, 2}, 300, 330, random);    // panels in groups
  check_squares({0, 0}, 5, 9, random);
  const auto up_to = [&](int most) { return std::uniform_int_distribution<int>(0, most)(random); };
  for (int i = 0; i < 12; ++i) {
    std::vector<int64_t> lengths(2 + up_to(5));
    for (int64_t& length : lengths) length = up_to(90);
    check_squares(lengths, 1 + up_to(50), 1 + up_to(120), random);
  }
}

}  // namespace
}  // namespace floe::cpu

int main() {
  using namespace floe::cpu;
  std::mt19937 random(1);
  test_faults();
  test_arithmetic();
  test_products(random);
  test_squares(random);
  std::printf("amx, emulated: %d failures\n", failures);
  return failures != 0;
}
