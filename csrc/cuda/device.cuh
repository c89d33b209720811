// What the kernels use of a GPU: types, copies to shared memory, products and exchanges of a warp.
// Compiled for the CPU it is tests/emulation.h, which runs the same kernels there.
#pragma once

#include "cuda/host_device.h"

#ifdef __CUDACC__

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <type_traits>

#define FLOE_DEVICE __device__ __forceinline__
#define FLOE_DYNAMIC_SHARED(name) extern __shared__ __align__(16) char name[]

namespace floe::cuda {

using BFloat16 = __nv_bfloat16;
using Float16 = __half;

FLOE_DEVICE float widen(float value) { return value; }
FLOE_DEVICE double widen(double value) { return value; }
FLOE_DEVICE float widen(BFloat16 value) { return __bfloat162float(value); }
FLOE_DEVICE float widen(Float16 value) { return __half2float(value); }

template <typename scalar_t, typename wide_t>
FLOE_DEVICE scalar_t narrow(wide_t value) {
  if constexpr (std::is_same_v<scalar_t, BFloat16>) {
    return __float2bfloat16_rn(value);
  } else if constexpr (std::is_same_v<scalar_t, Float16>) {
    return __float2half_rn(value);
  } else {
    return static_cast<scalar_t>(value);
  }
}

// A place in shared memory, in half the registers of a pointer.
using Shared = uint32_t;

FLOE_DEVICE Shared shared_address(const char* pointer) {
  return static_cast<Shared>(__cvta_generic_to_shared(pointer));
}

// Starts a copy of 16 bytes to shared memory, of which only the first `bytes` are read; zeros
// follow. Both addresses are multiples of 16.
FLOE_DEVICE void copy_async(Shared shared, const void* global, int bytes) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared), "l"(global),
               "r"(bytes)
               : "memory");
}

FLOE_DEVICE void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Waits until at most kPending of the thread's committed groups are on their way.
template <int kPending>
FLOE_DEVICE void wait_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

// Four 8x8 matrices of 16-bit elements; lane l names row l % 8 of matrix l / 8, 16 bytes long.
// Transposed, a lane gets of each matrix the elements (2 (l % 4), l / 4) and (2 (l % 4) + 1, l /
// 4); as stored, (l / 4, 2 (l % 4)) and (l / 4, 2 (l % 4) + 1).
FLOE_DEVICE void load_matrices_transposed(uint32_t (&out)[4], Shared row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3])
               : "r"(row)
               : "memory");
}

FLOE_DEVICE void load_matrices(uint32_t (&out)[4], Shared row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3])
               : "r"(row)
               : "memory");
}

// c += a b for one 16x16 times 16x8 product, in the fragments of mma.m16n8k16.
template <typename scalar_t>
FLOE_DEVICE void multiply_add(float* c, const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  if constexpr (std::is_same_v<scalar_t, BFloat16>) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  } else {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  }
}

// The same value, which the compiler may not compute ahead of a loop: for rare branches in it.
FLOE_DEVICE int here(int value) {
  asm volatile("" : "+r"(value));
  return value;
}

constexpr unsigned kAllLanes = 0xffffffff;

template <typename value_t>
FLOE_DEVICE value_t shuffle_xor(value_t value, int lanes) {
  return __shfl_xor_sync(kAllLanes, value, lanes);
}

template <typename value_t>
FLOE_DEVICE value_t shuffle_up(value_t value, int lanes) {
  return __shfl_up_sync(kAllLanes, value, lanes);
}

FLOE_DEVICE unsigned ballot(bool value) { return __ballot_sync(kAllLanes, value); }

// The lanes that hold the same value.
FLOE_DEVICE unsigned match_any(int value) { return __match_any_sync(kAllLanes, value); }

FLOE_DEVICE float exponential(float value) { return expf(value); }
FLOE_DEVICE double exponential(double value) { return exp(value); }

FLOE_DEVICE int count_bits(unsigned bits) { return __popc(bits); }

FLOE_DEVICE void sync_warp() { __syncwarp(); }

FLOE_DEVICE void sync_block() { __syncthreads(); }

}  // namespace floe::cuda

#else

#include "cuda/tests/emulation.h"

#endif

namespace floe::cuda {

// The sum over the warp, the same bits in every lane.
template <typename value_t>
FLOE_DEVICE value_t sum_warp(value_t value) {
#pragma unroll
  for (int lanes = 16; lanes; lanes /= 2) value += shuffle_xor(value, lanes);
  return value;
}

}  // namespace floe::cuda
