// Between the products: what a token multiplies, and how weight_grad reads it. No torch here.
#pragma once

#include "cpu/moe_lora_kernels.h"
#include "cpu/tile.h"

namespace floe::cpu {
namespace {

template <typename V, typename scalar_t>
struct TokenSteps {
  using W = typename V::Wide;
  using elem = typename V::elem;
  using unit = typename V::unit;
  using acc = typename V::acc;
  using reg = typename V::reg;
  static constexpr int64_t MR = V::kMR;

  static FLOE_INLINE reg multiply(reg a, reg b) { return W::multiply_add(V::zero(), a, b); }

  static void token_rows(const TokenRows& s) {
    const int64_t width = ceil_div(s.R, V::kLanes) * V::kLanes;
    // every column's gate: whatever it was where no expert is kept, which the bits hide
    auto* gate = static_cast<acc*>(s.scratch);
    acc *products = gate + width, *du = products + width;
    auto* z_row = reinterpret_cast<scalar_t*>(du + width + V::kLanes);
    auto* bits = reinterpret_cast<uint8_t*>(z_row + width);
    const auto* scaling = static_cast<const acc*>(s.scaling);
    for (int64_t m = 0; m < s.M; ++m) {
      auto* h = static_cast<elem*>(s.h) + m * s.ld;
      auto* dz = s.u ? static_cast<elem*>(s.dz) + m * s.ld : nullptr;
      const int64_t* experts = s.experts + m * s.K;
      const acc* gates = static_cast<const acc*>(s.gates) + m * s.K;
      const auto* z = static_cast<const scalar_t*>(s.z) + m * s.C;
      const acc* u = s.u ? static_cast<const acc*>(s.u) + m * s.ld_u : nullptr;
      const bool masked = s.mask && !s.mask[m];
      std::memset(bits, 0, width / 8 + 8);
      for (int64_t k = 0; k < s.K && !masked; ++k) {
        const int64_t begin = s.first[experts[k]], end = s.first[experts[k] + 1];
        for (int64_t c = begin; c < end; ++c) gate[c] = gates[k];
        set_bits(bits, begin, end);
        if (s.shared_A) copy(z, end - begin, z_row + begin);
      }
      if (s.shared_A) {
        columns(width, scaling, gate, bits, z_row, u, h, du, products);
      } else {
        copy(z, s.R, z_row);
        columns(width, scaling, gate, bits, z_row, u, h, dz, products);
      }
      if (!u) continue;
      if (s.shared_A) sum_heads(s, masked ? nullptr : experts, du, dz);
      for (int64_t k = 0; k < s.K && !masked; ++k) {
        acc sum = 0;
        for (int64_t c = s.first[experts[k]]; c < s.first[experts[k] + 1]; ++c) sum += products[c];
        static_cast<acc*>(s.grad_gates)[m * s.K + k] = sum;
      }
    }
  }

  // Units of whole rows go to tiles of mr columns.
  static void tile_rows(const TileRows& s) {
    alignas(64) const elem none[V::kLanes] = {};
    alignas(64) unit pairs[V::kLanes];
    for (int64_t m = 0; m < s.M; m += V::kPack) {
      for (int64_t n = 0; n < s.N; n += V::kLanes) {
        const elem* rows[V::kPack];
        for (int i = 0; i < V::kPack; ++i) {
          rows[i] = m + i < s.M ? static_cast<const elem*>(s.rows) + (m + i) * s.ld + n : none;
        }
        V::interleave(rows, 0, pairs);
        scatter(pairs, n, least(V::kLanes, s.N - n), s.q + m / V::kPack, s.Q, s.tiled);
      }
    }
  }

