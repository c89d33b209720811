// The steps of moe_lora_kernels.h for AVX-512.
#if defined(__x86_64__) && defined(__GNUC__)

// Before the pragma, so that what they define outside our namespace stays for every CPU.
#include <immintrin.h>

#include <bit>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "cpu/moe_lora_kernels.h"

#if defined(__clang__)
#pragma clang attribute push(                                                    \
    __attribute__((target("avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl"))), \
    apply_to = function)
#else
#pragma GCC target("avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl")
#endif

#include "cpu/moe_lora_steps.h"
#include "cpu/vec_avx512.h"

namespace floe::cpu {

const Kernels* tables::avx512(Dtype x) {
  static constexpr Kernels kFloat32 = Steps<Avx512, float>::table(Dtype::kFloat32);
  static constexpr Kernels kBFloat16 = Steps<Avx512, BFloat16>::table(Dtype::kFloat32);
  static constexpr Kernels kFloat16 = Steps<Avx512, Float16>::table(Dtype::kFloat32);
  switch (x) {
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
