// Every step of moe_lora_kernels.h against plain loops, on ragged sizes and exact allocations, with
// panels spread over threads: for builds with -fsanitize=address,undefined or =thread.
#include <cstdio>
#include <memory>
#include <random>
#include <vector>

#include "cpu/moe_lora_kernels.h"
#include "cpu/tests/checks.h"

namespace floe::cpu {
namespace {

// A matrix whose memory ends where its last element does, and the values it stores, wide.
template <typename scalar_t>
struct Stored {
  int64_t rows, cols;
  std::vector<scalar_t> data;
  std::vector<double> values;

  Stored(int64_t rows, int64_t cols, std::mt19937& random) : rows(rows), cols(cols) {
    std::uniform_real_distribution<float> uniform(-1, 1);
    for (int64_t i = 0; i < rows * cols; ++i) {
      data.push_back(narrow<scalar_t>(uniform(random)));
      values.push_back(widen(data.back()));
    }
    data.shrink_to_fit();
  }
  double at(int64_t r, int64_t c) const { return values[r * cols + c]; }
  Matrix matrix(Dtype dtype) const { return {data.data(), dtype, rows, cols, cols}; }
};

template <typename scalar_t, typename elem>
struct Suite {
  using wide = wide_t<scalar_t>;

  const Kernels& kernels;
  Dtype dtype;
  std::mt19937& random;
  double tolerance = std::is_same_v<scalar_t, double> ? 1e-12 : sizeof(elem) == 2 ? 2e-2 : 1e-5;
  double stored_tolerance = sizeof(scalar_t) == 2 ? 2e-2 : tolerance;

  std::vector<char> packed(const Matrix& w, bool rows) const {
    const int64_t N = rows ? w.cols : w.rows, K = rows ? w.rows : w.cols;
    const int64_t panels = (N + kernels.nr - 1) / kernels.nr;
    std::vector<char> out(panels * kernels.nr * ((K + kernels.pack - 1) / kernels.pack) * 8);
    on_threads(panels, [&](int64_t begin, int64_t end) {
      for (int64_t p = begin; p < end; ++p) {
        (rows ? kernels.pack_rows : kernels.pack_columns)(w, p, out.data());
      }
    });
    return out;
  }

  std::vector<uint8_t> bits(int64_t rows, int64_t cols, int64_t ld) const {
    std::vector<uint8_t> keep(rows * ld);
    kernels.keep_bits({0x123456789abcdef, 0x60000000, 1.6, true}, 0, rows, cols, keep.data(), ld);
    for (int64_t i = 0; i < rows * cols; ++i) {
      const bool expected = philox(0x123456789abcdef, i) >= 0x60000000;
      const bool got = keep[i / cols * ld + i % cols / 8] >> i % cols % 8 & 1;
      expect_close("keep_bits", got, expected, 0);
    }
    return keep;
  }

  static bool kept(const std::vector<uint8_t>& keep, int64_t ld, int64_t r, int64_t c) {
    return keep[r * ld + c / 8] >> c % 8 & 1;
  }

  void shrink(int64_t M, int64_t K, int64_t N) const {
    const Stored<scalar_t> x(M, K, random), w(N, K, random);
    const int64_t ld = (N + 63) / 64 * 64, ld_keep = (K + 63) / 64 * 8 + 8;
    const auto panels = packed(w.matrix(dtype), false);
    const auto keep = bits(M, K, ld_keep);
    for (const bool drop : {false, true}) {
      std::vector<wide> sums(M * ld);
      kernels.shrink({x.data.data(), K, M, K, N, drop ? keep.data() : nullptr, ld_keep,
                      panels.data(), sums.data(), ld});
      for (int64_t i = 0; i < M * N; ++i) {
        double expected = 0;
        for (int64_t k = 0; k < K; ++k) {
          if (!drop || kept(keep, ld_keep, i / N, k)) expected += x.at(i / N, k) * w.at(i % N, k);
        }
        expect_close("shrink", sums[i / N * ld + i % N], expected, tolerance);
      }
    }
  }

