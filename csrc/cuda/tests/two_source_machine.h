// A cluster without data: barriers, copies in flight and products in flight, small enough to be
// copied at every step. The schedule's own loops give each thread its program, recorded once, since
// what they do does not depend on data. A consumer here is a warpgroup.
#pragma once

#include <vector>

#include "cuda/tests/two_source_isa.h"
#include "cuda/two_source_schedule.h"

namespace floe::two_source {

using isa::Barrier;
using isa::expect;

enum class Kind { kWait, kExpect, kLoad, kMultiply, kSettle, kRelease };

struct Op {
  Kind kind;
  int stage, step;  // step: of all that this block does
  uint32_t parity = 0;
  int value = 0;        // kExpect, kLoad: bytes; kSettle: products left
  bool to_all = false;  // kLoad: into every block
};
using Program = std::vector<Op>;

template <class Tile, Major first>
struct ProducerRecorder {
  int block, step = -1;
  Program ops = {};

  int rank() const { return block; }
  void wait_empty(int stage, uint32_t parity) {
    ops.push_back({Kind::kWait, stage, ++step, parity});
  }
  void expect(int stage, int bytes) { ops.push_back({Kind::kExpect, stage, step, 0, bytes}); }
  void load(int stage, Box box, bool to_all) {
    ops.push_back({Kind::kLoad, stage, step, 0, box.inner * box.outer * 2, to_all});
  }
  void load_a(int stage, int, int, int, int) { load(stage, box_a<Tile>(), false); }
  void load_b(int stage, int, int source, int, int) {
    load(stage, box_b<Tile>(source == 0 ? first : Major::kColumn), true);
  }
};

struct ConsumerRecorder {
  int block, step = -1;
  Program ops = {};

  int rank() const { return block; }
  void wait_full(int stage, uint32_t parity) {
    ops.push_back({Kind::kWait, stage, ++step, parity});
  }
  template <Major major, int blocks>
  void multiply(int stage, bool) {
    ops.push_back({Kind::kMultiply, stage, step});
  }
  template <int left>
  void settle() {
    ops.push_back({Kind::kSettle, 0, step, 0, left});
  }
  void release(int stage) { ops.push_back({Kind::kRelease, stage, step}); }
  void store(Origin) {}
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
        if (!op.to_all && to != block) continue;
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
    landed[flight.block][flight.op->step] += flight.op->value;
    full[at(flight.block, flight.op->stage)].transfer(-flight.op->value);
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
