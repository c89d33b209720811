// Every interleaving of producers, consumers, copies and products, for rings and problems small
// enough to try them all: none deadlocks, none overwrites what is still to be read, none reads what
// has not landed. A state that was met before is not entered again.
//
// For pairs of blocks and for deep rings that is too much. There a thread that got past a wait goes
// on at once to the next: what it does in between only ever allows more to the others, so a fault
// that some later time brings about is met at this one too. When copies land and products end stays
// free.
#include <string>
#include <unordered_set>

#include "cuda/tests/two_source_machine.h"

namespace floe::two_source {
namespace {

template <class Tile>
std::string key(const Machine<Tile>& machine) {
  std::string bytes;
  for (int t = 0; t < machine.threads(); ++t) {
    bytes += static_cast<char>(machine.next[t]);
    bytes += static_cast<char>(machine.running[t].size());
  }
  // what has been sent follows from `next`, so what is in flight stands for what has landed; the
  // copies of one step into one block are alike but for their size
  std::vector<int> sums(machine.landed[0].size() * Tile::kCluster);
  for (const Flight& f : machine.flights) {
    sums[f.op->step * Tile::kCluster + f.block] += f.op->value / 4096;
  }
  for (const int sum : sums) bytes += static_cast<char>(sum);
  return bytes;
}

template <class Tile, Major first>
void explore(const Problem& problem, int clusters, bool at_once) {
  size_t states = 0, steps = 0;
  for (int cluster = 0; cluster < clusters; ++cluster) {
    const auto programs = record<Tile, first>(problem, cluster, clusters);
    std::unordered_set<std::string> met;
    std::vector<Machine<Tile>> open = {Machine<Tile>(programs)};
    const auto visit = [&](Machine<Tile> after) {
      if (met.insert(key(after)).second) open.push_back(std::move(after));
    };
    for (const Program& program : programs) expect(program.size() < 128, "too long for a key");
    bool ended = false;
    while (!open.empty()) {
      const Machine<Tile> now = std::move(open.back());
      open.pop_back();
      bool moved = false;
      for (int t = 0; t < now.threads(); ++t) {
        if (now.ready(t)) {
          Machine<Tile> after = now;
          do {
            after.advance(t);
          } while (at_once && after.ready(t) && after.upcoming(t) != Kind::kWait);
          visit(std::move(after)), moved = true;
        }
        if (!now.running[t].empty()) {
          Machine<Tile> after = now;
          after.finish(t);
          visit(std::move(after)), moved = true;
        }
      }
      for (size_t f = 0; f < now.flights.size(); ++f) {
        Machine<Tile> after = now;
        after.land(static_cast<int>(f));
        visit(std::move(after)), moved = true;
      }
      if (!moved) expect(now.over(), "a deadlock"), ended = true;
    }
    expect(ended, "no interleaving comes to an end");
    states += met.size();
    for (const Op& op : programs[0]) steps += op.kind == Kind::kExpect;
  }
  std::printf("%d columns, %d stages, cluster of %d, %zu steps: %zu states\n", Tile::kColumns,
              Tile::kStages, Tile::kCluster, steps, states);
}

}  // namespace
}  // namespace floe::two_source

int main() {
  using namespace floe::two_source;
  using One = Tile<128, 2, 1>;
  using Three = Tile<128, 3, 1>;
  using Pair = Tile<128, 2, 2>;
  constexpr Major kDeep = Major::kDepth, kFlat = Major::kColumn;
  explore<One, kDeep>({100, 100, 1, {64}}, 1, false);
  explore<One, kDeep>({100, 100, 1, {64}}, 3, false);  // two clusters have nothing to do
  explore<One, kDeep>({300, 100, 2, {100, 5}}, 1, false);
  explore<One, kFlat>({300, 200, 3, {70, 64, 8}}, 2, false);
  explore<Three, kDeep>({300, 200, 2, {100, 16}}, 1, false);
  explore<Narrow, kDeep>({100, 250, 2, {320, 65}}, 1, true);
  explore<Pair, kDeep>({100, 100, 1, {64}}, 1, false);
  explore<Pair, kDeep>({300, 100, 2, {128, 8}}, 1, true);
  explore<Pair, kFlat>({300, 100, 2, {64, 8}}, 1, true);
  std::printf("no failures\n");
}
