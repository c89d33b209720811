// Work spread over threads, for a build with -fsanitize=thread.
#pragma once

#include <cstdint>
#include <thread>
#include <vector>

namespace floe::cpu {
namespace {

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