  template <typename T>
  std::vector<T> elements_of(int64_t rows, int64_t cols, int64_t ld) const {
    std::uniform_real_distribution<float> uniform(-1, 1);
    std::vector<T> out(rows * ld);
    for (int64_t i = 0; i < rows * ld; ++i) {
      out[i] = i % ld < cols ? narrow<T>(uniform(random)) : T{};
    }
    return out;
  }

  std::vector<elem> elements(int64_t rows, int64_t cols, int64_t ld) const {
    return elements_of<elem>(rows, cols, ld);
  }

  void expand(int64_t M, int64_t K, int64_t E, int64_t O) const {
    const Stored<scalar_t> w(K, O, random), second(E, O, random), base(M, O, random);
    const int64_t ld = (K + 7) / 8 * 8, ld_e = (E + 7) / 8 * 8, ld_keep = (O + 63) / 64 * 8 + 8;
    const auto a = elements(M, K, ld), b = elements(M, E, ld_e);
    const auto keep = bits(M, O, ld_keep);
    const auto w_panels = packed(w.matrix(dtype), true);
    const auto second_panels = packed(second.matrix(dtype), true);
    for (const bool drop : {false, true}) {
      std::vector<scalar_t> out(M * O);
      kernels.expand({M,
                      O,
                      {a.data(), ld, K, w_panels.data()},
                      {b.data(), ld_e, E, second_panels.data()},
                      drop ? keep.data() : nullptr,
                      ld_keep,
                      drop ? 1.5 : 1,
                      drop ? base.data.data() : nullptr,
                      out.data(),
                      O,
                      O});
      for (int64_t i = 0; i < M * O; ++i) {
        const int64_t m = i / O, o = i % O;
        double expected = 0;
        for (int64_t k = 0; k < K; ++k) expected += widen(a[m * ld + k]) * w.at(k, o);
        if (drop) expected = kept(keep, ld_keep, m, o) ? 1.5 * expected : 0;
        for (int64_t e = 0; e < E; ++e) expected += widen(b[m * ld_e + e]) * second.at(e, o);
        expect_close("expand", widen(out[i]), expected + (drop ? base.values[i] : 0),
                     stored_tolerance);
      }
    }
  }

  // Tokens keep two of three experts, of r, r + 1 and r columns, or two of three heads.
  void token_rows(int64_t M, int64_t r, bool shared_A) const {
    const std::vector<int64_t> first{0, r, 2 * r + !shared_A, 3 * r + !shared_A};
    const int64_t R = first[3], C = shared_A ? r : R, ld = (R + 63) / 64 * 64;
    const Stored<scalar_t> z(M, C, random);
    const auto u = elements_of<wide>(M, R, ld), scaling = elements_of<wide>(1, R, ld),
               gates = elements_of<wide>(M, 2, 2);
    std::vector<int64_t> experts;
    for (int64_t m = 0; m < M; ++m) experts.push_back((m + 1) % 3), experts.push_back(m % 3);
    const auto mask = std::make_unique<bool[]>(M);
    for (int64_t m = 0; m < M; ++m) mask[m] = m % 5 != 3;
    std::vector<elem> h(M * ld), dz(M * ld);
    std::vector<wide> grad_gates(2 * M);
    std::vector<char> scratch(token_scratch(R), 0x7f);
    kernels.token_rows({M, R, C, 2, first.data(), shared_A, mask.get(), scaling.data(),
                        z.data.data(), experts.data(), gates.data(), u.data(), ld, h.data(),
                        dz.data(), ld, grad_gates.data(), scratch.data()});
    const int64_t tiles = (R + kernels.mr - 1) / kernels.mr,
                  Q = (M + kernels.pack - 1) / kernels.pack;
    std::vector<elem> tiled(tiles * kernels.mr * Q * kernels.pack);
    kernels.tile_rows({h.data(), ld, M, R, tiled.data(), Q, 0});
    for (int64_t m = 0; m < M; ++m) {
      std::vector<double> expected_h(R), expected_dz(C);
      for (int64_t k = 0; k < 2 && mask[m]; ++k) {
        const int64_t e = experts[2 * m + k];
        double gradient = 0;
        for (int64_t c = first[e]; c < first[e + 1]; ++c) {
          const int64_t own = shared_A ? c - first[e] : c;
          const double factor = scaling[c], gate = gates[2 * m + k], du = u[m * ld + c];
          expected_h[c] = factor * gate * z.at(m, own);
          expected_dz[own] += factor * gate * du;
          gradient += factor * z.at(m, own) * du;
        }
        expect_close("gate gradients", grad_gates[2 * m + k], gradient, tolerance);
      }
      for (int64_t c = 0; c < R; ++c) {
        expect_close("h", widen(h[m * ld + c]), expected_h[c], stored_tolerance);
        const int64_t place =
            ((c / kernels.mr * Q + m / kernels.pack) * kernels.mr + c % kernels.mr) * kernels.pack +
            m % kernels.pack;
        expect_close("tile_rows", widen(tiled[place]), widen(h[m * ld + c]), 0);
      }
      for (int64_t c = 0; c < C; ++c) {
        expect_close("dz", widen(dz[m * ld + c]), expected_dz[c], stored_tolerance);
      }
    }
  }

