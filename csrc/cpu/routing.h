// Dims: N tokens, E experts, K experts kept per token.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <numeric>
#include <type_traits>

namespace floe::cpu {

// Routes one token. Raw pointers in, raw pointers out: no torch in this file.
//
//   logits  (E,)  finite
//   gates   (K,)  softmax of the K largest logits, largest first; over those K when
//                 renormalize, else over all E
//   experts (K,)  their indices; equal logits keep index order
//   order   (E,)  scratch
template <typename scalar_t>
void topk_softmax_row(const scalar_t* logits, int64_t E, int64_t K, bool renormalize,
                      scalar_t* gates, int64_t* experts, int64_t* order) {
  using acc_t = std::conditional_t<std::is_same_v<scalar_t, double>, double, float>;

  std::iota(order, order + E, int64_t{0});
  const auto before = [&](int64_t a, int64_t b) {
    return logits[a] != logits[b] ? logits[a] > logits[b] : a < b;
  };
  if (K * E <= 64) {  // looking K times is faster than a heap
    for (int64_t k = 0; k < K; ++k) {
      std::swap(order[k], *std::min_element(order + k, order + E, before));
    }
  } else {
    std::partial_sort(order, order + K, order + E, before);
  }

  // order[0] is the row maximum, so every exponent is <= 0 and no exp overflows.
  const acc_t top = logits[order[0]];
  const auto weight = [&](int64_t k) {
    return std::exp(static_cast<acc_t>(logits[order[k]]) - top);
  };

  constexpr bool kOnce = std::is_same_v<scalar_t, acc_t>;  // a gate can hold an exponent's value
  acc_t total = 0;
  for (int64_t e = 0; e < E && !renormalize; ++e) total += weight(e);
  for (int64_t k = 0; k < K; ++k) {
    const acc_t own = weight(k);
    if (kOnce) gates[k] = static_cast<scalar_t>(own);
    if (renormalize) total += own;
  }
  for (int64_t k = 0; k < K; ++k) {
    const acc_t own = kOnce ? static_cast<acc_t>(gates[k]) : weight(k);
    gates[k] = static_cast<scalar_t>(own / total);
    experts[k] = order[k];
  }
}

}  // namespace floe::cpu
