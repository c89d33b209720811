// Runs the kernel's own source on the CPU, a cluster at a time: in place of the one-instruction
// functions of two_source_tma.cuh and two_source_mma.cuh stand these, which do what the PTX ISA
// says as late, or as early, as it lets them. A thread is a fiber; which runs next is drawn. Copies
// land, products and stores read their operands, whenever the draw says so; registers that a
// product in flight owns read as NaN, and so does what was never written.
#pragma once

#include <ucontext.h>

#include <cstring>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "cuda/tests/two_source_isa.h"
#include "cuda/two_source_schedule.h"

#define __device__
#define __global__
#define __forceinline__ inline
#define __grid_constant__
#define __launch_bounds__(...)
#define __shared__
#define __CUDA_ARCH_FEAT_SM90_ALL

struct Index {
  unsigned x;
};
inline Index threadIdx, blockIdx, gridDim;
struct float2 {
  float x, y;
};
struct CUtensorMap {
  floe::isa::Global *matrix, *writes;  // writes counts the stores to each element
  floe::two_source::Box box;
};

namespace floe::two_source {
namespace sm {

using isa::expect;

inline std::mt19937 order(1);
constexpr size_t kStack = 64 << 10;
constexpr int kLaunched = 65536 / 384 / 8 * 8;  // registers of a thread

struct Product {
  uint64_t a, b;
  bool transposed, accumulate;
  int columns;
  bool operator==(const Product&) const = default;
};
using Group = std::vector<Product>;

struct Store {
  const CUtensorMap* map;
  uint32_t from;
  int inner, outer;
};

struct Fiber {
  int block, index;
  ucontext_t context;
  std::unique_ptr<char[]> stack;
  std::function<bool()> ready = {};
  bool done = false;
  bool fenced = false;  // since its registers were last its own
  bool dirty = false;   // has written shared memory, and no proxy fence since
  float* sums = nullptr;
  std::vector<float> owned = {};  // the sums, while products are in flight
  Group open = {};
  std::vector<Group> groups = {};
  int finished = 0;
  std::deque<Store> stores = {};
};

// Where threads wait for one another, all at the same instruction, and what lanes bring along.
struct Meeting {
  int size;
  int here = 0, times = 0;
  std::string what = {};
  uint32_t rows[32] = {}, held[32][4] = {};
};

struct Flight {
  const CUtensorMap* map;
  uint32_t to, barrier;  // of the block that it goes to
  int inner, outer;
};

struct Cluster {
  std::vector<Fiber> fibers;
  std::vector<isa::Memory> memory;
  std::vector<Meeting> warps, blocks;
  std::vector<int> spare;  // registers of each block that no thread has
  Meeting all;
  std::map<uint32_t, isa::Barrier> barriers = {};
  std::vector<Flight> flights = {};
  ucontext_t scheduler = {};
  // moods: what happens only when nothing else can, and the block that goes first
  bool late_copies = order() % 3 == 0, late_products = order() % 3 == 0;
  bool late_stores = order() % 3 > 0;
  size_t favourite = order() % 4;
};

inline Cluster* cluster;
inline Fiber* current;
inline std::function<void()> body;

inline void pause() { swapcontext(&current->context, &cluster->scheduler); }

inline void wait(std::function<bool()> ready) {
  if (order() % 8 && ready()) return;
  current->ready = std::move(ready);
  pause();
}

inline void meet(Meeting& meeting, const char* what, const std::function<void()>& last = [] {}) {
  expect(meeting.here == 0 || meeting.what == what, "threads meet at different instructions");
  meeting.what = what;
  const int times = meeting.times;
  if (++meeting.here == meeting.size) {
    last();
    meeting.here = 0, ++meeting.times;
  } else {
    wait([&meeting, times] { return meeting.times != times; });
  }
}

inline Meeting& warp() { return cluster->warps[(current->block * 384 + current->index) / 32]; }
inline isa::Barrier& barrier(uint32_t address) {
  bool running = false;
  for (int t = 0; t < 384; ++t) running |= !cluster->fibers[(address >> 24) * 384 + t].done;
  expect(running, "something is sent to a block that has ended");
  const auto found = cluster->barriers.find(address);
  expect(found != cluster->barriers.end(), "no barrier is at this address");
  return found->second;
}

inline void land(size_t f) {
  const Flight flight = cluster->flights[f];
  cluster->flights.erase(cluster->flights.begin() + static_cast<long>(f));
  const Box box = flight.map->box;
  isa::tma_load(cluster->memory[flight.to >> 24], flight.to, *flight.map->matrix, box.inner,
                box.outer, flight.inner, flight.outer);
  barrier(flight.barrier).transfer(-2 * box.inner * box.outer);
}

inline void read(Fiber& fiber) {
  const Store store = fiber.stores.front();
  fiber.stores.pop_front();
  isa::tma_store(*store.map->matrix, *store.map->writes, cluster->memory[store.from >> 24],
                 store.from, store.map->box.inner, store.map->box.outer, store.inner, store.outer);
}

// A warpgroup's next group of products, if all its threads have issued it.
inline bool can_multiply(const Fiber* group) {
  for (int t = 0; t < 128; ++t) {
    if (static_cast<int>(group[t].groups.size()) <= group[t].finished) return false;
  }
  return true;
}
inline void multiply(Fiber* group) {
  std::vector<float*> sums;
  const Group& products = group->groups[group->finished];
  for (int t = 0; t < 128; ++t) {
    expect(group[t].groups[group[t].finished] == products, "a warpgroup's threads disagree");
    sums.push_back(group[t].owned.data());
  }
  for (const Product& p : products) {
    isa::wgmma(cluster->memory[group->block], sums, p.columns, p.a, p.b, p.transposed,
               p.accumulate);
  }
  for (int t = 0; t < 128; ++t) {
    Fiber& fiber = group[t];
    if (++fiber.finished == static_cast<int>(fiber.groups.size()) && fiber.open.empty()) {
      std::memcpy(fiber.sums, fiber.owned.data(), fiber.owned.size() * sizeof(float));
    }
  }
}

inline void resume(Fiber& fiber) {
  current = &fiber;
  fiber.ready = nullptr;
  threadIdx.x = fiber.index;
  const unsigned size = cluster->memory.size();
  blockIdx.x = blockIdx.x / size * size + fiber.block;
  swapcontext(&cluster->scheduler, &fiber.context);
}

// One thing that the copy engine or the tensor cores might do now; of the late ones only if told.
inline bool act(bool late) {
  std::vector<std::function<void()>> choices;
  for (size_t f = 0; f < cluster->flights.size(); ++f) {
    if (late || !cluster->late_copies) choices.push_back([f] { land(f); });
  }
  for (size_t t = 0; t < cluster->fibers.size(); t += 128) {
    Fiber* fiber = &cluster->fibers[t];
    if ((late || !cluster->late_products) && can_multiply(fiber)) {
      choices.push_back([fiber] { multiply(fiber); });
    }
  }
  // stores last of all: nothing but their own thread ever waits for them
  for (size_t t = 0; t < cluster->fibers.size(); t += 32) {
    Fiber* fiber = &cluster->fibers[t];
    if (fiber->stores.empty() || (cluster->late_stores && !(late && choices.empty()))) continue;
    choices.push_back([fiber] { read(*fiber); });
  }
  if (choices.empty()) return false;
  choices[order() % choices.size()]();
  return true;
}

inline bool step() {
  if (order() % 16 == 0 && act(false)) return true;
  const size_t count = cluster->fibers.size(), from = order() % count;
  for (const bool favourites : {true, false}) {
    for (size_t i = 0; i < count; ++i) {
      Fiber& fiber = cluster->fibers[(from + i) % count];
      const bool favourite = static_cast<size_t>(fiber.block) == cluster->favourite;
      if (favourite != favourites || fiber.done || (fiber.ready && !fiber.ready())) continue;
      resume(fiber);
      return true;
    }
  }
  return act(true);
}

// Runs one cluster of a launch to its end.
inline void run(int size, int which, int clusters, std::function<void()> kernel) {
  Cluster here = {std::vector<Fiber>(size * 384),
                  std::vector<isa::Memory>(size),
                  std::vector<Meeting>(size * 12, Meeting{32}),
                  std::vector<Meeting>(size, Meeting{384}),
                  std::vector<int>(size),
                  Meeting{size * 384}};
  cluster = &here;
  body = std::move(kernel);
  blockIdx.x = which * size, gridDim.x = clusters * size;
  for (int t = 0; t < size * 384; ++t) {
    Fiber& fiber = here.fibers[t];
    fiber.block = t / 384, fiber.index = t % 384;
    fiber.stack = std::make_unique_for_overwrite<char[]>(kStack);
    std::memset(fiber.stack.get(), 0xff, kStack);  // floats among it are NaN
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.get();
    fiber.context.uc_stack.ss_size = kStack;
    fiber.context.uc_link = &here.scheduler;
    void (*const entry)() = [] {
      body();
      expect(current->stores.empty(), "a block ends while a store reads its shared memory");
      current->done = true;
    };
    makecontext(&fiber.context, entry, 0);
  }
  while (step()) {
  }
  for (const Fiber& fiber : here.fibers) expect(fiber.done, "a deadlock");
  for (const auto& [at, barrier] : here.barriers) {
    expect(barrier.pending == barrier.count && barrier.bytes == 0, "a barrier is left half way");
  }
}

}  // namespace sm

using sm::cluster;
using sm::current;

inline char dynamic[16];
inline uint32_t shared_address(const void*) { return current->block << 24 | 0x410; }
inline uint32_t cluster_rank() { return current->block; }

template <class Value>
Value __shfl_sync(unsigned, Value value, int) {
  return value;
}
inline void __syncwarp() { sm::meet(sm::warp(), "syncwarp"); }
inline void __syncthreads() { sm::meet(cluster->blocks[current->block], "syncthreads"); }
inline void cluster_sync() { sm::meet(cluster->all, "cluster"); }

inline void barrier_init(uint32_t at, uint32_t arrivals) {
  isa::expect(at % 8 == 0 && at >> 24 == static_cast<uint32_t>(current->block),
              "a barrier's place");
  isa::expect(cluster->barriers.emplace(at, arrivals).second, "a barrier is initialised twice");
}
inline void barrier_init_fence() {}
inline void barrier_expect(uint32_t at, uint32_t bytes) {
  sm::barrier(at).bytes += bytes;
  sm::barrier(at).arrive(1);
}
inline void barrier_arrive(uint32_t at, uint32_t rank) {
  sm::barrier((at & 0xffffff) | rank << 24).arrive(1);
}
inline void barrier_wait(uint32_t at, uint32_t parity) {
  sm::wait([&barrier = sm::barrier(at), parity] { return barrier.over(parity); });
}

inline void prefetch(const CUtensorMap&) {}
inline void tma_load(const CUtensorMap& map, uint32_t to, uint32_t barrier, int inner, int outer,
                     uint16_t blocks) {
  for (uint32_t rank = 0; rank < cluster->memory.size(); ++rank) {
    const auto there = [rank](uint32_t at) { return (at & 0xffffff) | rank << 24; };
    if (blocks >> rank & 1) {
      cluster->flights.push_back({&map, there(to), there(barrier), inner, outer});
    }
  }
}
inline void tma_load(const CUtensorMap& map, uint32_t to, uint32_t barrier, int inner, int outer) {
  tma_load(map, to, barrier, inner, outer, static_cast<uint16_t>(1 << (to >> 24)));
}
inline void tma_store(const CUtensorMap& map, uint32_t from, int inner, int outer) {
  const sm::Fiber* lanes = current - current->index % 32;
  isa::expect(lanes == current, "stores are looked for in lane 0");
  for (int lane = 0; lane < 32; ++lane) isa::expect(!lanes[lane].dirty, "no fence before a store");
  current->stores.push_back({&map, from, inner, outer});
}
template <int left>
void tma_store_wait() {
  sm::wait([fiber = current] { return fiber->stores.size() <= left; });
}
inline void proxy_fence() { current->dirty = false; }

inline void mma_fence() { current->fenced = true; }
template <class, bool transposed, size_t count>
void mma(float (&sums)[count], uint64_t a, uint64_t b, int accumulate) {
  isa::expect(current->fenced, "no fence before a product");
  if (current->open.empty() && current->finished == static_cast<int>(current->groups.size())) {
    current->sums = sums;
    current->owned.assign(sums, sums + count);
    std::memset(sums, 0xff, sizeof sums);
  }
  isa::expect(current->sums == sums, "two accumulators in flight");
  current->open.push_back({a, b, transposed, accumulate != 0, static_cast<int>(count) * 2});
}
inline void mma_commit() {
  current->groups.push_back(std::move(current->open));
  current->open.clear();
  current->fenced = false;
}
template <int left>
void mma_wait() {
  sm::wait([fiber = current] {
    return static_cast<int>(fiber->groups.size()) - fiber->finished <= left;
  });
}

// Elements here are integers.
template <class>
uint32_t pack(float first, float second) {
  for (const float value : {first, second}) {
    isa::expect(value > -30000 && value < 30000, "a sum is missing, read early or out of range");
  }
  return static_cast<uint16_t>(static_cast<int>(first)) |
         static_cast<uint32_t>(static_cast<int>(second)) << 16;
}
template <class>
float2 unpack(uint32_t bits) {
  return {static_cast<float>(static_cast<int16_t>(bits)),
          static_cast<float>(static_cast<int16_t>(bits >> 16))};
}
inline void stmatrix(uint32_t row, const uint32_t (&m)[4]) {
  current->dirty = true;
  sm::Meeting& warp = sm::warp();
  warp.rows[current->index % 32] = row;
  std::memcpy(warp.held[current->index % 32], m, sizeof m);
  sm::meet(warp, "stmatrix",
           [&] { isa::stmatrix(cluster->memory[current->block], warp.rows, warp.held); });
}

template <int registers>
void fewer_registers() {
  cluster->spare[current->block] += sm::kLaunched - registers;
}
template <int registers>
void more_registers() {
  int& spare = cluster->spare[current->block];
  sm::wait([&spare] { return spare >= registers - sm::kLaunched; });
  spare -= registers - sm::kLaunched;
}

}  // namespace floe::two_source
