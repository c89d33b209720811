// What the programs here share: comparing, and work spread over threads for -fsanitize=thread.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <thread>
#include <vector>

namespace floe::cpu {
namespace {

int failures = 0;

void expect_close(const char* what, double got, double expected, double tolerance) {
  if (std::abs(got - expected) <= tolerance * (1 + std::abs(expected))) return;
  if (++failures < 20) std::printf("%s: got %g, expected %g\n", what, got, expected);
}

// Calls f(begin, end) for parts of 0..size, each on a thread of its own.
template <typename F>
void on_threads(int64_t size, const F& f) {
  constexpr int64_t kThreads = 4;
  std::vector<std::thread> threads;
  for (int64_t i = 0; i < kThreads; ++i) {
    threads.emplace_back([&, i] { f(size * i / kThreads, size * (i + 1) / kThreads); });
  }
  for (std::thread& thread : threads) thread.join();
}

}  // namespace
}  // namespace floe::cpu
