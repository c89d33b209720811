// The step of grad_square_kernels.h for AVX2, FMA and F16C.
#if defined(__x86_64__) && defined(__GNUC__)

// Before the pragma, so that what they define outside our namespace stays for every CPU.
#include <immintrin.h>

#include <bit>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "cpu/grad_square_kernels.h"

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC target("avx2,fma,f16c")
#endif

#include "cpu/grad_square_steps.h"
#include "cpu/vec_avx2.h"

namespace floe::cpu {

const GradSquareKernels* grad_square_tables::avx2(Dtype dtype) {
  static constexpr auto kFloat32 = GradSquareSteps<Avx2, float>::table();
  static constexpr auto kBFloat16 = GradSquareSteps<Avx2, BFloat16>::table();
  static constexpr auto kFloat16 = GradSquareSteps<Avx2, Float16>::table();
  switch (dtype) {
    case Dtype::kFloat32:
      return &kFloat32;
    case Dtype::kBFloat16:
      return &kBFloat16;
    case Dtype::kFloat16:
      return &kFloat16;
    default:
      return nullptr;
  }
}

}  // namespace floe::cpu

#if defined(__clang__)
#pragma clang attribute pop
#endif

#endif
