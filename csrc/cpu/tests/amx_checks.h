// What the programs on emulated tiles share: numbers, and comparing within a derived bound.
//
// A sum of float32 whose terms each pass at most n roundings is off by at most n u times the sum of
// their magnitudes, u = 2^-24 (Higham, Accuracy and Stability of Numerical Algorithms, 4.2, and a
// little, n^2 u^2, on top). Every tolerance below is that.
#pragma once

#include <random>
#include <vector>

#include "cpu/element.h"
#include "cpu/tests/amx_emulation.h"
#include "cpu/tests/checks.h"

namespace floe::cpu {
namespace {

using amx_emulation::registers;
constexpr double kRounding = 0x1p-24 * 1.001;

void expect(bool holds, const char* what) {
  if (holds) return;
  if (++failures < 20) std::printf("%s\n", what);
}

void expect_within(const char* what, double got, double expected, double bound) {
  if (std::abs(got - expected) <= bound) return;  // false for NaN
  if (++failures < 20) {
    std::printf("%s: got %.9g, expected %.9g within %g\n", what, got, expected, bound);
  }
}

std::vector<BFloat16> draw(int64_t size, std::mt19937& random) {
  std::uniform_real_distribution<float> uniform(-1, 1);
  std::vector<BFloat16> out(size);
  for (BFloat16& value : out) value = narrow<BFloat16>(uniform(random));
  return out;
}

}  // namespace
}  // namespace floe::cpu