  void weight_grad(int64_t T, int64_t N, int64_t cols, bool gather) const {
    const Stored<scalar_t> x(T, cols, random);
    std::vector<int64_t> rows(gather ? T / 2 : 0);
    for (int64_t i = 0; i < T / 2 && gather; ++i) rows[i] = 2 * i;
    const auto mask = std::make_unique<bool[]>(T);
    for (int64_t t = 0; t < T; ++t) mask[t] = t % 5 != 0;
    const int64_t count = gather ? T / 2 : T, Q = (count + kernels.pack - 1) / kernels.pack;
    const int64_t ld_keep = (cols + 63) / 64 * 8 + 8;
    const auto keep = bits(T, cols, ld_keep);
    const int64_t tiles = (N + kernels.mr - 1) / kernels.mr;
    auto tiled =
        elements(1, tiles * kernels.mr * Q * kernels.pack, tiles * kernels.mr * Q * kernels.pack);
    const auto coefficient = [&](int64_t n, int64_t k) -> elem& {
      return tiled[((n / kernels.mr * Q + k / kernels.pack) * kernels.mr + n % kernels.mr) *
                       kernels.pack +
                   k % kernels.pack];
    };
    std::vector<scalar_t> out(N * cols);
    const WeightGrad grad{N, tiled.data(), true, 1.5, out.data(), dtype, cols};
    on_threads((cols + kernels.nr - 1) / kernels.nr, [&](int64_t begin, int64_t end) {
      const int64_t rows_of_sums = tiles * kernels.mr;
      std::vector<char> scratch(grad_scratch(kernels, rows_of_sums, end - begin, cols));
      kernels.weight_grad({x.data.data(), cols, cols, gather ? rows.data() : nullptr, count,
                           mask.get(), keep.data(), ld_keep},
                          begin, end, &grad, 1, scratch.data());
    });
    for (int64_t i = 0; i < N * cols; ++i) {
      double expected = 0;
      for (int64_t k = 0; k < count; ++k) {
        const int64_t t = gather ? rows[k] : k;
        if (mask[t] && kept(keep, ld_keep, t, i % cols)) {
          expected += 1.5 * widen(coefficient(i / cols, k)) * x.at(t, i % cols);
        }
      }
      expect_close("weight_grad", widen(out[i]), expected, stored_tolerance);
    }
  }

