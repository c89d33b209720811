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

#include "cpu/moe_lora_steps.h"
#include "cpu/tile_amx_avx512.h"

namespace floe::cpu {
namespace {

// The steps with tiles; grouped dot products, gather_dots, are those of AVX-512.
struct MoELoRAAmx {
  using Steps = floe::cpu::Steps<AmxBf16, BFloat16>;

  static void shrink(const Shrink& s) {
    const TileScope scope;
    Steps::shrink(s);
  }

  static void expand(const Expand& e) {
    const TileScope scope;
    Steps::expand(e);
  }

  static void weight_grad(const RowsOf& rows, int64_t first, int64_t last, const WeightGrad* grads,
                          int64_t count, void* scratch) {
    const TileScope scope;
    Steps::weight_grad(rows, first, last, grads, count, scratch);
  }

  static void gather_expand(const GatherExpand& g, int64_t first, int64_t last, void* scratch) {
    const TileScope scope;
    Steps::gather_expand(g, first, last, scratch);
  }

  static constexpr Kernels table() {
    Kernels table = Steps::table(Dtype::kBFloat16);
    table.shrink = &shrink, table.expand = &expand;
    table.weight_grad = &weight_grad, table.gather_expand = &gather_expand;
    return table;
  }
};

}  // namespace

const Kernels* tables::amx(Dtype x) {
  static constexpr Kernels kBFloat16 = MoELoRAAmx::table();
  return x == Dtype::kBFloat16 ? &kBFloat16 : nullptr;
}

}  // namespace floe::cpu

#if defined(__clang__)
#pragma clang attribute pop
#endif

#endif
