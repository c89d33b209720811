// The steps of moe_lora_kernels.h for AMX.
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
#pragma clang attribute push(                                                 \
    __attribute__((target("avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl," \
                          "avx512bf16,amx-tile,amx-bf16"))),                  \
    apply_to = function)
#else
#pragma GCC target("avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,amx-tile,amx-bf16")
#endif

#include "cpu/moe_lora_amx.h"
#include "cpu/tile_amx_avx512.h"

namespace floe::cpu {
const Kernels* tables::amx(Dtype x) {
  static constexpr Kernels kBFloat16 = MoELoRAAmx<AmxBf16>::table();
  return x == Dtype::kBFloat16 ? &kBFloat16 : nullptr;
}

}  // namespace floe::cpu

#if defined(__clang__)
#pragma clang attribute pop
#endif

#endif
