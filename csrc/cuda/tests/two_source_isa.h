// What TMA, wgmma, stmatrix and mbarrier do, written from the PTX ISA's words and tables ("Tensor
// swizzling modes", "Asynchronous Warpgroup Level Matrix Shared Memory Layout", "Canonical
// Layouts", "Register Fragments", "stmatrix", "mbarrier") and from nothing of the kernel, so that
// it can contradict it. Elements are 16-bit integers: every sum here is exact.
#pragma once

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <vector>

namespace floe::isa {

using Element = int16_t;

[[noreturn]] inline void fail(const char* what) {
  std::printf("%s\n", what);
  std::exit(1);
}
inline void expect(bool holds, const char* what) {
  if (!holds) fail(what);
}

struct Barrier {
  int count, pending, phase = 0;
  long bytes = 0;

  explicit Barrier(int count) : count(count), pending(count) {}
  // Whether the phase of that parity is over: the one before the first has parity 1.
  bool over(uint32_t parity) const { return (phase & 1) != static_cast<int>(parity); }
  void arrive(int arrivals) {
    expect(pending >= arrivals, "a barrier is arrived at more often than its phase expects");
    pending -= arrivals;
    flip();
  }
  void transfer(long change) {
    bytes += change;
    expect(std::labs(bytes) < 1 << 20, "a barrier counts more bytes than it can");
    flip();
  }
  void flip() {
    if (pending == 0 && bytes == 0) ++phase, pending = count;
  }
};

struct Global {
  int rows, columns;
  std::vector<Element> data;
  Global(int rows, int columns, Element fill = 0)
      : rows(rows), columns(columns), data(static_cast<size_t>(rows) * columns, fill) {}
  bool has(int r, int c) const { return r >= 0 && r < rows && c >= 0 && c < columns; }
  Element& at(int r, int c) { return data[static_cast<size_t>(r) * columns + c]; }
};

// One block's shared memory. An address has the block's rank in its cluster above its 24th bit.
struct Memory {
  static constexpr uint32_t kBytes = 228 << 10;
  std::vector<uint8_t> bytes = std::vector<uint8_t>(kBytes, 0x7b);

