// A cluster of blocks that runs the schedule's own loops: barriers as the PTX ISA's "mbarrier" has
// them, copies that land and products that run whenever they like, and any thread next.
//
// The loops' control flow does not depend on data, so each thread's calls are recorded once, as a
// program, and then interleaved at will. A consumer here is a warpgroup.
#pragma once

#include <cstdio>
#include <cstdlib>
#include <deque>
#include <vector>

#include "cuda/two_source_schedule.h"

namespace floe::two_source {

[[noreturn]] inline void fail(const char* what) {
  std::printf("%s\n", what);
  std::exit(1);
}
inline void expect(bool holds, const char* what) {
  if (!holds) fail(what);
}

enum class Kind { kWait, kExpect, kLoad, kMultiply, kSettle, kRelease, kStore };

struct Op {
  Kind kind;
  int stage;
  int step;             // of all the steps this block does
  uint32_t parity = 0;  // kWait
  int value = 0;        // kExpect: bytes; kSettle: products left; kMultiply: blocks
  bool b = false;       // kLoad: of B; kMultiply: accumulate
  int offset = 0, source = 0, inner = 0, outer = 0, bytes = 0;
  Major major = Major::kDepth;
  Origin at = {};
};
using Program = std::vector<Op>;

template <class Tile, Major first>
struct ProducerRecorder {
  int block, step = -1;
  Program ops = {};

  int rank() const { return block; }
  void wait_empty(int stage, uint32_t parity) {
    ops.push_back({.kind = Kind::kWait, .stage = stage, .step = ++step, .parity = parity});
  }
  void expect(int stage, int bytes) {
    ops.push_back({.kind = Kind::kExpect, .stage = stage, .step = step, .value = bytes});
  }
  void load(int stage, int offset, int source, int inner, int outer, bool b, Major major, Box box) {
    ops.push_back({.kind = Kind::kLoad,
                   .stage = stage,
                   .step = step,
                   .b = b,
                   .offset = offset,
                   .source = source,
                   .inner = inner,
                   .outer = outer,
                   .bytes = box.inner * box.outer * 2,
                   .major = major});
  }
  void load_a(int stage, int offset, int source, int inner, int outer) {
    load(stage, offset, source, inner, outer, false, Major::kDepth, box_a<Tile>());
  }
  void load_b(int stage, int offset, int source, int inner, int outer) {
    const Major major = source == 0 ? first : Major::kColumn;
    load(stage, offset, source, inner, outer, true, major, box_b<Tile>(major));
  }
};

struct ConsumerRecorder {
  int block, step = -1;
  Program ops = {};

  int rank() const { return block; }
  void wait_full(int stage, uint32_t parity) {
    ops.push_back({.kind = Kind::kWait, .stage = stage, .step = ++step, .parity = parity});
  }
  template <Major major, int blocks>
  void multiply(int stage, bool accumulate) {
    ops.push_back({.kind = Kind::kMultiply,
                   .stage = stage,
                   .step = step,
                   .value = blocks,
                   .b = accumulate,
                   .major = major});
  }
  template <int left>
  void settle() {
    ops.push_back({.kind = Kind::kSettle, .stage = 0, .step = step, .value = left});
  }
  void release(int stage) { ops.push_back({.kind = Kind::kRelease, .stage = stage, .step = step}); }
  void store(Origin at) {
    ops.push_back({.kind = Kind::kStore, .stage = 0, .step = step, .at = at});
  }
};

// Thread t of a block: the producer is 0, the consumers 1 and 2.
constexpr int kActors = 1 + kConsumers;

template <class Tile, Major first>
std::vector<Program> record(const Problem& problem, int cluster, int clusters) {
  std::vector<Program> programs;
  const Walk<Tile> walk(problem, cluster, clusters);
  for (int block = 0; block < Tile::kCluster; ++block) {
    ProducerRecorder<Tile, first> producer{block};
    produce<Tile, first>(problem, walk, producer);
    programs.push_back(producer.ops);
    for (int c = 0; c < kConsumers; ++c) {
      ConsumerRecorder consumer{block};
      consume<Tile, first>(problem, walk, consumer);
      programs.push_back(consumer.ops);
    }
  }
  return programs;
}

struct Barrier {
  int count, pending, phase = 0;
  long bytes = 0;

