// wgmma: a warpgroup's 64 rows by `columns` columns, 16 deep, 16-bit operands from shared memory
// and float32 sums in registers; and the way of the sums back, stmatrix. For sm_90a.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <cstring>
#include <type_traits>

namespace floe::two_source {

__device__ __forceinline__ void mma_fence() {
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}
__device__ __forceinline__ void mma_commit() {
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}
template <int left>
__device__ __forceinline__ void mma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(left) : "memory");
}

#define FLOE_TEN(t) \
  "%" t "0,%" t "1,%" t "2,%" t "3,%" t "4,%" t "5,%" t "6,%" t "7,%" t "8,%" t "9,"
#define FLOE_SIXTY \
  FLOE_TEN("") FLOE_TEN("1") FLOE_TEN("2") FLOE_TEN("3") FLOE_TEN("4") FLOE_TEN("5")
#define FLOE_NAMES_64 FLOE_SIXTY "%60,%61,%62,%63"
#define FLOE_NAMES_128                                                              \
  FLOE_SIXTY FLOE_TEN("6") FLOE_TEN("7") FLOE_TEN("8") FLOE_TEN("9") FLOE_TEN("10") \
      FLOE_TEN("11") "%120,%121,%122,%123,%124,%125,%126,%127"
#define FLOE_SUMS_8(i)                                                                        \
  "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]), \
      "+f"(d[i + 6]), "+f"(d[i + 7])
#define FLOE_SUMS_32(i) FLOE_SUMS_8(i), FLOE_SUMS_8(i + 8), FLOE_SUMS_8(i + 16), FLOE_SUMS_8(i + 24)
#define FLOE_SUMS_64 FLOE_SUMS_32(0), FLOE_SUMS_32(32)
#define FLOE_SUMS_128 FLOE_SUMS_64, FLOE_SUMS_32(64), FLOE_SUMS_32(96)

// a, b, scale_d, transpose_b: the operands after the sums. A is never transposed, nothing negated.
#define FLOE_WGMMA(columns, type, sums, a, b, s, t)                                 \
  asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %" s                               \
               ", 0;\n"                                                             \
               "wgmma.mma_async.sync.aligned.m64n" columns "k16.f32." type "." type \
               " {" FLOE_NAMES_##sums "}, %" a ", %" b ", p, 1, 1, 0, %" t ";\n}"   \
               : FLOE_SUMS_##sums                                                   \
               : "l"(desc_a), "l"(desc_b), "r"(accumulate), "n"(transposed))

// d = A B, or d += A B to accumulate; transposed: B has adjacent columns.
template <class scalar_t, bool transposed>
__device__ __forceinline__ void mma(float (&d)[128], uint64_t desc_a, uint64_t desc_b,
                                    int accumulate) {
  if constexpr (std::is_same_v<scalar_t, __half>) {
    FLOE_WGMMA("256", "f16", 128, "128", "129", "130", "131");
  } else {
    FLOE_WGMMA("256", "bf16", 128, "128", "129", "130", "131");
  }
}

template <class scalar_t, bool transposed>
__device__ __forceinline__ void mma(float (&d)[64], uint64_t desc_a, uint64_t desc_b,
                                    int accumulate) {
  if constexpr (std::is_same_v<scalar_t, __half>) {
    FLOE_WGMMA("128", "f16", 64, "64", "65", "66", "67");
  } else {
    FLOE_WGMMA("128", "bf16", 64, "64", "65", "66", "67");
  }
}

#undef FLOE_TEN
#undef FLOE_SIXTY
#undef FLOE_NAMES_64
#undef FLOE_NAMES_128
#undef FLOE_SUMS_8
#undef FLOE_SUMS_32
#undef FLOE_SUMS_64
#undef FLOE_SUMS_128
#undef FLOE_WGMMA

// Two neighbours, rounded to the output's type, the first in the lower half.
template <class scalar_t>
__device__ __forceinline__ uint32_t pack(float first, float second) {
  uint32_t bits;
  if constexpr (std::is_same_v<scalar_t, __half>) {
    const __half2 both = __floats2half2_rn(first, second);
    memcpy(&bits, &both, 4);
  } else {
    const __nv_bfloat162 both = __floats2bfloat162_rn(first, second);
    memcpy(&bits, &both, 4);
  }
  return bits;
}

template <class scalar_t>
__device__ __forceinline__ float2 unpack(uint32_t bits) {
  if constexpr (std::is_same_v<scalar_t, __half>) {
    __half2 both;
    memcpy(&both, &bits, 4);
    return __half22float2(both);
  } else {
    __nv_bfloat162 both;
    memcpy(&both, &bits, 4);
    return __bfloat1622float2(both);
  }
}

// Four 8 x 8 matrices of 16-bit elements; lane 8 i + r gives the address of row r of the i-th.
__device__ __forceinline__ void stmatrix(uint32_t row, const uint32_t (&m)[4]) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(row),
               "r"(m[0]), "r"(m[1]), "r"(m[2]), "r"(m[3])
               : "memory");
}

template <int registers>
__device__ __forceinline__ void fewer_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(registers));
}
template <int registers>
__device__ __forceinline__ void more_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(registers));
}

}  // namespace floe::two_source
