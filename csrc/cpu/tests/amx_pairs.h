// A Machine of pairs of bfloat16 in plain C++, under whose vectors tile_amx.h runs on any CPU.
#pragma once

#include <algorithm>
#include <bit>
#include <cmath>

#include "cpu/tile_amx.h"

namespace floe::cpu {
namespace {

struct Lanes {
  float lane[16];
  friend Lanes operator*(const Lanes& a, const Lanes& b) {
    Lanes out;
    for (int i = 0; i < 16; ++i) out.lane[i] = a.lane[i] * b.lane[i];
    return out;
  }
};

struct Pairs {
  using Wide = Portable<float>;
  using elem = BFloat16;
  using unit = uint32_t;
  using acc = float;
  using reg = Lanes;
  struct ureg {
    uint32_t lane[16];
  };
  static constexpr int kPack = 2, kLanes = 16, kMR = 4, kNV = 3, kDotM = 2, kDotN = 4;

  static reg zero() { return {}; }
  static reg load(const float* p) {
    reg r;
    std::memcpy(&r, p, sizeof r);
    return r;
  }
  static void store(float* p, const reg& r) { std::memcpy(p, &r, sizeof r); }
  static ureg load_units(const unit* p) {
    ureg r;
    std::memcpy(&r, p, sizeof r);
    return r;
  }
  static ureg load_row(const BFloat16* p) {
    ureg r;
    std::memcpy(&r, p, sizeof r);
    return r;
  }
  static ureg broadcast(const unit* p) {
    unit one;
    std::memcpy(&one, p, sizeof one);
    ureg r;
    std::fill_n(r.lane, 16, one);
    return r;
  }
  static reg multiply_add(reg sum, const ureg& a, const ureg& b) {
    const auto half = [](uint32_t pair, int i) {
      return std::bit_cast<float>(i ? pair & 0xffff0000 : pair << 16);
    };
    for (int n = 0; n < 16; ++n) {
      for (int i = 0; i < 2; ++i) {
        sum.lane[n] = std::fma(half(a.lane[n], i), half(b.lane[n], i), sum.lane[n]);
      }
    }
    return sum;
  }
  static float total(const reg& r) {
    float sum = 0;
    for (const float value : r.lane) sum += value;
    return sum;
  }
  template <typename scalar_t>
  static reg load_wide(const scalar_t* p) {
    reg r;
    for (int i = 0; i < 16; ++i) r.lane[i] = widen(p[i]);
    return r;
  }
  template <typename scalar_t>
  static void store_narrow(scalar_t* p, const reg& r) {
    for (int i = 0; i < 16; ++i) p[i] = narrow<scalar_t>(r.lane[i]);
  }
  static reg scale(reg r, float factor) {
    for (float& value : r.lane) value *= factor;
    return r;
  }
  static reg add(reg a, const reg& b) {
    for (int i = 0; i < 16; ++i) a.lane[i] += b.lane[i];
    return a;
  }
  static reg select(const uint8_t* bits, int64_t first, reg r) {
    for (int i = 0; i < 16; ++i) {
      if (!(bits[(first + i) / 8] >> (first + i) % 8 & 1)) r.lane[i] = 0;
    }
    return r;
  }
  static void interleave(const elem* const* rows, int64_t n, unit* out) {
    for (int i = 0; i < 16; ++i) {
      out[i] = rows[0][n + i].bits | static_cast<unit>(rows[1][n + i].bits) << 16;
    }
  }
};

using AmxPairs = Amx<Pairs>;

template <>
inline void any_tile<AmxPairs>(int64_t M, int64_t Q, const BFloat16* a, int64_t a_m, int64_t a_q,
                               const uint32_t* b, int64_t width, float* sums, int64_t ld,
                               bool add) {
  any_tile_of_registers<AmxPairs>(M, Q, a, a_m, a_q, b, width, sums, ld, add);
}

}  // namespace
}  // namespace floe::cpu
