// AMX as a Machine: another one's vectors, and tile registers for the blocks of tile.h's products.
// No torch here; see tile_amx_registers.h for what must be included before.
//
// Every function that multiplies runs inside a TileScope.
#pragma once

#include "cpu/tile.h"
#include "cpu/tile_amx_registers.h"

namespace floe::cpu {
namespace {

// Vectors are those of Base, a Machine of pairs of bfloat16 with 16 lanes.
template <typename Base>
struct Amx : Base {
  using Vectors = Base;
  static constexpr int kMR = kTileRows;
  static_assert(Base::kLanes == 16 && Base::kPack == 2 && Base::kNV <= 3);
};

// Filling a tile takes as long for one unit as for sixteen. A prototype on a Xeon with AMX
// (Sapphire Rapids) multiplied 16 rows by 8 units as fast as vdpbf16ps did; fewer are left to that.
// Fewer rows than four leave most of every tile empty.
constexpr int64_t kFewestRows = 4, kFewestUnits = 128;

// Units (count, 16), their rows `bytes` apart, transposed to rows `ld` units apart; columns from
// `count` on become zero.
template <typename V>
FLOE_INLINE void transpose(int64_t count, const void* from, int64_t bytes, uint32_t* to,
                           int64_t ld) {
  for (int64_t q = 0; q < kTileUnits; ++q) {
    uint32_t row[kTileRows] = {};
    if (q < count) std::memcpy(row, static_cast<const char*>(from) + q * bytes, sizeof row);
    for (int64_t m = 0; m < kTileRows; ++m) to[m * ld + q] = row[m];
  }
}

// Units (M, count), their rows `ld` elements apart; units from `count` on become zero. Rows from M
// on are left alone: they only meet rows of the product that nobody reads.
FLOE_INLINE void copy_rows(int64_t M, int64_t count, const BFloat16* from, int64_t ld,
                           uint32_t* to) {
  for (int64_t m = 0; m < M; ++m, to += kTileUnits) {
    std::memcpy(to, from + m * ld, count * 4);
    std::memset(to + count, 0, (kTileUnits - count) * 4);
  }
}

// As tile.h's tile for up to 16 rows, M of them, and any number of units.
template <typename V, int NV>
void tile_of_registers(int64_t M, int64_t Q, const BFloat16* a, int64_t a_m, int64_t a_q,
                       const uint32_t* b, float* sums, int64_t ld, bool add) {
  constexpr int64_t kWidth = NV * 16;
  // The units of a row are neighbours, or else those of a column of 16 rows, zero beyond M.
  const bool by_rows = a_q == V::kPack;
  alignas(64) uint32_t left[kTileRows * kTileUnits];
  alignas(64) uint32_t right[kTileUnits * kWidth];
  alignas(64) float product[kTileRows * kWidth];
  zero_sums<NV>();
  for (int64_t q = 0; q < Q; q += kTileUnits) {
    const int64_t count = least(kTileUnits, Q - q);
    const BFloat16* from = a + q * a_q;
    if (by_rows && M == kTileRows && count == kTileUnits) {
      load_left(from, a_m * 2);
    } else {
      if (by_rows) {
        copy_rows(M, count, from, a_m, left);
      } else {
        transpose<V>(count, from, a_q * 2, left, kTileUnits);
      }
      load_left(left, kTileBytes);
    }
    const uint32_t* units = b + q * kWidth;
    if (count < kTileUnits) {  // what follows the panel's last unit belongs to someone else
      std::memcpy(right, units, count * kWidth * 4);
      std::memset(right + count * kWidth, 0, (kTileUnits - count) * kWidth * 4);
      units = right;
    }
    multiply_add<NV>(units, kWidth * 4);
  }
  if (M == kTileRows && !add) return store_sums<NV>(sums, ld * 4);
  store_sums<NV>(product, kWidth * 4);
  for (int64_t m = 0; m < M; ++m) {
    for (int64_t n = 0; n < kWidth; n += 16) {
      float* to = sums + m * ld + n;
      const typename V::reg value = V::load(product + m * kWidth + n);
      V::store(to, add ? V::add(V::load(to), value) : value);
    }
  }
}

// any_tile of tile.h for V = Amx<Base>: every V has it specialised to this.
template <typename V>
FLOE_INLINE void any_tile_of_registers(int64_t M, int64_t Q, const BFloat16* a, int64_t a_m,
                                       int64_t a_q, const uint32_t* b, int64_t width, float* sums,
                                       int64_t ld, bool add) {
  using Base = typename V::Vectors;
  if (M < kFewestRows || M * Q < kFewestUnits) {
    for (int64_t m = 0; m < M; m += Base::kMR) {
      any_tile<Base>(least(Base::kMR, M - m), Q, a + m * a_m, a_m, a_q, b, width, sums + m * ld, ld,
                     add);
    }
    return;
  }
  switch (width / V::kLanes) {
    case 1:
      return tile_of_registers<V, 1>(M, Q, a, a_m, a_q, b, sums, ld, add);
    case 2:
      return tile_of_registers<V, 2>(M, Q, a, a_m, a_q, b, sums, ld, add);
    case 3:
      return tile_of_registers<V, 3>(M, Q, a, a_m, a_q, b, sums, ld, add);
  }
}

}  // namespace
}  // namespace floe::cpu
