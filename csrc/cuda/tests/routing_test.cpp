// The kernels of routing.cuh and grouping.cuh, run on the CPU lane by lane, against plain sorts.
#include "cuda/routing.cuh"

#include <algorithm>
#include <cstring>
#include <numeric>

#include "cuda/grouping.cuh"
#include "cuda/tests/checks.h"

namespace floe::cuda {
namespace {

template <typename scalar_t, typename wide_t, int kEach>
void check_routing(int64_t N, int E, int K, bool renormalize, bool hard, std::mt19937& random) {
  const int64_t stride = E + 3;
  const Buffer<scalar_t> logits(N * stride), gates(N * K);
  const Buffer<int64_t> experts(N * K);
  fill_uniform(logits, random);
  if (hard) {  // ties, zeros of both signs, infinities and NaN
    const float values[] = {0.0f, -0.0f, 1.0f, -INFINITY, INFINITY, NAN};
    for (int64_t i = 0; i < logits.size; ++i) {
      logits[i] = narrow<scalar_t>(values[random() % (i / stride % 2 ? 6 : 4)]);
    }
  }
  launch({static_cast<unsigned>((N + 3) / 4)}, kRouteThreads, 0, [&] {
    topk_softmax_kernel<scalar_t, wide_t, kEach>(logits.get(), stride, N, E, K, renormalize,
                                                 gates.get(), experts.get());
  });
  // a rounding of the result, and of float32 sums and exponents; halves have subnormals
  const bool is_double = sizeof(scalar_t) == 8;
  const double rounding = (is_double ? 0x1p-52 : 0x1p-23) * (E + 4),
               stored = std::is_same_v<scalar_t, BFloat16>  ? 0x1p-8
                        : std::is_same_v<scalar_t, Float16> ? 0x1p-11
                                                            : 0;
  for (int64_t n = 0; n < N; ++n) {
    const auto logit = [&](int64_t e) {
      return static_cast<double>(widen(logits[n * stride + e]));
    };
    std::vector<int> order(E);
    std::iota(order.begin(), order.end(), 0);
    std::stable_sort(order.begin(), order.end(), [&](int a, int b) {
      if (std::isnan(logit(a)) || std::isnan(logit(b))) {
        return std::isnan(logit(a)) && !std::isnan(logit(b));
      }
      return logit(a) > logit(b);
    });
    double total = 0;
    for (int i = 0; i < (renormalize ? K : E); ++i)
      total += std::exp(logit(order[i]) - logit(order[0]));
    for (int k = 0; k < K; ++k) {
      FLOE_EXPECT(experts[n * K + k] == order[k], "E %d, pick %d of token %d", E, k,
                  static_cast<int>(n));
      const double expected = std::exp(logit(order[k]) - logit(order[0])) / total;
      const double got = widen(gates[n * K + k]);
      FLOE_EXPECT(std::isnan(expected)
                      ? std::isnan(got)
                      : std::abs(got - expected) <= (rounding + stored) * expected + 0x1p-25,
                  "gate %g, expected %g", got, expected);
    }
  }
}

// (token, slot) pairs sorted by expert and sample, by what the two kernels launch.
void check_sorting(int64_t N, int K, int E, const std::vector<int64_t>& samples, bool masked,
                   int hot, std::mt19937& random) {
  const int64_t pairs = N * K, B = static_cast<int64_t>(samples.size()) - 1;
  const SortPlan plan = plan_sort(pairs);
  const int bins = E + 1;
  const Buffer<int64_t> experts(pairs), pair(pairs), offsets(E * B + 1);
  const Buffer<uint8_t> mask(N);
  for (int64_t i = 0; i < pairs; ++i) {
    experts[i] = hot >= 0 && random() % 8 ? hot : static_cast<int64_t>(random() % (E + 1)) - 1;
  }
  for (int64_t n = 0; n < N; ++n) mask[n] = random() % 5 != 0;
  const Buffer<int32_t> block_counts(plan.blocks * bins), warp_counts(plan.warps() * bins);
  const SortPairs call = {experts.get(),
                          masked ? mask.get() : nullptr,
                          samples.data(),
                          N,
                          B,
                          K,
                          E,
                          plan,
                          block_counts.get(),
                          warp_counts.get(),
                          pair.get(),
                          offsets.get()};
  const auto blocks = static_cast<unsigned>(plan.blocks);
  launch({blocks}, kSortThreads, count_shared(E), [&] { count_pairs_kernel(call); });
  launch({blocks}, kSortThreads, place_shared(E), [&] { place_pairs_kernel(call); });

  const auto key = [&](int64_t p) {
    const int64_t token = p / K;
    const bool live = (!masked || mask[token]) && token >= samples[0] && token < samples[B];
    return live && experts[p] >= 0 ? experts[p] : E;
  };
  std::vector<int64_t> order(pairs);
  std::iota(order.begin(), order.end(), int64_t{0});
  std::stable_sort(order.begin(), order.end(),
                   [&](int64_t a, int64_t b) { return key(a) < key(b); });
  for (int64_t i = 0; i < pairs; ++i) {
    FLOE_EXPECT(pair[i] == order[i], "pair %d of %d", static_cast<int>(i), static_cast<int>(pairs));
  }
  std::vector<int64_t> counts(E * B + 1);
  for (int64_t p = 0; p < pairs; ++p) {
    if (key(p) == E) continue;
    int64_t b = B - 1;
    while (samples[b] > p / K) --b;
    ++counts[key(p) * B + b + 1];
  }
  std::partial_sum(counts.begin(), counts.end(), counts.begin());
  for (int64_t i = 0; i <= E * B; ++i) {
    FLOE_EXPECT(offsets[i] == counts[i], "offset %d is %d, expected %d", static_cast<int>(i),
                static_cast<int>(offsets[i]), static_cast<int>(counts[i]));
  }
}

void check_plan() {
  std::mt19937_64 random(2);
  for (int draw = 0; draw < 3000; ++draw) {
    const int64_t pairs = draw < 2000 ? draw : random() % (int64_t{1} << (random() % 42));
    const SortPlan plan = plan_sort(pairs);
    FLOE_EXPECT(plan.blocks >= 1 && plan.blocks <= kSortBlocks && plan.span % 32 == 0, "plan");
    FLOE_EXPECT(plan.begin(0) == 0 && plan.begin(plan.warps()) == pairs, "all pairs, once");
    FLOE_EXPECT(plan.span * kSortWarps < int64_t{1} << 31 || pairs >= int64_t{1} << 38,
                "a block's counts fit 32 bits");
  }
}

}  // namespace
}  // namespace floe::cuda

