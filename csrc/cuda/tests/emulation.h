// Runs a CUDA kernel's source on the CPU, block after block, and finds what a GPU would not say.
//
// A thread is a fiber. Which one runs next is drawn anew at every wait, so a result that leans on
// an order without a barrier changes. Copies to shared memory overwrite their target with NaN at
// once and land only in the wait for them. Shared memory is exactly as long as was asked for, and
// holds NaN. Operations of a warp follow the fragment layouts of the PTX ISA, and abort unless all
// 32 lanes come to the same one.
#pragma once

#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <random>
#include <vector>

#include "cpu/element.h"

#define FLOE_DEVICE inline
#define FLOE_DYNAMIC_SHARED(name) char* name = floe::cuda::emulation::block->shared.data()
#define __global__
#define __launch_bounds__(...)

namespace floe::cuda {
namespace emulation {

struct Index {
  unsigned x = 1, y = 1, z = 1;
};

[[noreturn]] inline void fail(const char* why) {
  std::fprintf(stderr, "emulation: %s\n", why);
  std::abort();
}

constexpr int kWarp = 32;
constexpr size_t kStack = 40 << 10;

struct Copy {
  char* to;
  const char* from;
  int bytes;
};

struct Fiber {
  ucontext_t context;
  std::unique_ptr<char[]> stack{new char[kStack]};
  bool done = false;
  std::vector<std::vector<Copy>> groups;  // committed copies, oldest first
  std::vector<Copy> open;
};

struct Meeting {  // where the lanes of a warp wait for one another
  const char* what = nullptr;
  std::vector<int> here;
  const void* in[kWarp];
  void* out[kWarp];
};

struct Block {
  std::vector<Fiber> fibers;
  std::vector<Meeting> warps;
  std::vector<int> ready, at_barrier;
  std::vector<char> shared;
  std::function<void()> body;
  ucontext_t scheduler;
  int current = 0;
};

inline Block* block = nullptr;
inline std::mt19937 order(1);

inline void pause() { swapcontext(&block->fibers[block->current].context, &block->scheduler); }

inline void enter() {
  block->body();
  block->fibers[block->current].done = true;
  pause();
}

// Waits for the warp's other lanes; the last to come computes for all.
template <typename in_t, typename out_t, typename compute_t>
void meet(const char* what, const in_t& in, out_t& out, compute_t compute) {
  const int lane = block->current % kWarp;
  Meeting& meeting = block->warps[block->current / kWarp];
  if (meeting.here.empty()) meeting.what = what;
  if (std::strcmp(meeting.what, what) != 0) fail("the lanes of a warp are at different operations");
  meeting.in[lane] = &in, meeting.out[lane] = &out;
  meeting.here.push_back(block->current);
  if (meeting.here.size() < kWarp) return pause();
  const in_t* all_in[kWarp];
  out_t* all_out[kWarp];
  for (int i = 0; i < kWarp; ++i) {
    all_in[i] = static_cast<const in_t*>(meeting.in[i]);
    all_out[i] = static_cast<out_t*>(meeting.out[i]);
  }
  compute(all_in, all_out);
  for (const int fiber : meeting.here) {
    if (fiber != block->current) block->ready.push_back(fiber);
  }
  meeting.here.clear();
}

}  // namespace emulation

inline emulation::Index threadIdx, blockIdx, blockDim, gridDim;

// Runs every block of the grid, in a random order too.
template <typename body_t>
void launch(emulation::Index grid, int threads, size_t shared_bytes, body_t body) {
  using namespace emulation;
  gridDim = grid;
  blockDim = {static_cast<unsigned>(threads)};
  std::vector<unsigned> blocks(grid.x * grid.y * grid.z);
  for (size_t i = 0; i < blocks.size(); ++i) blocks[i] = static_cast<unsigned>(i);
  std::shuffle(blocks.begin(), blocks.end(), order);
  std::vector<Fiber> fibers(threads);
  for (const unsigned index : blocks) {
    Block here;
    here.fibers.swap(fibers);
    here.warps.resize((threads + kWarp - 1) / kWarp);
    here.shared.assign(shared_bytes, '\xff');
    here.body = body;
    block = &here;
    blockIdx = {index % grid.x, index / grid.x % grid.y, index / grid.x / grid.y};
    for (int t = 0; t < threads; ++t) {
      Fiber& fiber = here.fibers[t];
      fiber.done = false;
      getcontext(&fiber.context);
      fiber.context.uc_stack.ss_sp = fiber.stack.get();
      fiber.context.uc_stack.ss_size = kStack;
      fiber.context.uc_link = nullptr;
      makecontext(&fiber.context, enter, 0);
      here.ready.push_back(t);
    }
    int alive = threads;
    while (alive) {
      if (here.ready.empty()) fail("threads wait for one that has returned");
      const size_t pick = order() % here.ready.size();
      here.current = here.ready[pick];
      here.ready[pick] = here.ready.back();
      here.ready.pop_back();
      threadIdx = {static_cast<unsigned>(here.current), 0, 0};
      swapcontext(&here.scheduler, &here.fibers[here.current].context);
      if (here.fibers[here.current].done) {
        here.fibers[here.current].groups.clear();
        --alive;
      }
    }
    here.fibers.swap(fibers);
  }
}

using cpu::BFloat16;
using cpu::Float16;
using cpu::narrow;
using cpu::widen;

inline void sync_block() {
  using namespace emulation;
  block->at_barrier.push_back(block->current);
  if (block->at_barrier.size() < block->fibers.size()) return pause();
  for (const int fiber : block->at_barrier) {
    if (fiber != block->current) block->ready.push_back(fiber);
  }
  block->at_barrier.clear();
}

using Shared = char*;

inline Shared shared_address(const char* pointer) { return const_cast<char*>(pointer); }

inline void copy_async(Shared shared, const void* global, int bytes) {
  using namespace emulation;
  const auto misaligned = [](const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 != 0; };
  if (misaligned(shared) || misaligned(global)) fail("a copy is not aligned");
  if (bytes < 0 || bytes > 16) fail("a copy is not of 0 to 16 bytes");
  std::memset(shared, 0xff, 16);
  block->fibers[block->current].open.push_back({shared, static_cast<const char*>(global), bytes});
}

inline void commit_copies() {
  emulation::Fiber& fiber = emulation::block->fibers[emulation::block->current];
  fiber.groups.push_back(std::move(fiber.open));
  fiber.open.clear();
}

template <int kPending>
void wait_copies() {
  emulation::Fiber& fiber = emulation::block->fibers[emulation::block->current];
  while (fiber.groups.size() > kPending) {
    for (const emulation::Copy& copy : fiber.groups.front()) {
      std::memset(copy.to, 0, 16);
      std::memcpy(copy.to, copy.from, copy.bytes);
    }
    fiber.groups.erase(fiber.groups.begin());
  }
}

inline void load_matrices(uint32_t (&out)[4], Shared row, bool transposed) {
  using Words = uint32_t[4];
  emulation::meet("ldmatrix", row, out, [=](const Shared* const* rows, Words** outs) {
    for (int matrix = 0; matrix < 4; ++matrix) {
      uint16_t element[8][8];
      for (int i = 0; i < 8; ++i) {
        const Shared from = *rows[matrix * 8 + i];
        if (reinterpret_cast<uintptr_t>(from) % 16 != 0) emulation::fail("ldmatrix not aligned");
        std::memcpy(element[i], from, 16);
      }
      for (int lane = 0; lane < 32; ++lane) {
        const int slow = lane / 4, fast = lane % 4 * 2;
        const uint32_t low = transposed ? element[fast][slow] : element[slow][fast];
        const uint32_t high = transposed ? element[fast + 1][slow] : element[slow][fast + 1];
        (*outs[lane])[matrix] = low | high << 16;
      }
    }
  });
}

inline void load_matrices_transposed(uint32_t (&out)[4], Shared row) {
  load_matrices(out, row, true);
}
inline void load_matrices(uint32_t (&out)[4], Shared row) { load_matrices(out, row, false); }

template <typename scalar_t>
void multiply_add(float* c, const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  struct In {
    uint32_t a[4], b[2];
  };
  const In in = {{a[0], a[1], a[2], a[3]}, {b0, b1}};
  emulation::meet("mma", in, c, [](const In* const* ins, float** const* sums) {
    const auto half = [](uint32_t word, int which) {
      return widen(scalar_t{static_cast<uint16_t>(word >> 16 * which)});
    };
    float left[16][16], right[16][8];
    for (int lane = 0; lane < 32; ++lane) {
      for (int i = 0; i < 2; ++i) {
        for (int r = 0; r < 4; ++r) {
          left[lane / 4 + r % 2 * 8][lane % 4 * 2 + i + r / 2 * 8] = half(ins[lane]->a[r], i);
        }
        for (int r = 0; r < 2; ++r) {
          right[lane % 4 * 2 + i + r * 8][lane / 4] = half(ins[lane]->b[r], i);
        }
      }
    }
    for (int lane = 0; lane < 32; ++lane) {
      for (int i = 0; i < 4; ++i) {
        float& sum = (*sums[lane])[i];
        double total = sum;
        for (int k = 0; k < 16; ++k) {
          total += double{left[lane / 4 + i / 2 * 8][k]} * right[k][lane % 4 * 2 + i % 2];
        }
        sum = static_cast<float>(total);
      }
    }
  });
}

template <typename value_t>
value_t shuffle_xor(value_t value, int lanes) {
  value_t out;
  emulation::meet("shuffle", value, out, [=](const value_t* const* ins, value_t** outs) {
    for (int lane = 0; lane < 32; ++lane) *outs[lane] = *ins[lane ^ lanes];
  });
  return out;
}

template <typename value_t>
value_t shuffle_up(value_t value, int lanes) {
  value_t out;
  emulation::meet("shuffle", value, out, [=](const value_t* const* ins, value_t** outs) {
    for (int lane = 0; lane < 32; ++lane) *outs[lane] = *ins[lane < lanes ? lane : lane - lanes];
  });
  return out;
}

inline unsigned ballot(bool value) {
  unsigned out;
  emulation::meet("ballot", value, out, [](const bool* const* ins, unsigned** outs) {
    unsigned bits = 0;
    for (int lane = 0; lane < 32; ++lane) bits |= unsigned{*ins[lane]} << lane;
    for (int lane = 0; lane < 32; ++lane) *outs[lane] = bits;
  });
  return out;
}

inline unsigned match_any(int value) {
  unsigned out;
  emulation::meet("match", value, out, [](const int* const* ins, unsigned** outs) {
    for (int lane = 0; lane < 32; ++lane) {
      *outs[lane] = 0;
      for (int other = 0; other < 32; ++other) {
        *outs[lane] |= unsigned{*ins[other] == *ins[lane]} << other;
      }
    }
  });
  return out;
}

template <typename wide_t>
wide_t exponential(wide_t value) {
  return std::exp(value);
}

inline int here(int value) { return value; }

inline int count_bits(unsigned bits) { return __builtin_popcount(bits); }

inline void sync_warp() {
  int nothing = 0;
  emulation::meet("syncwarp", nothing, nothing, [](const int* const*, int**) {});
}

}  // namespace floe::cuda
