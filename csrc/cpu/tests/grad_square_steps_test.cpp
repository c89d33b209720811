// The steps of grad_square_kernels.h against plain loops, on ragged sizes and exact allocations,
// with panels spread over threads: for builds with -fsanitize=address,undefined or =thread.
#include <cstdio>
#include <cstdlib>
#include <random>
#include <vector>

#include "cpu/grad_square_kernels.h"
#include "cpu/tests/checks.h"

namespace floe::cpu {
namespace {

struct Scratch {
  void* data;
  explicit Scratch(int64_t bytes) : data(std::aligned_alloc(64, (bytes + 63) / 64 * 64 + 64)) {}
  ~Scratch() { std::free(data); }
};

template <typename scalar_t>
std::vector<scalar_t> draw(int64_t size, std::mt19937& random) {
  std::uniform_real_distribution<float> uniform(-1, 1);
  std::vector<scalar_t> out;
  for (int64_t i = 0; i < size; ++i) out.push_back(narrow<scalar_t>(uniform(random)));
  out.shrink_to_fit();
  return out;
}

struct Expected {
  std::vector<double> grad, fisher, norms;
};

template <typename scalar_t>
Expected plain_loops(const SegmentGradSquare& s) {
  const auto* g = static_cast<const scalar_t*>(s.g);
  const auto* x = static_cast<const scalar_t*>(s.x);
  Expected out{std::vector<double>(s.R * s.D), std::vector<double>(s.R * s.D),
               std::vector<double>(s.S)};
  for (int64_t p = 0; p < s.num_pieces; ++p) {
    const Piece& piece = s.pieces[p];
    for (int64_t i = 0; i < s.R * s.D; ++i) {
      double sum = 0;
      for (int64_t t = piece.begin; t < piece.begin + piece.length; ++t) {
        sum += static_cast<double>(widen(g[t * s.ld_g + i / s.D])) *
               static_cast<double>(widen(x[t * s.ld_x + i % s.D]));
      }
      out.grad[i] += sum;
      if (piece.sample < 0) continue;
      const double scaled = sum * static_cast<double>(s.scale[piece.sample]);
      out.fisher[i] += scaled * scaled;
      out.norms[piece.sample] += scaled * scaled;
    }
  }
  return out;
}

template <typename scalar_t>
void check(const GradSquareKernels& kernels, const std::vector<int64_t>& lengths, int64_t R,
           int64_t D, double tolerance, std::mt19937& random) {
  using wide = wide_t<scalar_t>;
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
  const auto g = draw<scalar_t>(s.N * R, random), x = draw<scalar_t>(s.N * D, random);
  s.g = g.data(), s.x = x.data(), s.pieces = pieces.data();
  s.num_pieces = static_cast<int64_t>(pieces.size());
  s.scale = scale.data(), s.scale_each = true;
  const int64_t panels = (D + kernels.columns - 1) / kernels.columns;
  std::vector<scalar_t> grad(R * D);
  std::vector<wide> fisher(R * D);
  std::vector<double> rows(panels * R), norms(panels * s.S);
  s.grad = grad.data(), s.fisher = fisher.data(), s.fisher_rows = rows.data();
  s.norms = norms.data();
  const Scratch tiles(kernels.tiles_size(s) * kernels.element_size);
  s.tiles = tiles.data;
  on_threads(s.num_pieces,
             [&](int64_t begin, int64_t end) { kernels.tile_rows(s, begin, end, tiles.data); });
  on_threads(panels, [&](int64_t begin, int64_t end) {
    const Scratch scratch(kernels.scratch_size(s));
    kernels.panels(s, begin, end, scratch.data);
  });
  const Expected expected = plain_loops<scalar_t>(s);
  const double stored = sizeof(scalar_t) == 2 ? 2e-2 : tolerance;
  for (int64_t i = 0; i < R * D; ++i) {
    expect_close("grad", static_cast<double>(widen(grad[i])), expected.grad[i], stored);
    expect_close("fisher", static_cast<double>(fisher[i]), expected.fisher[i], tolerance);
  }
  for (int64_t i = 0; i < s.S; ++i) {
    double norm = 0;
    for (int64_t p = 0; p < panels; ++p) norm += norms[p * s.S + i];
    expect_close("norm", norm, expected.norms[i], tolerance);
  }
  for (int64_t r = 0; r < R; ++r) {
    double row = 0, whole = 0;
    for (int64_t p = 0; p < panels; ++p) row += rows[p * R + r];
    for (int64_t d = 0; d < D; ++d) whole += expected.fisher[r * D + d];
    expect_close("row of fisher", row, whole, tolerance);
  }
}

template <typename scalar_t>
void run(const GradSquareKernels& kernels, double tolerance, std::mt19937& random) {
  for (const int64_t R : {1, 9, 17}) {
    for (const int64_t D : {1, 50, 101}) {
      check<scalar_t>(kernels, {2, 1, 0, 7, 3, 1}, R, D, tolerance, random);
      check<scalar_t>(kernels, {0, 0}, R, D, tolerance, random);
    }
  }
  check<scalar_t>(kernels, {0, 300, 5, 260, 1}, 3, 20, tolerance, random);  // longer than a panel
  check<scalar_t>(kernels, {1, 6, 3, 1}, 300, 450, tolerance, random);      // panels in groups
  check<scalar_t>(kernels, {3, 40, 0, 33, 1}, 21, 99, tolerance, random);   // enough for tiles
  check<scalar_t>(kernels, {1, 2, 1}, 0, 5, tolerance, random);
  check<scalar_t>(kernels, {1, 2, 1}, 5, 0, tolerance, random);
}

}  // namespace
}  // namespace floe::cpu

int main() {
  using namespace floe::cpu;
  std::mt19937 random(1);
  for (int i = kDefault; i <= best_isa(); ++i) {
    const auto kernels = [&](Dtype dtype) -> const GradSquareKernels& {
      return grad_square_kernels(dtype, static_cast<Isa>(i));
    };
    run<double>(kernels(Dtype::kFloat64), 1e-12, random);
    run<float>(kernels(Dtype::kFloat32), 1e-4, random);
    run<Float16>(kernels(Dtype::kFloat16), 1e-4, random);
    run<BFloat16>(kernels(Dtype::kBFloat16), 1e-4, random);
    std::printf("%s: %d failures\n", kIsaNames[i], failures);
  }
  return failures != 0;
}