  static void slot_grads(const SlotGrads& s) {
    const auto* scaling = static_cast<const acc*>(s.scaling);
    const auto* gates = static_cast<const acc*>(s.gates);
    auto* grad_gates = static_cast<acc*>(s.grad_gates);
    alignas(64) elem dz[V::kPack][V::kLanes], h[V::kPack][V::kLanes];
    alignas(64) unit pairs[V::kLanes];
    const elem *dz_rows[V::kPack], *h_rows[V::kPack];
    for (int i = 0; i < V::kPack; ++i) dz_rows[i] = dz[i], h_rows[i] = h[i];
    for (int64_t m = 0; m < s.M; m += V::kPack) {
      acc sums[V::kPack] = {};
      for (int64_t c = 0; c < s.rank; c += V::kLanes) {
        const int64_t count = least(V::kLanes, s.rank - c);
        alignas(64) acc factor[V::kLanes] = {}, u[V::kLanes] = {};
        alignas(64) scalar_t z[V::kLanes] = {};
        std::memcpy(factor, scaling + c, count * sizeof(acc));
        for (int64_t i = 0; i < V::kPack; ++i) {
          reg du = V::zero(), mixed = V::zero();
          if (m + i < s.M) {
            const int64_t t = s.tokens[m + i];
            const acc gate = gates[t * s.K + s.choices[m + i]];
            std::memcpy(u, static_cast<const acc*>(s.u) + (m + i) * s.ld_u + c,
                        count * sizeof(acc));
            std::memcpy(static_cast<void*>(z), static_cast<const scalar_t*>(s.z) + t * s.C + c,
                        count * sizeof(scalar_t));
            const reg scaled = multiply(V::load(factor), V::load_wide(z));
            sums[i] += W::total(multiply(scaled, V::load(u)));
            mixed = V::scale(scaled, gate);
            du = V::scale(multiply(V::load(factor), V::load(u)), gate);
          }
          V::store_narrow(dz[i], du), V::store_narrow(h[i], mixed);
          if (m + i < s.M) {
            auto* row = static_cast<elem*>(s.dz) + (m + i) * s.ld_dz + c;
            std::memcpy(static_cast<void*>(row), dz[i],
                        least(V::kLanes, s.ld_dz - c) * sizeof *row);
          }
        }
        V::interleave(dz_rows, 0, pairs);
        scatter(pairs, c, count, s.q + m / V::kPack, s.Q, s.dz_tiled);
        V::interleave(h_rows, 0, pairs);
        scatter(pairs, c, count, s.q + m / V::kPack, s.Q, s.h_tiled);
      }
      for (int64_t i = 0; i < V::kPack && m + i < s.M; ++i) {
        grad_gates[s.tokens[m + i] * s.K + s.choices[m + i]] = sums[i];
      }
    }
  }

 private:
  static FLOE_INLINE void copy(const scalar_t* from, int64_t count, scalar_t* to) {
    if (count == 0) return;  // an empty tensor's memory may be nowhere
    std::memcpy(static_cast<void*>(to), from, count * sizeof *to);
  }

  static FLOE_INLINE void set_bits(uint8_t* bits, int64_t begin, int64_t end) {
    for (; begin < end && (begin % 8 || end - begin < 8); ++begin) {
      bits[begin / 8] = static_cast<uint8_t>(bits[begin / 8] | 1 << begin % 8);
    }
    for (; end - begin >= 8; begin += 8) bits[begin / 8] = 0xff;
    for (; begin < end; ++begin) {
      bits[begin / 8] = static_cast<uint8_t>(bits[begin / 8] | 1 << begin % 8);
    }
  }

  // One token's columns; the gradients of z stay sums where several heads add to them.
  template <typename to_t>
  static FLOE_INLINE void columns(int64_t width, const acc* scaling, const acc* gate,
                                  const uint8_t* bits, const scalar_t* z, const acc* u, elem* h,
                                  to_t* dz, acc* products) {
    for (int64_t n = 0; n < width; n += V::kLanes) {
      const reg factor = V::load(scaling + n), own = V::load(gate + n);
      const reg scaled = multiply(factor, V::load_wide(z + n));
      V::store_narrow(h + n, V::select(bits, n, multiply(scaled, own)));
      if (!u) continue;
      const reg gradient = V::load(u + n);
      V::store(products + n, multiply(scaled, gradient));
      const reg out = V::select(bits, n, multiply(multiply(factor, gradient), own));
      V::store_narrow(dz + n, out);
    }
  }

  // dz (C,) summed over the kept experts' columns of du; zero for a masked token.
  static FLOE_INLINE void sum_heads(const TokenRows& s, const int64_t* experts, const acc* du,
                                    elem* dz) {
    for (int64_t n = 0; n < s.C; n += V::kLanes) {
      reg sum = V::zero();
      for (int64_t k = 0; k < s.K && experts; ++k) {
        sum = V::add(sum, V::load(du + s.first[experts[k]] + n));
      }
      V::store_narrow(dz + n, sum);
    }
    for (int64_t n = s.C; n < units<V>(s.C) * V::kPack; ++n) dz[n] = elem{};
  }

  // Unit q of columns c..c + count, to their place in tiles of mr columns.
  static FLOE_INLINE void scatter(const unit* from, int64_t c, int64_t count, int64_t q, int64_t Q,
                                  void* tiled) {
    auto* to = static_cast<unit*>(tiled);
    if constexpr (V::kLanes % MR == 0) {  // columns beyond the last are there, and nobody's
      for (int64_t n = 0; n < count; n += MR) {
        std::memcpy(to + ((c + n) / MR * Q + q) * MR, from + n, MR * sizeof(unit));
      }
    } else {
      for (int64_t n = c; n < c + count; ++n) to[(n / MR * Q + q) * MR + n % MR] = from[n - c];
    }
  }
};

}  // namespace
}  // namespace floe::cpu