  void gathered(int64_t T, int64_t K, int64_t N, int64_t O) const {
    const Stored<scalar_t> x(T, K, random), w(N, K, random), up(N, O, random), base(T, O, random);
    std::vector<int64_t> rows;
    for (int64_t t = 0; t < T; t += 2) rows.push_back(t);
    const auto M = static_cast<int64_t>(rows.size()), ld = (N + 7) / 8 * 8;
    std::vector<wide> sums(M * N);
    kernels.gather_dots({x.data.data(), K, K, rows.data(), 0, M, nullptr, 0, w.data.data(), dtype,
                         K, N, sums.data(), N, nullptr});
    for (int64_t i = 0; i < M * N; ++i) {
      double expected = 0;
      for (int64_t k = 0; k < K; ++k) expected += x.at(rows[i / N], k) * w.at(i % N, k);
      expect_close("gather_dots", sums[i], expected, tolerance);
    }
    const auto slots = elements(M, N, ld);
    const Segment segment{0, M, up.matrix(dtype)};
    std::vector<scalar_t> out(T * O);
    on_threads((O + kernels.nr - 1) / kernels.nr, [&](int64_t begin, int64_t end) {
      const int64_t most = expand_panels(kernels, T, ld);
      std::vector<char> scratch(expand_scratch(kernels, T, ld, most));
      GatherExpand expand{};
      expand.end = T, expand.O = O, expand.segments = &segment, expand.num_segments = 1;
      expand.tokens = rows.data(), expand.slots = slots.data(), expand.ld_slots = ld;
      expand.scale = 1, expand.base = base.data.data(), expand.out = out.data();
      expand.ld_base = expand.ld_out = O;
      for (int64_t p = begin; p < end; p += most) {
        kernels.gather_expand(expand, p, std::min(end, p + most), scratch.data());
      }
    });
    for (int64_t i = 0; i < T * O; ++i) {
      double expected = base.values[i];
      for (int64_t n = 0; n < N && i / O % 2 == 0; ++n) {
        expected += widen(slots[i / O / 2 * ld + n]) * up.at(n, i % O);
      }
      expect_close("gather_expand", widen(out[i]), expected, stored_tolerance);
    }
  }

  void run() const {
    for (const int64_t M : {1, 7, 13}) {
      for (const int64_t N : {1, 31, 50}) {
        shrink(M, 67, N);
        expand(M, N, 3, 101);
        weight_grad(4 * M, N, 101, N == 31);
        gathered(M, 67, N, 101);
      }
      for (const int64_t r : {0, 1, 8, 21}) token_rows(M, r, false), token_rows(M, r, true);
    }
    shrink(9, 1100, 5);
    expand(3, 600, 2, 20);
    weight_grad(530, 9, 20, false);
    weight_grad(300, 9, 17 * kernels.nr + 5, true);  // longer rows, fewer at a time
  }
};

}  // namespace
}  // namespace floe::cpu

int main() {
  using namespace floe::cpu;
  std::mt19937 random(1);
  for (int i = kDefault; i <= best_isa(); ++i) {
    const auto kernels = [&](Dtype x) -> const Kernels& {
      return moe_lora_kernels(x, static_cast<Isa>(i));
    };
    Suite<double, double>{kernels(Dtype::kFloat64), Dtype::kFloat64, random}.run();
    Suite<float, float>{kernels(Dtype::kFloat32), Dtype::kFloat32, random}.run();
    Suite<Float16, float>{kernels(Dtype::kFloat16), Dtype::kFloat16, random}.run();
    const Kernels& bf16 = kernels(Dtype::kBFloat16);
    if (bf16.elem == Dtype::kBFloat16) {
      Suite<BFloat16, BFloat16>{bf16, Dtype::kBFloat16, random}.run();
    } else {
      Suite<BFloat16, float>{bf16, Dtype::kBFloat16, random}.run();
    }
    std::printf("%s: %d failures\n", kIsaNames[i], failures);
  }
  return failures != 0;
}