  explicit Barrier(int count) : count(count), pending(count) {}
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

// A copy on its way into one block.
struct Flight {
  const Op* op;
  int block;
};

template <class Tile>
struct Machine {
  const std::vector<Program>* programs;
  std::vector<int> next;                        // of each thread
  std::vector<std::vector<const Op*>> running;  // of each thread: products not yet over
  std::vector<int> read;                        // of each thread: steps whose products are over
  std::vector<Flight> flights;
  std::vector<std::vector<long>> landed;  // of each block: bytes a step
  std::vector<Barrier> full, empty;       // of each block and stage

  explicit Machine(const std::vector<Program>& programs)
      : programs(&programs),
        next(programs.size()),
        running(programs.size()),
        read(programs.size()),
        landed(Tile::kCluster, std::vector<long>(programs[0].size())),
        full(Tile::kCluster * Tile::kStages, Barrier(1)),
        empty(Tile::kCluster * Tile::kStages, Barrier(Tile::kEmptyArrivals)) {}

  int threads() const { return static_cast<int>(programs->size()); }
  bool done(int t) const { return next[t] == static_cast<int>((*programs)[t].size()); }
  Kind upcoming(int t) const { return (*programs)[t][next[t]].kind; }
  static int at(int block, int stage) { return block * Tile::kStages + stage; }

  bool ready(int t) const {
    if (done(t)) return false;
    const Op& op = (*programs)[t][next[t]];
    if (op.kind == Kind::kSettle) return static_cast<int>(running[t].size()) <= op.value;
    if (op.kind != Kind::kWait) return true;
    const auto& barriers = t % kActors == 0 ? empty : full;
    return barriers[at(t / kActors, op.stage)].over(op.parity);
  }

  // Does what thread t, which is ready, does next.
  const Op& advance(int t) {
    const Op& op = (*programs)[t][next[t]++];
    const int block = t / kActors;
    if (op.kind == Kind::kExpect) {
      Barrier& barrier = full[at(block, op.stage)];
      barrier.bytes += op.value;
      barrier.arrive(1);
    } else if (op.kind == Kind::kLoad) {
      for (int to = 0; to < Tile::kCluster; ++to) {
        if (!op.b && to != block) continue;
        for (int c = 1; c < kActors; ++c) {
          expect(read[to * kActors + c] > op.step - Tile::kStages,
                 "a copy starts into a stage that is still to be read");
        }
        flights.push_back({&op, to});
      }
    } else if (op.kind == Kind::kMultiply) {
      expect(landed[block][op.step] == Tile::kStageBytes, "a product starts on half a stage");
      running[t].push_back(&op);
    } else if (op.kind == Kind::kRelease) {
      for (int to = 0; to < Tile::kCluster; ++to) {
        empty[at(to, op.stage)].arrive(kConsumerWarps / kConsumers);
      }
    }
    return op;
  }

  Flight land(int f) {
    const Flight flight = flights[f];
    flights.erase(flights.begin() + f);
    landed[flight.block][flight.op->step] += flight.op->bytes;
    full[at(flight.block, flight.op->stage)].transfer(-flight.op->bytes);
    return flight;
  }

  // Ends the oldest product of consumer t: only now has it read its operands.
  const Op& finish(int t) {
    const Op& op = *running[t].front();
    running[t].erase(running[t].begin());
    expect(read[t]++ == op.step, "a consumer skipped a step");
    return op;
  }

  bool over() const {
    for (int t = 0; t < threads(); ++t) {
      if (!done(t)) return false;
    }
    return true;
  }
};

}  // namespace floe::two_source
