// The kernels of linear_grad_square.cuh, run on the CPU lane by lane, against float64 loops; and
// the arithmetic of their schedule by itself.
#include "cuda/linear_grad_square.cuh"

#include <cstring>

#include "cuda/tests/checks.h"

namespace floe::cuda {
namespace {

struct Case {
  const char* name;
  std::vector<int64_t> lengths;
  int64_t outside;
  int R, D, pad;
};

const Case kCases[] = {
    {"through Gram matrices", {5, 0, 1, 64, 70}, 3, 200, 136, 0},
    {"several tiles of a Gram matrix", {20, 140}, 0, 330, 300, 2},
    {"through gradients", {70, 33, 64, 1}, 1, 9, 24, 0},
    {"several tiles of a gradient", {100, 0, 98}, 0, 140, 260, 2},
    {"both", {100, 6, 257}, 2, 130, 131, 5},
};

template <typename Square>
void check_kernels(const char* type) {
  using scalar_t = typename Square::Type;
  std::mt19937 random(9);
  int turn = 0;
  for (const Case& c : kCases) {
    const int failed = failures;
    const auto offsets = offsets_of(c.lengths, c.outside);
    const int64_t N = offsets.back() + c.outside, S = static_cast<int64_t>(c.lengths.size());
    const int ld_g = c.R + c.pad, ld_x = c.D + c.pad;
    const Buffer<scalar_t> g(N * ld_g), x(N * ld_x);
    const Buffer<float> scale(S);
    fill_uniform(g, random), fill_uniform(x, random), fill_uniform(scale, random);
    const int scale_each = turn++ % 3 - 1;
    const int64_t most = bound_items(N, S, c.R, c.D);
    std::vector<float> before;
    for (const int blocks : {1, 7}) {
      const Buffer<int64_t> first_item(S + 1);
      const Buffer<float> item_parts(most), norms(S);
      const auto source = [](const auto& buffer, int ld, int columns) {
        const int64_t bytes = static_cast<int64_t>(ld) * sizeof(buffer[0]);
        return Source{reinterpret_cast<const char*>(buffer.get()), bytes, columns, bytes % 16 == 0};
      };
      LinearGradSquare call{};
      call.g = source(g, ld_g, c.R), call.x = source(x, ld_x, c.D);
      call.segments = {offsets.data(), N, S};
      call.scale = scale_each < 0 ? nullptr : scale.get(), call.scale_each = scale_each > 0;
      call.first_item = first_item.get(), call.item_parts = item_parts.get();
      call.most_items = most, call.norms = norms.get();
      launch({1}, kSumThreads, kSumWarps * 8, [&] { list_items_kernel(call); });
      launch({static_cast<unsigned>(blocks)}, kItemThreads, linear_grad_square_shared<Square>(),
             [&] { linear_grad_square_kernel<Square>(call); });
      launch({static_cast<unsigned>((S + 7) / 8)}, 256, 0, [&] { add_items_kernel(call); });
      for (int64_t i = 0; i < S && blocks == 1; ++i) {
        double norm = 0, error = 0;
        const double factor = scale_each < 0 ? 1 : scale[i * scale_each];
        const int64_t begin = offsets[i], end = offsets[i + 1];
        // |<K, L>| of Gram matrices can be far above the norm: terms of both signs
        const bool gram = uses_gram(end - begin, c.R, c.D);
        double terms = 0;
        for (int64_t s = begin; gram && s < end; ++s) {
          for (int64_t t = begin; t < end; ++t) {
            double k = 0, l = 0, k_size = 0, l_size = 0;
            for (int r = 0; r < c.R; ++r) {
              const double term = double{widen(g[s * ld_g + r])} * widen(g[t * ld_g + r]);
              k += term, k_size += std::abs(term);
            }
            for (int d = 0; d < c.D; ++d) {
              const double term = double{widen(x[s * ld_x + d])} * widen(x[t * ld_x + d]);
              l += term, l_size += std::abs(term);
            }
            norm += k * l, terms += std::abs(k * l);
            error += kRounding * (c.R * k_size * std::abs(l) + c.D * l_size * std::abs(k));
          }
        }
        for (int64_t r = 0; r < c.R && !gram; ++r) {
          for (int64_t d = 0; d < c.D; ++d) {
            double sum = 0, size = 0;
            for (int64_t t = begin; t < end; ++t) {
              const double term = double{widen(g[t * ld_g + r])} * widen(x[t * ld_x + d]);
              sum += term, size += std::abs(term);
            }
            const double dz = kRounding * static_cast<double>(end - begin) * size;
            norm += sum * sum, terms += sum * sum, error += 2 * std::abs(sum) * dz + dz * dz;
          }
        }
        // adding up: a thread's 64 terms, then trees over lanes, warps and items
        error += kRounding * (64 + 5 + 8 + 32 + 8) * terms;
        expect_close("norm", i, norms[i], norm * factor * factor, error * factor * factor);
      }
      const std::vector<float> now(norms.get(), norms.get() + S);
      FLOE_EXPECT(before.empty() || !std::memcmp(before.data(), now.data(), S * sizeof(float)),
                  "the bits depend on the number of blocks");
      before = now;
    }
    if (failures != failed) std::printf("  in \"%s\" of %s\n", c.name, type);
  }
  std::printf("%s: %d bytes shared\n", type, linear_grad_square_shared<Square>());
}

// NaN in one sample, or in a row of no sample, stays there.
template <typename Square>
void spoil_one_row() {
  using scalar_t = typename Square::Type;
  std::mt19937 random(10);
  for (const int R : {8, 160}) {
    const std::vector<int64_t> offsets = {1, 4, 30, 90};
    const Buffer<scalar_t> g(91 * R), x(91 * 64);
    fill_uniform(g, random), fill_uniform(x, random);
    const auto nan = narrow<scalar_t>(std::numeric_limits<float>::quiet_NaN());
    g[0] = g[90 * R] = x[0] = x[29 * 64 + 5] = nan;
    const Buffer<int64_t> first_item(4);
    const int64_t most = bound_items(91, 3, R, 64);
    const Buffer<float> item_parts(most), norms(3);
    LinearGradSquare call{};
    const int64_t size = sizeof(scalar_t);
    call.g = {reinterpret_cast<const char*>(g.get()), R * size, R, true};
    call.x = {reinterpret_cast<const char*>(x.get()), 64 * size, 64, true};
    call.segments = {offsets.data(), 91, 3};
    call.first_item = first_item.get(), call.item_parts = item_parts.get();
    call.most_items = most, call.norms = norms.get();
    launch({1}, kSumThreads, kSumWarps * 8, [&] { list_items_kernel(call); });
    launch({2}, kItemThreads, linear_grad_square_shared<Square>(),
           [&] { linear_grad_square_kernel<Square>(call); });
    launch({1}, 256, 0, [&] { add_items_kernel(call); });
    for (int i = 0; i < 3; ++i) FLOE_EXPECT(std::isnan(norms[i]) == (i == 1), "sample %d", i);
  }
}

void check_schedule() {
  std::mt19937_64 random(6);
  for (int64_t index = 0; index < 20000; ++index) {
    const int64_t at = index < 10000 ? index : random() % (int64_t{1} << 50);
    const TilePlace place = triangle_place(at);
    FLOE_EXPECT(place.row * (place.row + 1) / 2 + place.column == at && place.column >= 0 &&
                    place.column <= place.row,
                "triangle_place");
  }
  for (int draw = 0; draw < 5000; ++draw) {
    const auto size = [&] { return 1 + static_cast<int64_t>(random() % (1 << random() % 14)); };
    const int64_t R = size(), D = size(), S = 1 + random() % 20;
    int64_t N = 0, items = 0;
    for (int64_t i = 0; i < S; ++i) {
      // lengths around the one where the rule turns, too
      const int64_t turn = R * D / (R + D) + random() % 3 - 1;
      const int64_t T = random() % 3 ? size() - 1 : turn;
      N += T > 0 ? T : 0, items += count_items(T, R, D);
    }
    FLOE_EXPECT(items <= bound_items(N, S, R, D), "%d items, bound %d", static_cast<int>(items),
                static_cast<int>(bound_items(N, S, R, D)));
  }
}

template <typename Square>
void check_ownership() {
  std::vector<int> owners(kNormTile * kNormTile);
  launch({1}, kItemThreads, 0, [&] {
    for (int i = 0; i < Square::kSums; ++i)
      ++owners[Square::row(i) * kNormTile + Square::column(i)];
  });
  for (const int count : owners) FLOE_EXPECT(count == 1, "an element has %d owners", count);
}

}  // namespace
}  // namespace floe::cuda

int main() {
  using namespace floe::cuda;
  check_schedule();
  check_ownership<MmaSquare<BFloat16>>(), check_ownership<FmaSquare>();
  check_kernels<MmaSquare<BFloat16>>("bfloat16");
  check_kernels<MmaSquare<Float16>>("float16");
  check_kernels<FmaSquare>("float32");
  spoil_one_row<MmaSquare<BFloat16>>(), spoil_one_row<FmaSquare>();
  std::printf("%d failures\n", failures);
  return failures != 0;
}
