// AVX2, FMA and F16C as a Machine; see vec.h. No torch here.
#pragma once

#include <immintrin.h>

#include "cpu/vec.h"

namespace floe::cpu {
namespace {

struct Avx2 {
  using Wide = Avx2;
  using elem = float;
  using unit = float;
  using acc = float;
  static constexpr int kPack = 1, kLanes = 8;
  static constexpr int kMR = 6, kNV = 2;  // 12 sums, 2 columns, 1 row: 15 of 16 registers
  static constexpr int kDotM = 3, kDotN = 3;

  using reg = __m256;
  using ureg = __m256;

  static FLOE_INLINE reg zero() { return _mm256_setzero_ps(); }
  static FLOE_INLINE reg load(const float* p) { return _mm256_loadu_ps(p); }
  static FLOE_INLINE void store(float* p, reg r) { _mm256_storeu_ps(p, r); }
  static FLOE_INLINE ureg load_units(const float* p) { return _mm256_loadu_ps(p); }
  static FLOE_INLINE ureg broadcast(const float* p) { return _mm256_broadcast_ss(p); }
  static FLOE_INLINE reg multiply_add(reg sum, ureg a, ureg b) {
    return _mm256_fmadd_ps(a, b, sum);
  }
  static FLOE_INLINE float total(reg r) {
    __m128 sum = _mm_add_ps(_mm256_castps256_ps128(r), _mm256_extractf128_ps(r, 1));
    sum = _mm_add_ps(sum, _mm_movehl_ps(sum, sum));
    return _mm_cvtss_f32(_mm_add_ss(sum, _mm_movehdup_ps(sum)));
  }

  static FLOE_INLINE reg load_row(const float* p) { return load(p); }
  static FLOE_INLINE reg load_row(const BFloat16* p) {
    const __m128i bits = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16));
  }
  static FLOE_INLINE reg load_row(const Float16* p) {
    return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  }
  template <typename scalar_t>
  static FLOE_INLINE reg load_wide(const scalar_t* p) {
    return load_row(p);
  }
  static FLOE_INLINE void store_narrow(float* p, reg r) { store(p, r); }
  static FLOE_INLINE void store_narrow(BFloat16* p, reg r) {
    const __m256i bits = _mm256_castps_si256(r);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    __m256i rounded = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
    const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(r, r, _CMP_UNORD_Q));
    const __m256i quiet = _mm256_or_si256(bits, _mm256_set1_epi32(0x400000));
    rounded = _mm256_srli_epi32(_mm256_blendv_epi8(rounded, quiet, nan), 16);
    const __m256i packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(rounded, rounded), 0x08);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_castsi256_si128(packed));
  }
  static FLOE_INLINE void store_narrow(Float16* p, reg r) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(r, _MM_FROUND_TO_NEAREST_INT));
  }
  static FLOE_INLINE reg scale(reg r, float factor) {
    return _mm256_mul_ps(r, _mm256_set1_ps(factor));
  }
  static FLOE_INLINE reg add(reg a, reg b) { return _mm256_add_ps(a, b); }

  static FLOE_INLINE reg select(const uint8_t* bits, int64_t first, reg r) {
    const __m256i lane = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
    const __m256i kept = _mm256_and_si256(_mm256_set1_epi32(bits[first / 8]), lane);
    return _mm256_and_ps(r, _mm256_castsi256_ps(_mm256_cmpeq_epi32(kept, lane)));
  }
  static FLOE_INLINE void interleave(const float* const* rows, int64_t n, float* out) {
    store(out, load(rows[0] + n));
  }

  // Words stay in 64-bit lanes: the multiply reads their low half only and fills the lane.
  static constexpr int kKeepBytes = 1;
  static FLOE_INLINE void keep_bytes(const Dropout& dropout, uint64_t counter, uint8_t* out) {
    *out = static_cast<uint8_t>(keep_four(dropout, counter) | keep_four(dropout, counter + 4) << 4);
  }
  static FLOE_INLINE int keep_four(const Dropout& dropout, uint64_t counter) {
    const __m256i low = _mm256_set1_epi64x(0xffffffff);
    const __m256i m0 = _mm256_set1_epi64x(0xD2511F53), m1 = _mm256_set1_epi64x(0xCD9E8D57);
    const __m256i n = _mm256_add_epi64(_mm256_set1_epi64x(static_cast<int64_t>(counter)),
                                       _mm256_setr_epi64x(0, 1, 2, 3));
    __m256i c0 = n, c1 = _mm256_srli_epi64(n, 32), c2 = _mm256_setzero_si256(), c3 = c2;
    uint32_t k0 = static_cast<uint32_t>(dropout.key);
    uint32_t k1 = static_cast<uint32_t>(dropout.key >> 32);
    for (int round = 0; round < 10; ++round, k0 += 0x9E3779B9, k1 += 0xBB67AE85) {
      const __m256i left = _mm256_mul_epu32(c0, m0), right = _mm256_mul_epu32(c2, m1);
      c0 = _mm256_xor_si256(_mm256_xor_si256(_mm256_srli_epi64(right, 32), c1),
                            _mm256_set1_epi64x(k0));
      c2 = _mm256_xor_si256(_mm256_xor_si256(_mm256_srli_epi64(left, 32), c3),
                            _mm256_set1_epi64x(k1));
      c1 = _mm256_and_si256(right, low);
      c3 = _mm256_and_si256(left, low);
    }
    const __m256i limit = _mm256_set1_epi64x(static_cast<int64_t>(dropout.threshold));
    const __m256i dropped = _mm256_cmpgt_epi64(limit, _mm256_and_si256(c0, low));
    return ~_mm256_movemask_pd(_mm256_castsi256_pd(dropped)) & 15;
  }
};

}  // namespace
}  // namespace floe::cpu
