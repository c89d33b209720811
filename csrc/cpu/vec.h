// What the tiles of tile.h need of an instruction set: a Machine. This one is portable; no torch.
//
// A product runs over *units*: what one lane multiplies and adds in one step. A unit is a float, a
// double, or, where the CPU multiplies pairs, two bfloat16 that are neighbours along the sum.
#pragma once

#include <cstring>

#include "cpu/element.h"
#include "cpu/philox.h"

namespace floe::cpu {
namespace {

// wide_t lanes in 16 bytes: SSE2, NEON, or whatever the compiler makes of it.
template <typename wide>
struct Portable {
  using Wide = Portable;  // for operands that must not be rounded
  using elem = wide;      // of an operand
  using unit = wide;
  using acc = wide;
  static constexpr int kPack = 1;  // elements in a unit
  static constexpr int kLanes = 16 / sizeof(wide);
  static constexpr int kMR = 4, kNV = 2;      // register tile: rows, vectors of columns
  static constexpr int kDotM = 2, kDotN = 4;  // dot tile: rows of either side

  typedef wide reg __attribute__((vector_size(16)));
  using ureg = reg;

  static FLOE_INLINE reg zero() { return reg{}; }
  static FLOE_INLINE reg load(const acc* p) {
    reg r;
    std::memcpy(&r, p, sizeof r);
    return r;
  }
  static FLOE_INLINE void store(acc* p, reg r) { std::memcpy(p, &r, sizeof r); }
  static FLOE_INLINE ureg load_units(const unit* p) { return load(p); }
  static FLOE_INLINE ureg broadcast(const unit* p) { return reg{} + *p; }
  static FLOE_INLINE reg multiply_add(reg sum, ureg a, ureg b) { return sum + a * b; }
  static FLOE_INLINE acc total(reg r) {
    acc sum = 0;
    for (int i = 0; i < kLanes; ++i) sum += r[i];
    return sum;
  }

  // kLanes * kPack elements of a row, as units.
  template <typename scalar_t>
  static FLOE_INLINE ureg load_row(const scalar_t* p) {
    reg r;
    for (int i = 0; i < kLanes; ++i) r[i] = widen(p[i]);
    return r;
  }
  // kLanes elements, wide, and back.
  template <typename scalar_t>
  static FLOE_INLINE reg load_wide(const scalar_t* p) {
    return load_row(p);
  }
  template <typename scalar_t>
  static FLOE_INLINE void store_narrow(scalar_t* p, reg r) {
    for (int i = 0; i < kLanes; ++i) p[i] = narrow<scalar_t>(acc{r[i]});
  }
  static FLOE_INLINE reg scale(reg r, acc factor) { return r * factor; }
  static FLOE_INLINE reg add(reg a, reg b) { return a + b; }

  // Lanes whose bit, bits [first], [first + 1], ..., is not set become zero.
  static FLOE_INLINE reg select(const uint8_t* bits, int64_t first, reg r) {
    for (int i = 0; i < kLanes; ++i) {
      if (!(bits[(first + i) / 8] >> (first + i) % 8 & 1)) r[i] = 0;
    }
    return r;
  }
  // kLanes units of kPack rows, from column n.
  static FLOE_INLINE void interleave(const elem* const* rows, int64_t n, unit* out) {
    store(out, load(rows[0] + n));
  }

  static constexpr int kKeepBytes = 1;
  static FLOE_INLINE void keep_bytes(const Dropout& dropout, uint64_t counter, uint8_t* out) {
    *out = keep_byte(dropout, counter);
  }
};

}  // namespace
}  // namespace floe::cpu