int main() {
  using namespace floe::cuda;
  std::mt19937 random(5);
  check_plan();
  for (const bool renormalize : {false, true}) {
    for (const bool hard : {false, true}) {
      check_routing<float, float, 1>(9, 1, 1, renormalize, hard, random);
      check_routing<float, float, 1>(13, 8, 2, renormalize, hard, random);
      check_routing<BFloat16, float, 1>(5, 32, 32, renormalize, hard, random);
      check_routing<Float16, float, 2>(6, 63, 3, renormalize, hard, random);
      check_routing<double, double, 8>(5, 250, 40, renormalize, hard, random);
      check_routing<float, float, 32>(3, 1024, 34, renormalize, hard, random);
    }
  }
  check_sorting(0, 2, 3, {0, 0}, false, -1, random);
  check_sorting(1, 1, 1, {0, 1}, false, -1, random);
  check_sorting(100, 2, 8, {0, 100}, false, -1, random);
  check_sorting(700, 2, 8, {0, 10, 10, 300, 301, 700}, true, -1, random);
  check_sorting(700, 3, 5, {0, 64, 128, 699, 700, 700}, false, 2, random);
  check_sorting(1500, 2, 70, {40, 41, 900, 1400}, true, 69, random);
  check_sorting(300, 1, 1024, {0, 150, 300}, false, -1, random);
  check_sorting(50, 2, 4, {0}, false, -1, random);
  std::vector<int64_t> tokens(601);
  std::iota(tokens.begin(), tokens.end(), int64_t{0});
  check_sorting(600, 2, 3, tokens, false, -1, random);
  std::printf("%d failures\n", failures);
  return failures != 0;
}
