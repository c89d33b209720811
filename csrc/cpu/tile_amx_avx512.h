// AMX with the vectors of AVX-512 and BF16. No torch here; see tile_amx.h.
#pragma once

#include "cpu/tile_amx.h"
#include "cpu/vec_avx512.h"

namespace floe::cpu {
namespace {

using AmxBf16 = Amx<Avx512Bf16>;

// Four rounds swap the lanes and rows whose numbers differ in one bit.
template <>
FLOE_INLINE void transpose<AmxBf16>(int64_t count, const void* from, int64_t bytes, uint32_t* to,
                                    int64_t ld) {
  const __m512i lane = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  __m512i rows[16];
#pragma GCC unroll 16
  for (int q = 0; q < 16; ++q) {
    const char* row = static_cast<const char*>(from) + q * bytes;
    rows[q] = q < count ? _mm512_loadu_si512(row) : _mm512_setzero_si512();
  }
#pragma GCC unroll 4
  for (int bit = 1; bit < 16; bit *= 2) {
    const __mmask16 set = _mm512_test_epi32_mask(lane, _mm512_set1_epi32(bit));
    // lanes 16..31 are those of the second row
    const __m512i first = _mm512_mask_add_epi32(lane, set, lane, _mm512_set1_epi32(16 - bit));
    const __m512i second = _mm512_add_epi32(first, _mm512_set1_epi32(bit));
#pragma GCC unroll 16
    for (int q = 0; q < 16; ++q) {
      if (q & bit) continue;
      const __m512i low = rows[q], high = rows[q + bit];
      rows[q] = _mm512_permutex2var_epi32(low, first, high);
      rows[q + bit] = _mm512_permutex2var_epi32(low, second, high);
    }
  }
#pragma GCC unroll 16
  for (int m = 0; m < 16; ++m) _mm512_storeu_si512(to + m * ld, rows[m]);
}

template <>
void any_tile<AmxBf16>(int64_t M, int64_t Q, const BFloat16* a, int64_t a_m, int64_t a_q,
                       const uint32_t* b, int64_t width, float* sums, int64_t ld, bool add) {
  any_tile_of_registers<AmxBf16>(M, Q, a, a_m, a_q, b, width, sums, ld, add);
}

}  // namespace
}  // namespace floe::cpu
