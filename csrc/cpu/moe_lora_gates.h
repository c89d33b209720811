// What a mixture of LoRA experts computes per token between its products. No torch here.
//
// Dims: T tokens, E experts, K kept, R packed columns, C columns of z (R, or r with a shared A).
#pragma once

#include <algorithm>
#include <cstring>
#include <vector>

#include "cpu/element.h"
#include "cpu/routing.h"

namespace floe::cpu {

template <typename wide>
struct Layer {
  int64_t T, I, O, E, K, R, C;
  std::vector<int64_t> first;  // (E + 1,) the first packed column of every expert
  std::vector<wide> scaling;   // (R,), and zeros to a multiple of 64
  bool shared_A, renormalize;
  const bool* mask;  // (T,) or null

  bool masked(int64_t t) const { return mask && !mask[t]; }
  int64_t rank(int64_t e) const { return first[e + 1] - first[e]; }
};

// Chooses the experts of token t; a masked one gets the first K with gate and logits 0.
template <typename wide>
void route(const Layer<wide>& layer, int64_t t, wide* logits, wide* gates, int64_t* experts,
           std::vector<int64_t>& order) {
  logits += t * layer.E, gates += t * layer.K, experts += t * layer.K;
  if (layer.masked(t)) {
    std::fill_n(logits, layer.E, wide{0});
    std::fill_n(gates, layer.K, wide{0});
    std::iota(experts, experts + layer.K, int64_t{0});
    return;
  }
  order.resize(layer.E);
  topk_softmax_row(logits, layer.E, layer.K, layer.renormalize, gates, experts, order.data());
}

// out[c] = scaling * gate * z for the columns of expert e.
template <typename wide, typename scalar_t, typename elem>
void mix(const Layer<wide>& layer, int64_t e, wide gate, const scalar_t* z, elem* out) {
  const wide* scaling = layer.scaling.data() + layer.first[e];
  for (int64_t c = 0; c < layer.rank(e); ++c)
    out[c] = narrow<elem>(scaling[c] * gate * widen(z[c]));
}

// The auxiliary losses' share of the gradient of the logits.
template <typename wide>
struct AuxLosses {
  bool active = false;
  wide balance = 0, z = 0;  // coefficients over the number of tokens
  std::vector<wide> load;   // (E,) share of the picks

  AuxLosses() = default;
  AuxLosses(const Layer<wide>& layer, const int64_t* experts, const float* coefs)
      : active(true), load(layer.E) {
    std::vector<int64_t> picks(layer.E);
    int64_t tokens = 0;
    for (int64_t t = 0; t < layer.T; ++t) {
      if (layer.masked(t)) continue;
      ++tokens;
      for (int64_t k = 0; k < layer.K; ++k) ++picks[experts[t * layer.K + k]];
    }
    const wide total = static_cast<wide>(std::max<int64_t>(1, tokens * layer.K));
    for (int64_t e = 0; e < layer.E; ++e) load[e] = static_cast<wide>(picks[e]) / total;
    const wide rows = static_cast<wide>(std::max<int64_t>(1, tokens));
    balance = coefs[0] * static_cast<wide>(layer.E) / rows;
    z = 2 * coefs[1] / rows;
  }
};

// grad_logits (E,) of one unmasked token, from grad_gates (K,) of the experts it kept.
template <typename wide>
void logit_gradient(const Layer<wide>& layer, const wide* logits, const wide* gates,
                    const int64_t* experts, const wide* grad_gates, const AuxLosses<wide>& aux,
                    wide* grad_logits) {
  const int64_t E = layer.E, K = layer.K;
  std::fill_n(grad_logits, E, wide{0});
  if (layer.renormalize) {  // a softmax over the kept logits alone
    wide mean = 0;
    for (int64_t k = 0; k < K; ++k) mean += gates[k] * grad_gates[k];
    for (int64_t k = 0; k < K; ++k) {
      grad_logits[experts[k]] = gates[k] * (grad_gates[k] - mean);
    }
    if (!aux.active) return;
  }
  std::vector<wide> p(E);
  const wide top = *std::max_element(logits, logits + E);
  wide total = 0;
  for (int64_t e = 0; e < E; ++e) total += p[e] = std::exp(logits[e] - top);
  for (int64_t e = 0; e < E; ++e) p[e] /= total;
  if (!layer.renormalize) {
    wide mean = 0;
    for (int64_t k = 0; k < K; ++k) {
      const wide kept = gates[k] != 0 ? grad_gates[k] : 0;
      grad_logits[experts[k]] = kept;
      mean += p[experts[k]] * kept;
    }
    for (int64_t e = 0; e < E; ++e) grad_logits[e] = p[e] * (grad_logits[e] - mean);
  }
  if (aux.active) {
    wide mean = 0;
    for (int64_t e = 0; e < E; ++e) mean += p[e] * aux.load[e];
    const wide z = aux.z * (top + std::log(total));
    for (int64_t e = 0; e < E; ++e) {
      grad_logits[e] += p[e] * (aux.balance * (aux.load[e] - mean) + z);
    }
  }
}

// Coefficients as weight_grad reads them: (columns / mr, Q, mr, pack). Whoever fills it writes
// every row, zeros included.
template <typename elem>
struct Tiled {
  elem* data = nullptr;
  int64_t Q;  // units of all rows

  static int64_t size(int64_t columns, int64_t Q, int64_t mr, int64_t pack) {
    return (columns + mr - 1) / mr * mr * Q * pack;
  }
};

}  // namespace floe::cpu
