// The steps of moe_lora_kernels.h for AVX-512 with BF16.
#if defined(__x86_64__) && defined(__GNUC__)

// Before the pragma, so that what they define outside our namespace stays for every CPU.
#include <immintrin.h>

#include <bit>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "cpu/moe_lora_kernels.h"

#define FLOE_BF16

#if defined(__clang__)
#pragma clang attribute push(                                                               \
    __attribute__((target("avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512bf16"))), \
    apply_to = function)
#else
#pragma GCC target("avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")
#endif

#include "cpu/moe_lora_steps.h"
#include "cpu/vec_avx512.h"

namespace floe::cpu {

const Kernels* tables::avx512_bf16(Dtype x) {
  static constexpr Kernels kBFloat16 = Steps<Avx512Bf16, BFloat16>::table(Dtype::kBFloat16);
  return x == Dtype::kBFloat16 ? &kBFloat16 : nullptr;
}

}  // namespace floe::cpu

#if defined(__clang__)
#pragma clang attribute pop
#endif

#endif
