// The tile registers of AMX in the one shape that the kernels use: sixteen rows of 64 bytes. No
// torch here.
//
// A left operand is 16 rows of 16 units, a right one 16 units of 16 columns, as in a panel of
// tile.h, and sums are 16 x 16 float32; a unit is two bfloat16. Whoever includes this has brought
// the _tile_* intrinsics: those of <immintrin.h>, or those of tests/amx_emulation.h. What they do:
// Intel 64 and IA-32 Architectures Software Developer's Manual, volume 2, LDTILECFG, TILELOADD,
// TDPBF16PS, TILESTORED, TILERELEASE.
#pragma once

#include "cpu/element.h"

namespace floe::cpu {
namespace {

inline constexpr int64_t kTileRows = 16, kTileUnits = 16, kTileBytes = 64;

// Palette 1 of LDTILECFG. Memory of this layout, not the registers.
struct alignas(64) TileConfig {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {};
  uint8_t rows[16] = {};
};
static_assert(sizeof(TileConfig) == 64);

// GCC's intrinsics do not say that they read memory: before one of them, what it reads is stored.
FLOE_INLINE void stored(const void* memory) { __asm__ volatile("" : : "r"(memory) : "memory"); }

// A thread may use tiles while one of these lives in it. At its end the registers are free again,
// so that the operating system need not save 8 KiB whenever the thread is preempted.
class TileScope {
 public:
  FLOE_INLINE TileScope() {
    TileConfig config;
    for (int i = 0; i < 8; ++i) config.row_bytes[i] = kTileBytes, config.rows[i] = kTileRows;
    stored(&config);
    _tile_loadconfig(&config);
  }
  FLOE_INLINE ~TileScope() { _tile_release(); }
  TileScope(const TileScope&) = delete;
  TileScope& operator=(const TileScope&) = delete;
};

// Sums are in registers 0..2, the left operand in 3, right ones in 4..6. A multiplication waits for
// the one before it into the same sums: by Intel's figures 52 cycles, of which three take up 48.
template <int NV>
FLOE_INLINE void zero_sums() {
  static_assert(NV >= 1 && NV <= 3);
  _tile_zero(0);
  if constexpr (NV > 1) _tile_zero(1);
  if constexpr (NV > 2) _tile_zero(2);
}

// Rows are `stride` bytes apart.
FLOE_INLINE void load_left(const void* rows, int64_t stride) {
  stored(rows);
  _tile_loadd(3, rows, stride);
}

// sums += left * right; the units of a right operand are `stride` bytes apart.
template <int NV>
FLOE_INLINE void multiply_add(const uint32_t* right, int64_t stride) {
  stored(right);
  _tile_loadd(4, right, stride);
  _tile_dpbf16ps(0, 3, 4);
  if constexpr (NV > 1) {
    _tile_loadd(5, right + 16, stride);
    _tile_dpbf16ps(1, 3, 5);
  }
  if constexpr (NV > 2) {
    _tile_loadd(6, right + 32, stride);
    _tile_dpbf16ps(2, 3, 6);
  }
}

template <int NV>
FLOE_INLINE void store_sums(float* to, int64_t stride) {
  _tile_stored(0, to, stride);
  if constexpr (NV > 1) _tile_stored(1, to + 16, stride);
  if constexpr (NV > 2) _tile_stored(2, to + 32, stride);
}

}  // namespace
}  // namespace floe::cpu
