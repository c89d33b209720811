// The tile registers of AMX in software, one set a thread: this header takes the place of
// <immintrin.h>'s _tile_* intrinsics in whatever is compiled after it.
//
// After Intel 64 and IA-32 Architectures Software Developer's Manual, volume 2 (LDTILECFG,
// TILELOADD, TILESTORED, TILEZERO, TILERELEASE, TDPBF16PS), which says what faults and what each
// rounding is. Stricter than a CPU in one point: registers hold nothing that may be read until they
// are zeroed or loaded. Every row is copied by itself, so that AddressSanitizer sees what is read.
#pragma once

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <stdexcept>

namespace floe::cpu::amx_emulation {

struct Fault : std::runtime_error {
  using std::runtime_error::runtime_error;
};

inline void require(bool allowed, const char* rule) {
  if (!allowed) throw Fault(rule);  // ends a program that does not expect it
}

struct Tile {
  int rows, bytes;  // 0 where not configured
  bool written;
  unsigned char data[16][64];
};

struct Registers {
  Tile tile[8];
  int64_t configured, released, multiplied;  // how often

  bool in_use() const { return configured > released; }

  Tile& at(int i) {
    require(in_use(), "tiles are used while none is configured");
    require(i >= 0 && i < 8, "palette 1 has the tiles 0..7");
    require(tile[i].rows > 0, "a tile is used that the configuration leaves out");
    return tile[i];
  }
  const Tile& read(int i) {
    require(at(i).written, "a tile is read before it is zeroed or loaded");
    return tile[i];
  }
};

inline Registers& registers() {
  static thread_local Registers mine{};
  return mine;
}

// Whatever a register held: NaN as float32 and as bfloat16.
inline void poison(Tile& tile) {
  tile.written = false;
  std::memset(tile.data, 0xff, sizeof tile.data);
}

inline void load_config(const void* from) {
  unsigned char bytes[64];
  std::memcpy(bytes, from, sizeof bytes);
  require(bytes[0] == 1, "the palette is not 1");
  require(bytes[1] == 0, "start_row is not 0");
  for (int i = 2; i < 16; ++i) require(bytes[i] == 0, "reserved bytes are not 0");
  Registers& mine = registers();
  require(!mine.in_use(), "a configuration is loaded over another");
  for (int i = 0; i < 16; ++i) {
    const int row_bytes = bytes[16 + 2 * i] + 256 * bytes[17 + 2 * i], rows = bytes[48 + i];
    if (i >= 8) {
      require(row_bytes == 0 && rows == 0, "reserved bytes are not 0");
      continue;
    }
    require(rows <= 16, "a tile has more than 16 rows");
    require(row_bytes <= 64, "a tile's rows have more than 64 bytes");
    require((rows == 0) == (row_bytes == 0),
            "a tile has rows without bytes, or bytes without rows");
    mine.tile[i].rows = rows, mine.tile[i].bytes = row_bytes;
    poison(mine.tile[i]);
  }
  ++mine.configured;
}

inline void release() {
  Registers& mine = registers();
  require(mine.in_use(), "tiles are released while none is configured");
  for (Tile& tile : mine.tile) tile.rows = tile.bytes = 0, poison(tile);
  ++mine.released;
}

inline void zero(int i) {
  Tile& tile = registers().at(i);
  std::memset(tile.data, 0, sizeof tile.data);
  tile.written = true;
}

inline void load(int i, const void* from, int64_t stride) {
  zero(i);  // rows and bytes beyond the configured ones become zero
  Tile& tile = registers().at(i);
  for (int r = 0; r < tile.rows; ++r) {
    std::memcpy(tile.data[r], static_cast<const char*>(from) + r * stride, tile.bytes);
  }
}

inline void store(int i, void* to, int64_t stride) {
  const Tile& tile = registers().read(i);
  for (int r = 0; r < tile.rows; ++r) {
    std::memcpy(static_cast<char*>(to) + r * stride, tile.data[r], tile.bytes);
  }
}

// A denormal is zero, as operand and as result, and keeps its sign.
inline float flushed(float value) {
  return std::fpclassify(value) == FP_SUBNORMAL ? std::copysign(0.0F, value) : value;
}

inline float plus(float a, float b) { return flushed(flushed(a) + flushed(b)); }

inline float bfloat16_at(const unsigned char* bytes) {
  return flushed(std::bit_cast<float>(static_cast<uint32_t>(bytes[0] | bytes[1] << 8) << 16));
}

// Even and odd elements have a sum each, of fused multiplications, and only then meet.
inline void dpbf16ps(int sums, int left, int right) {
  Registers& mine = registers();
  require(sums != left && sums != right && left != right, "TDPBF16PS takes three different tiles");
  const Tile &a = mine.read(left), &b = mine.read(right);
  mine.read(sums);
  Tile& c = mine.tile[sums];
  require(c.bytes % 4 == 0 && a.bytes % 4 == 0 && b.bytes % 4 == 0, "rows are not whole units");
  require(c.rows == a.rows, "the sums have other rows than the left operand");
  require(c.bytes == b.bytes, "the sums have other columns than the right operand");
  require(a.bytes / 4 == b.rows, "the operands have different numbers of units");
  for (int m = 0; m < c.rows; ++m) {
    for (int n = 0; n < c.bytes / 4; ++n) {
      float part[2] = {0, 0};
      for (int k = 0; k < b.rows; ++k) {
        for (int i = 0; i < 2; ++i) {
          part[i] = flushed(std::fma(bfloat16_at(a.data[m] + 4 * k + 2 * i),
                                     bfloat16_at(b.data[k] + 4 * n + 2 * i), part[i]));
        }
      }
      float sum;
      std::memcpy(&sum, c.data[m] + 4 * n, sizeof sum);
      sum = plus(sum, plus(part[0], part[1]));
      std::memcpy(c.data[m] + 4 * n, &sum, sizeof sum);
    }
  }
  ++mine.multiplied;
}

}  // namespace floe::cpu::amx_emulation

#undef _tile_loadd
#undef _tile_stored
#undef _tile_zero
#undef _tile_dpbf16ps
#define _tile_loadconfig(config) floe::cpu::amx_emulation::load_config(config)
#define _tile_release() floe::cpu::amx_emulation::release()
#define _tile_zero(tile) floe::cpu::amx_emulation::zero(tile)
#define _tile_loadd(tile, from, stride) floe::cpu::amx_emulation::load(tile, from, stride)
#define _tile_stored(tile, to, stride) floe::cpu::amx_emulation::store(tile, to, stride)
#define _tile_dpbf16ps(sums, left, right) floe::cpu::amx_emulation::dpbf16ps(sums, left, right)
