// moe_lora_amx.h on emulated tile registers, against float64 on exact allocations: for builds with
// -fsanitize=address,undefined or =thread.
#include "cpu/tests/amx_emulation.h"

// In this order: the intrinsics, then who uses them.
#include <memory>

#include "cpu/moe_lora_amx.h"
#include "cpu/tests/amx_checks.h"
#include "cpu/tests/amx_pairs.h"

namespace floe::cpu {
namespace {

using Tested = MoELoRAAmx<AmxPairs>;
using Packing = Tested::Steps;

struct Stored {  // (rows, cols); its memory ends where its last element does
  int64_t rows, cols;
  std::vector<BFloat16> data;

  Stored(int64_t rows, int64_t cols, std::mt19937& random)
      : rows(rows), cols(cols), data(draw(rows * cols, random)) {}
  double at(int64_t r, int64_t c) const { return widen(data[r * cols + c]); }
  Matrix matrix() const { return {data.data(), Dtype::kBFloat16, rows, cols, cols}; }
};

struct Bits {  // one for every element, its row's bytes as far apart as keep_stride says
  int64_t ld;
  std::vector<uint8_t> data;

  Bits(int64_t rows, int64_t cols, std::mt19937& random)
      : ld((cols + 63) / 64 * 8 + 8), data(rows * ld) {
    for (uint8_t& byte : data) byte = static_cast<uint8_t>(random() >> 8);
  }
  bool at(int64_t r, int64_t c) const { return data[r * ld + c / 8] >> c % 8 & 1; }
};

std::vector<uint32_t> packed(const Matrix& w, bool rows) {
  const int64_t N = rows ? w.cols : w.rows, K = rows ? w.rows : w.cols;
  const int64_t panels = ceil_div(N, Tested::NR);
  std::vector<uint32_t> out(panels * Tested::NR * ceil_div(K, 2));
  for (int64_t p = 0; p < panels; ++p)
    (rows ? Packing::pack_rows : Packing::pack_columns)(w, p, out.data());
  return out;
}

// A sum of products as float64 has it, and of their magnitudes.
struct Sum {
  double value = 0, magnitude = 0;
  void add(double term) { value += term, magnitude += std::abs(term); }
};

// Every path rounds a term at most once a product, and eight times in what follows.
void expect_sum(const char* what, double got, const Sum& sum, int64_t terms) {
  expect_within(what, got, sum.value, static_cast<double>(terms + 8) * kRounding * sum.magnitude);
}

void expect_stored_sum(const char* what, BFloat16 got, const Sum& sum, int64_t terms) {
  const double bound = static_cast<double>(terms + 8) * kRounding * sum.magnitude;
  expect_within(what, double{widen(got)}, sum.value,
                bound + 0x1p-8 * (std::abs(sum.value) + bound));
}

void check_shrink(int64_t M, int64_t K, int64_t N, std::mt19937& random) {
  const Stored x(M, K, random), w(N, K, random);
  const Bits keep(M, K, random);
  const auto panels = packed(w.matrix(), false);
  const int64_t ld = (N + 15) / 16 * 16;
  for (const bool drop : {false, true}) {
    std::vector<float> sums(M * ld);
    Tested::shrink({x.data.data(), K, M, K, N, drop ? keep.data.data() : nullptr, keep.ld,
                    panels.data(), sums.data(), ld});
    for (int64_t i = 0; i < M * N; ++i) {
      const int64_t m = i / N, n = i % N;
      Sum sum;
      for (int64_t k = 0; k < K; ++k) {
        if (!drop || keep.at(m, k)) sum.add(x.at(m, k) * w.at(n, k));
      }
      expect_sum("shrink", double{sums[m * ld + n]}, sum, K);
    }
  }
}

void check_expand(int64_t M, int64_t K, int64_t E, int64_t O, std::mt19937& random) {
  const Stored w(K, O, random), second(E, O, random), base(M, O, random);
  const Stored a(M, (K + 7) / 8 * 8, random), b(M, (E + 7) / 8 * 8, random);
  const Bits keep(M, O, random);
  const auto w_panels = packed(w.matrix(), true), second_panels = packed(second.matrix(), true);
  Stored left = a, right = b;  // what follows a row's elements up to its unit is zero
  for (int64_t m = 0; m < M; ++m) {
    for (int64_t k = K; k < left.cols; ++k) left.data[m * left.cols + k] = {};
    for (int64_t e = E; e < right.cols; ++e) right.data[m * right.cols + e] = {};
  }
  std::vector<BFloat16> out(M * O);
  Tested::expand({M,
                  O,
                  {left.data.data(), left.cols, K, w_panels.data()},
                  {right.data.data(), right.cols, E, second_panels.data()},
                  keep.data.data(),
                  keep.ld,
                  1.5,
                  base.data.data(),
                  out.data(),
                  O,
                  O});
  for (int64_t i = 0; i < M * O; ++i) {
    const int64_t m = i / O, o = i % O;
    Sum sum;
    for (int64_t k = 0; k < K && keep.at(m, o); ++k) sum.add(1.5 * left.at(m, k) * w.at(k, o));
    for (int64_t e = 0; e < E; ++e) sum.add(right.at(m, e) * second.at(e, o));
    sum.add(base.at(m, o));
    expect_stored_sum("expand", out[i], sum, K + E);
  }
}

void check_weight_grad(int64_t T, int64_t N, int64_t cols, std::mt19937& random) {
  const Stored x(T, cols, random);
  const Bits keep(T, cols, random);
  const auto mask = std::make_unique<bool[]>(T);
  for (int64_t t = 0; t < T; ++t) mask[t] = t % 5 != 0;
  const int64_t Q = ceil_div(T, 2), tiles = ceil_div(N, Tested::MR),
                panels = ceil_div(cols, Tested::NR);
  const auto place = [&](int64_t n, int64_t t) {
    return ((n / Tested::MR * Q + t / 2) * Tested::MR + n % Tested::MR) * 2 + t % 2;
  };
  auto tiled = draw(tiles * Tested::MR * Q * 2, random);
  for (int64_t n = 0; n < N && T % 2; ++n) tiled[place(n, T)] = {};
  std::vector<BFloat16> out(N * cols);
  const WeightGrad grad{N, tiled.data(), true, 1.5, out.data(), Dtype::kBFloat16, cols};
  on_threads(panels, [&](int64_t begin, int64_t end) {
    std::vector<char> scratch((end - begin) * (tiles * Tested::MR + kGradUnits) * Tested::NR * 4);
    Tested::weight_grad(
        {x.data.data(), cols, cols, nullptr, T, mask.get(), keep.data.data(), keep.ld}, begin, end,
        &grad, 1, scratch.data());
  });
  for (int64_t i = 0; i < N * cols; ++i) {
    Sum sum;
    for (int64_t t = 0; t < T; ++t) {
      if (!mask[t] || !keep.at(t, i % cols)) continue;
      sum.add(1.5 * double{widen(tiled[place(i / cols, t)])} * x.at(t, i % cols));
    }
    expect_stored_sum("weight_grad", out[i], sum, T);
  }
}

// Every other row of x, or all of them.
void check_gather_dots(int64_t M, int64_t K, int64_t N, bool all, std::mt19937& random) {
  const Stored x(2 * M, K, random), w(N, K, random);
  const Bits keep(2 * M, K, random);
  std::vector<int64_t> rows(M);
  for (int64_t m = 0; m < M; ++m) rows[m] = 2 * m;
  for (const bool drop : {false, true}) {
    std::vector<float> sums(M * N);
    std::vector<BFloat16> scratch(drop ? kDotScratchRows * (K + 1) : 0);
    Tested::gather_dots({x.data.data(), K, K, all ? nullptr : rows.data(), all ? M : 0, M,
                         drop ? keep.data.data() : nullptr, keep.ld, w.data.data(),
                         Dtype::kBFloat16, K, N, sums.data(), N, scratch.data()});
    for (int64_t i = 0; i < M * N; ++i) {
      const int64_t t = all ? M + i / N : rows[i / N];
      Sum sum;
      for (int64_t k = 0; k < K; ++k) {
        if (!drop || keep.at(t, k)) sum.add(x.at(t, k) * w.at(i % N, k));
      }
      expect_sum("gather_dots", double{sums[i]}, sum, K);
    }
  }
}

void check_gather_expand(int64_t T, int64_t rank, int64_t O, std::mt19937& random) {
  const Stored up(rank, O, random), base(T, O, random);
  const int64_t ld = (rank + 7) / 8 * 8, S = (T + 1) / 2;
  Stored slots(S, ld, random);
  std::vector<int64_t> tokens;
  for (int64_t s = 0; s < S; ++s) {
    tokens.push_back(2 * s);
    for (int64_t k = rank; k < ld; ++k) slots.data[s * ld + k] = {};
  }
  const Segment segment{0, S, up.matrix()};
  std::vector<BFloat16> out(T * O);
  GatherExpand g{};
  g.end = T, g.O = O, g.segments = &segment, g.num_segments = 1, g.tokens = tokens.data();
  g.slots = slots.data.data(), g.ld_slots = ld, g.scale = 1;
  g.base = base.data.data(), g.out = out.data(), g.ld_base = g.ld_out = O;
  on_threads(ceil_div(O, Tested::NR), [&](int64_t begin, int64_t end) {
    if (begin == end) return;
    std::vector<char> scratch((end - begin) * (T + ceil_div(rank, 2)) * Tested::NR * 4);
    Tested::gather_expand(g, begin, end, scratch.data());
  });
  for (int64_t i = 0; i < T * O; ++i) {
    const int64_t t = i / O;
    Sum sum;
    for (int64_t k = 0; k < rank && t % 2 == 0; ++k) sum.add(slots.at(t / 2, k) * up.at(k, i % O));
    sum.add(base.at(t, i % O));
    expect_stored_sum("gather_expand", out[i], sum, rank);
  }
}

}  // namespace
}  // namespace floe::cpu

int main() {
  using namespace floe::cpu;
  std::mt19937 random(1);
  for (const int64_t M : {1, 13, 16, 37}) {
    for (const int64_t K : {1, 16, 67}) {
      check_shrink(M, K, 50, random);
      check_expand(M, K, 3, 101, random);
      check_weight_grad(2 * K + 1, M, 101, random);
      check_gather_dots(M, K, 50, K == 16, random);
      check_gather_expand(2 * M, K, 101, random);
    }
  }
  check_shrink(17, 1100, 5, random);  // longer than a block
  check_gather_dots(70, 300, 97, false, random);
  check_gather_dots(5, 0, 3, true, random);
  check_gather_expand(40, 33, 450, random);  // several panels at a time
  check_expand(20, 600, 40, 20, random);
  check_weight_grad(530, 17, 20, random);
  expect(amx_emulation::registers().multiplied > 0, "nothing was multiplied with tiles");
  std::printf("amx, emulated: %d failures\n", failures);
  return failures != 0;
}
