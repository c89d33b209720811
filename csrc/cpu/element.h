// The 16-bit floating point types as the kernels store them, and conversions. No torch here.
#pragma once

#include <bit>
#include <cstdint>
#include <type_traits>

// Compiled again for every instruction set: a copy out of line could be the wrong one.
#define FLOE_INLINE inline __attribute__((always_inline))

namespace floe::cpu {

enum class Dtype : int { kFloat64, kFloat32, kBFloat16, kFloat16 };

struct BFloat16 {
  uint16_t bits;
};

struct Float16 {
  uint16_t bits;
};

// Sums are kept in float32, or float64 for float64.
template <typename scalar_t>
using wide_t = std::conditional_t<std::is_same_v<scalar_t, double>, double, float>;

FLOE_INLINE double widen(double value) { return value; }
FLOE_INLINE float widen(float value) { return value; }
FLOE_INLINE float widen(BFloat16 value) { return std::bit_cast<float>(uint32_t{value.bits} << 16); }

FLOE_INLINE float widen(Float16 value) {
  const uint32_t sign = uint32_t{value.bits} >> 15 << 31, magnitude = value.bits & 0x7fff;
  if (magnitude >= 0x7c00) {  // infinity, NaN
    return std::bit_cast<float>(sign | 0x7f800000 | (magnitude & 0x3ff) << 13);
  }
  // As a float the bits lack 112 in the exponent; multiplying also makes subnormals normal.
  const float scaled = std::bit_cast<float>(magnitude << 13) * 0x1p112f;
  return std::bit_cast<float>(sign | std::bit_cast<uint32_t>(scaled));
}

// Round to nearest even; a NaN stays one.
template <typename scalar_t>
FLOE_INLINE scalar_t narrow(double value) {
  return static_cast<scalar_t>(value);
}

template <typename scalar_t>
FLOE_INLINE scalar_t narrow(float value) {
  if constexpr (std::is_same_v<scalar_t, BFloat16>) {
    const uint32_t bits = std::bit_cast<uint32_t>(value);
    if (value != value) return {static_cast<uint16_t>(bits >> 16 | 0x40)};
    return {static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
  } else if constexpr (std::is_same_v<scalar_t, Float16>) {
    const uint32_t bits = std::bit_cast<uint32_t>(value), magnitude = bits & 0x7fffffff;
    const uint16_t sign = static_cast<uint16_t>(bits >> 16 & 0x8000);
    if (magnitude > 0x7f800000) return {static_cast<uint16_t>(sign | 0x7e00)};
    if (magnitude >= 0x477ff000) return {static_cast<uint16_t>(sign | 0x7c00)};  // 65520
    if (magnitude < 0x38800000) {
      // Subnormal: adding 0.5 leaves the 10 bits, rounded, at the end of the mantissa.
      const float shifted = std::bit_cast<float>(magnitude) + 0.5f;
      return {static_cast<uint16_t>(sign | (std::bit_cast<uint32_t>(shifted) - 0x3f000000))};
    }
    const uint32_t rounded = magnitude - 0x38000000 + 0xfff + (magnitude >> 13 & 1);
    return {static_cast<uint16_t>(sign | rounded >> 13)};
  } else {
    return static_cast<scalar_t>(value);
  }
}

}  // namespace floe::cpu
