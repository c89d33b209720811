// What the tests of csrc/cuda on the CPU share: expectations, draws, memory that ends where it
// ends.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <limits>
#include <memory>
#include <random>
#include <vector>

#include "cuda/device.cuh"

namespace floe::cuda {

inline int failures = 0;

#define FLOE_EXPECT(condition, ...)                               \
  do {                                                            \
    if (!(condition) && ++failures <= 20) {                       \
      std::printf("%s:%d: %s: ", __FILE__, __LINE__, #condition); \
      std::printf(__VA_ARGS__);                                   \
      std::printf("\n");                                          \
    }                                                             \
  } while (0)

// Fails for NaN too.
inline void expect_close(const char* what, int64_t at, double got, double expected, double error) {
  FLOE_EXPECT(std::abs(got - expected) <= error, "%s[%lld]: got %g, expected %g, allowed %g", what,
              static_cast<long long>(at), got, expected, error);
}

constexpr double kRounding = 0x1p-24;  // of float32

// On the heap and 16-byte aligned, so that a read past the end is AddressSanitizer's to see;
// uninitialised elements are NaN.
template <typename scalar_t>
struct Buffer {
  int64_t size;
  std::unique_ptr<scalar_t[]> data;

  explicit Buffer(int64_t size) : size(size), data(new scalar_t[size]) {
    std::memset(static_cast<void*>(data.get()), 0xff, size * sizeof(scalar_t));
  }
  scalar_t* get() const { return data.get(); }
  scalar_t& operator[](int64_t i) const { return data[i]; }
};

template <typename scalar_t>
void fill_uniform(const Buffer<scalar_t>& buffer, std::mt19937& random) {
  std::uniform_real_distribution<float> uniform(-1, 1);
  for (int64_t i = 0; i < buffer.size; ++i) buffer[i] = narrow<scalar_t>(uniform(random));
}

inline std::vector<int64_t> offsets_of(const std::vector<int64_t>& lengths, int64_t first = 0) {
  std::vector<int64_t> offsets = {first};
  for (const int64_t length : lengths) offsets.push_back(offsets.back() + length);
  return offsets;
}

}  // namespace floe::cuda
