// AVX-512 F, BW, DQ and VL as a Machine, and with BF16 a second; see vec.h. No torch here.
#pragma once

#include <immintrin.h>

#include "cpu/vec.h"

namespace floe::cpu {
namespace {

struct Avx512 {
  using Wide = Avx512;
  using elem = float;
  using unit = float;
  using acc = float;
  static constexpr int kPack = 1, kLanes = 16;
  static constexpr int kMR = 8, kNV = 3;  // 24 sums, 3 columns, 1 row: 28 of 32 registers
  static constexpr int kDotM = 4, kDotN = 6;

  using reg = __m512;
  using ureg = __m512;

  static FLOE_INLINE reg zero() { return _mm512_setzero_ps(); }
  static FLOE_INLINE reg load(const float* p) { return _mm512_loadu_ps(p); }
  static FLOE_INLINE void store(float* p, reg r) { _mm512_storeu_ps(p, r); }
  static FLOE_INLINE ureg load_units(const float* p) { return _mm512_loadu_ps(p); }
  static FLOE_INLINE ureg broadcast(const float* p) { return _mm512_set1_ps(*p); }
  static FLOE_INLINE reg multiply_add(reg sum, ureg a, ureg b) {
    return _mm512_fmadd_ps(a, b, sum);
  }
  static FLOE_INLINE float total(reg r) { return _mm512_reduce_add_ps(r); }

  static FLOE_INLINE reg load_row(const float* p) { return load(p); }
  static FLOE_INLINE reg load_row(const BFloat16* p) {
    const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
  }
  static FLOE_INLINE reg load_row(const Float16* p) {
    return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  }
  template <typename scalar_t>
  static FLOE_INLINE reg load_wide(const scalar_t* p) {
    return load_row(p);
  }
  static FLOE_INLINE void store_narrow(float* p, reg r) { store(p, r); }
  static FLOE_INLINE void store_narrow(BFloat16* p, reg r) {
    const __m512i bits = _mm512_castps_si512(r);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    const __m512i rounded =
        _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
    const __m512i quiet = _mm512_or_si512(bits, _mm512_set1_epi32(0x400000));
    const __mmask16 nan = _mm512_cmp_ps_mask(r, r, _CMP_UNORD_Q);
    const __m512i chosen = _mm512_mask_mov_epi32(rounded, nan, quiet);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p),
                        _mm512_cvtepi32_epi16(_mm512_srli_epi32(chosen, 16)));
  }
  static FLOE_INLINE void store_narrow(Float16* p, reg r) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p),
                        _mm512_cvtps_ph(r, _MM_FROUND_TO_NEAREST_INT));
  }
  static FLOE_INLINE reg scale(reg r, float factor) {
    return _mm512_mul_ps(r, _mm512_set1_ps(factor));
  }
  static FLOE_INLINE reg add(reg a, reg b) { return _mm512_add_ps(a, b); }

  static FLOE_INLINE reg select(const uint8_t* bits, int64_t first, reg r) {
    uint16_t mask;
    std::memcpy(&mask, bits + first / 8, sizeof mask);
    return _mm512_maskz_mov_ps(mask, r);
  }
  static FLOE_INLINE void interleave(const float* const* rows, int64_t n, float* out) {
    store(out, load(rows[0] + n));
  }

  // Four independent chains hide the latency of the multiply, 32 elements at a time.
  static constexpr int kKeepBytes = 4;
  static FLOE_INLINE void keep_bytes(const Dropout& dropout, uint64_t counter, uint8_t* out) {
    const __m512i m0 = _mm512_set1_epi64(0xD2511F53), m1 = _mm512_set1_epi64(0xCD9E8D57);
    const __m512i low = _mm512_set1_epi64(0xffffffff);
    const __m512i step = _mm512_setr_epi64(0, 1, 2, 3, 4, 5, 6, 7);
    __m512i c0[4], c1[4], c2[4], c3[4];
    for (int i = 0; i < 4; ++i) {
      c0[i] = _mm512_add_epi64(_mm512_set1_epi64(static_cast<int64_t>(counter) + 8 * i), step);
      c1[i] = _mm512_srli_epi64(c0[i], 32);
      c2[i] = c3[i] = _mm512_setzero_si512();
    }
    uint32_t k0 = static_cast<uint32_t>(dropout.key);
    uint32_t k1 = static_cast<uint32_t>(dropout.key >> 32);
    for (int round = 0; round < 10; ++round, k0 += 0x9E3779B9, k1 += 0xBB67AE85) {
      const __m512i key0 = _mm512_set1_epi64(k0), key1 = _mm512_set1_epi64(k1);
      for (int i = 0; i < 4; ++i) {
        // Words stay in 64-bit lanes: the multiply reads their low half only and fills the lane.
        const __m512i left = _mm512_mul_epu32(c0[i], m0), right = _mm512_mul_epu32(c2[i], m1);
        // 0x96 is a three-way xor; c1 and c3 carry a high half that must not reach the compare
        c0[i] = _mm512_ternarylogic_epi64(_mm512_srli_epi64(right, 32), c1[i], key0, 0x96);
        c2[i] = _mm512_ternarylogic_epi64(_mm512_srli_epi64(left, 32), c3[i], key1, 0x96);
        c1[i] = right;
        c3[i] = left;
      }
    }
    const __m512i limit = _mm512_set1_epi64(static_cast<int64_t>(dropout.threshold));
    for (int i = 0; i < 4; ++i) {
      out[i] = _mm512_cmpge_epu64_mask(_mm512_and_si512(c0[i], low), limit);
    }
  }
};

#if defined(FLOE_BF16)
// Pairs of bfloat16 in one step: vdpbf16ps sums two exact products in float32.
struct Avx512Bf16 : Avx512 {
  using elem = BFloat16;
  using unit = uint32_t;
  static constexpr int kPack = 2;

  using ureg = __m512bh;

  static FLOE_INLINE ureg load_units(const unit* p) { return (__m512bh)_mm512_loadu_si512(p); }
  static FLOE_INLINE ureg broadcast(const unit* p) {
    int pair;  // a row of bfloat16 may start at any even address
    std::memcpy(&pair, p, sizeof pair);
    return (__m512bh)_mm512_set1_epi32(pair);
  }
  static FLOE_INLINE reg multiply_add(reg sum, ureg a, ureg b) {
    return _mm512_dpbf16_ps(sum, a, b);
  }
  static FLOE_INLINE ureg load_row(const BFloat16* p) { return (__m512bh)_mm512_loadu_si512(p); }
  static FLOE_INLINE void interleave(const BFloat16* const* rows, int64_t n, unit* out) {
    const auto lane = [&](int i) __attribute__((always_inline)) {
      return _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)(rows[i] + n)));
    };
    _mm512_storeu_si512(out, _mm512_or_si512(lane(0), _mm512_slli_epi32(lane(1), 16)));
  }
  template <typename scalar_t>
  static FLOE_INLINE reg load_wide(const scalar_t* p) {
    return Avx512::load_row(p);
  }
  using Avx512::store_narrow;
  static FLOE_INLINE void store_narrow(BFloat16* p, reg r) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), (__m256i)_mm512_cvtneps_pbh(r));
  }
};
#endif

}  // namespace
}  // namespace floe::cpu
