// Dropout's mask, the same bits as reference/dropout.py: the first word of Philox4x32-10
// (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011). No torch here.
#pragma once

#include <cstdint>

#include "cpu/element.h"

namespace floe::cpu {

struct Dropout {
  uint64_t key = 0;
  uint64_t threshold = 0;  // the smallest word that keeps its element
  double scale = 1;        // 1 / (1 - p), of the kept
  bool active = false;
};

FLOE_INLINE uint32_t philox(uint64_t key, uint64_t counter) {
  uint32_t c0 = static_cast<uint32_t>(counter), c1 = static_cast<uint32_t>(counter >> 32);
  uint32_t c2 = 0, c3 = 0;
  uint32_t k0 = static_cast<uint32_t>(key), k1 = static_cast<uint32_t>(key >> 32);
  for (int round = 0; round < 10; ++round) {
    const uint64_t left = uint64_t{c0} * 0xD2511F53, right = uint64_t{c2} * 0xCD9E8D57;
    c0 = static_cast<uint32_t>(right >> 32) ^ c1 ^ k0;
    c1 = static_cast<uint32_t>(right);
    c2 = static_cast<uint32_t>(left >> 32) ^ c3 ^ k1;
    c3 = static_cast<uint32_t>(left);
    k0 += 0x9E3779B9;
    k1 += 0xBB67AE85;
  }
  return c0;
}

// Bit i says whether the element of counter `counter + i` is kept, for i in 0..8.
FLOE_INLINE uint8_t keep_byte(const Dropout& dropout, uint64_t counter) {
  uint8_t bits = 0;
  for (int i = 0; i < 8; ++i) {
    bits |= static_cast<uint8_t>((philox(dropout.key, counter + i) >= dropout.threshold) << i);
  }
  return bits;
}

}  // namespace floe::cpu
