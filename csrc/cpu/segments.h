// Tokens sorted by the experts that keep them. No torch here.
//
// Dims: T tokens, E experts, K kept per token, S slots: the pairs of a token and an expert it
// keeps.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

namespace floe::cpu {

struct Slots {
  std::vector<int64_t> first;   // (E + 1,) the first slot of every expert
  std::vector<int64_t> token;   // (S,) ascending within an expert
  std::vector<int64_t> choice;  // (S,) which of the token's K it is

  int64_t size() const { return static_cast<int64_t>(token.size()); }
  int64_t count(int64_t e) const { return first[e + 1] - first[e]; }

  // The first slot of expert e whose token is not before t.
  int64_t find(int64_t e, int64_t t) const {
    const auto begin = token.begin() + first[e], end = token.begin() + first[e + 1];
    return std::lower_bound(begin, end, t) - token.begin();
  }
};

// A stable counting sort of experts (T, K); masked tokens have no slot.
inline Slots sort_by_expert(const int64_t* experts, int64_t T, int64_t K, int64_t E,
                            const bool* mask) {
  Slots slots;
  slots.first.assign(E + 1, 0);
  for (int64_t i = 0; i < T * K; ++i) {
    if (!mask || mask[i / K]) ++slots.first[experts[i] + 1];
  }
  for (int64_t e = 0; e < E; ++e) slots.first[e + 1] += slots.first[e];
  slots.token.resize(slots.first[E]);
  slots.choice.resize(slots.first[E]);
  std::vector<int64_t> next(slots.first.begin(), slots.first.end() - 1);
  for (int64_t i = 0; i < T * K; ++i) {
    if (mask && !mask[i / K]) continue;
    const int64_t s = next[experts[i]]++;
    slots.token[s] = i / K;
    slots.choice[s] = i % K;
  }
  return slots;
}

// Some slots of one expert, enough for a task.
struct Run {
  int64_t expert, begin, end;
};

inline std::vector<Run> cut(const Slots& slots, int64_t E, int64_t most) {
  std::vector<Run> runs;
  for (int64_t e = 0; e < E; ++e) {
    for (int64_t s = slots.first[e]; s < slots.first[e + 1]; s += most) {
      runs.push_back({e, s, std::min(s + most, slots.first[e + 1])});
    }
  }
  return runs;
}

}  // namespace floe::cpu