  Element& element(uint32_t address) {
    const uint32_t at = address & 0xffffff;
    expect(!(at % 2 || at + 2 > kBytes), "an address outside shared memory");
    return *reinterpret_cast<Element*>(&bytes[at]);
  }
};

// 128-byte swizzle, in 16-byte chunks: row r of eight 128-byte rows, as the ISA's figure prints it.
inline constexpr uint8_t kSwizzle128[8][8] = {
    {0, 1, 2, 3, 4, 5, 6, 7}, {1, 0, 3, 2, 5, 4, 7, 6}, {2, 3, 0, 1, 6, 7, 4, 5},
    {3, 2, 1, 0, 7, 6, 5, 4}, {4, 5, 6, 7, 0, 1, 2, 3}, {5, 4, 7, 6, 1, 0, 3, 2},
    {6, 7, 4, 5, 2, 3, 0, 1}, {7, 6, 5, 4, 3, 2, 1, 0},
};
inline uint32_t swizzled(uint32_t address) {
  const uint32_t row = address / 128 % 8, chunk = address / 16 % 8;
  return address - chunk * 16 + kSwizzle128[row][chunk] * 16;
}

// cp.async.bulk.tensor.2d, tiled, 128-byte swizzle: calls touch(address, row, column) an element.
inline void for_box(uint32_t address, int inner_size, int outer_size, int inner, int outer,
                    const std::function<void(uint32_t, int, int)>& touch) {
  expect(!(inner_size * 2 > 128), "a swizzled box is wider than 128 bytes");
  expect(!(inner_size > 256 || outer_size > 256), "a box is longer than 256");
  expect(!(address % 128), "a swizzled box starts between two rows of 128 bytes");
  for (int o = 0; o < outer_size; ++o) {
    for (int i = 0; i < inner_size; ++i) {
      touch(swizzled(address + (o * inner_size + i) * 2), outer + o, inner + i);
    }
  }
}

inline void tma_load(Memory& to, uint32_t address, Global& from, int inner_size, int outer_size,
                     int inner, int outer) {
  for_box(address, inner_size, outer_size, inner, outer, [&](uint32_t at, int r, int c) {
    to.element(at) = from.has(r, c) ? from.at(r, c) : Element{0};
  });
}

inline void tma_store(Global& to, Global& writes, Memory& from, uint32_t address, int inner_size,
                      int outer_size, int inner, int outer) {
  for_box(address, inner_size, outer_size, inner, outer, [&](uint32_t at, int r, int c) {
    if (to.has(r, c)) to.at(r, c) = from.element(at), ++writes.at(r, c);
  });
}

// Element (mn, k) of an operand that a descriptor describes: the canonical layouts
//   K-major   ((8,m),(T,2k)):((8T,SBO),(1,T))     MN-major   ((T,8,m),(8,k)):((1,T,LBO),(8T,SBO))
// with T = 8 elements of 16 bits, then Swizzle<3,4,3> of the byte address.
inline Element operand(Memory& memory, uint64_t descriptor, bool mn_major, int mn, int k) {
  const auto field = [&](int low, int bits) {
    return static_cast<uint32_t>(descriptor >> low & ((uint64_t{1} << bits) - 1));
  };
  expect(!(field(62, 2) != 1), "a descriptor without the 128-byte swizzle");
  expect(!(field(49, 3) != 0 || field(46, 3) != 0 || field(52, 10) != 0), "a field that is not 0");
  const uint32_t start = field(0, 14) << 4, lbo = field(16, 14) << 4, sbo = field(32, 14) << 4;
  constexpr uint32_t kT = 8, kSize = 2;
  const uint32_t offset = mn_major
                              ? (mn % kT + mn / kT % 8 * kT + k % 8 * 8 * kT) * kSize +
                                    mn / (8 * kT) * lbo + k / 8 * sbo
                              : (mn % 8 * 8 * kT + k % kT + k / kT * kT) * kSize + mn / 8 * sbo;
  const uint32_t address = start + offset;
  return memory.element(address ^ (address >> 3 & 0x70));
}

// wgmma.mma_async.m64nNk16, A K-major in shared memory; the sums of each thread of the warpgroup.
inline void wgmma(Memory& memory, const std::vector<float*>& sums, int n, uint64_t a, uint64_t b,
                  bool b_mn_major, bool accumulate) {
  std::vector<float> left(64 * 16), right(static_cast<size_t>(n) * 16);
  for (int i = 0; i < 64 * 16; ++i) left[i] = operand(memory, a, false, i / 16, i % 16);
  for (int i = 0; i < n * 16; ++i) right[i] = operand(memory, b, b_mn_major, i / 16, i % 16);
  for (int thread = 0; thread < 128; ++thread) {
    for (int i = 0; i < n / 2; ++i) {
      const int row = 16 * (thread >> 5) + ((thread & 31) >> 2) + 8 * (i >> 1 & 1);
      const int column = 8 * (i >> 2) + 2 * (thread & 3) + (i & 1);
      float sum = accumulate ? sums[thread][i] : 0;
      for (int k = 0; k < 16; ++k) sum += left[row * 16 + k] * right[column * 16 + k];
      sums[thread][i] = sum;
    }
  }
}

// stmatrix.x4: row r of matrix j goes where lane 8 j + r says; lane l has elements (l / 4, 2 (l %
// 4)) and the next of each.
inline void stmatrix(Memory& memory, const uint32_t (&rows)[32], const uint32_t (&held)[32][4]) {
  for (int lane = 0; lane < 32; ++lane) {
    expect(!(rows[lane] % 16), "a row of stmatrix is not at a multiple of 16 bytes");
    for (int j = 0; j < 4; ++j) {
      for (int e = 0; e < 2; ++e) {
        const int row = lane / 4, column = lane % 4 * 2 + e;
        memory.element(rows[8 * j + row] + column * 2) =
            static_cast<Element>(held[lane][j] >> 16 * e);
      }
    }
  }
}

}  // namespace floe::isa
