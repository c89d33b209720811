// out = [A_0 | A_1 | A_2] [B_0 ; B_1 ; B_2] (+ bias) in one pass over the output, on Hopper.
//
// A block is three warpgroups. One thread of the first, the producer, has the copy engine (TMA)
// fetch a 128 x 64 piece of A and a 64 x 256 piece of B into the next stage of a ring in shared
// memory, swizzled as the tensor cores want it. The other two, the consumers, multiply 64 rows each
// by the whole piece of B (wgmma), straight from shared memory into float32 registers.
//
//   producer:  wait empty[s] -> expect bytes on full[s] -> TMA ... which completes full[s] itself
//   consumer:  wait full[s] -> wgmma -> (one step later, when it is over) arrive at empty[s]
//
// The K loop runs over the first source and goes on over the next as if it were more of the same:
// the low-rank product costs its FLOPs, and neither a second kernel nor a second pass over the
// output. Depths that end within a step are padded with zeros by TMA, never in memory.
//
// Blocks are persistent, one an SM, in clusters of two that share B through multicast: alone, such
// tiles would ask 9 TB/s of L2 for 800 TFLOP/s, in pairs 6. While consumers round their sums and
// stage them for TMA's stores, the producer is already filling the ring for the next tile.
#pragma once

#include "cuda/two_source_schedule.h"

#ifdef __CUDACC__
#include "cuda/two_source_mma.cuh"
#include "cuda/two_source_tma.cuh"
#else
#include "cuda/tests/two_source_sm.h"  // the same functions, of an emulated cluster
#endif

namespace floe::two_source {

// By value to the kernel, which hands the maps' addresses to the copy engine.
struct Arguments {
  CUtensorMap a[kSources];  // (T, K_s)
  CUtensorMap b[kSources];  // (N, K_s) or (K_s, N), as Major says
  CUtensorMap out;          // (T, N)
  Problem problem;
  const void* bias;  // (N,) or null
};

template <class Tile>
struct Producer {
  const Arguments& args;
  Shared<Tile> shared;
  int block;

  __device__ int rank() const { return block; }
  __device__ void wait_empty(int s, uint32_t parity) { barrier_wait(shared.empty(s), parity); }
  __device__ void expect(int s, int bytes) { barrier_expect(shared.full(s), bytes); }
  __device__ void load_a(int s, int offset, int source, int inner, int outer) {
    tma_load(args.a[source], shared.stage(s) + offset, shared.full(s), inner, outer);
  }
  __device__ void load_b(int s, int offset, int source, int inner, int outer) {
    const uint32_t to = shared.stage(s) + offset;
    if constexpr (Tile::kCluster == 1) {
      tma_load(args.b[source], to, shared.full(s), inner, outer);
    } else {
      constexpr uint16_t kAll = (1 << Tile::kCluster) - 1;
      tma_load(args.b[source], to, shared.full(s), inner, outer, kAll);
    }
  }
};

template <class Tile, class scalar_t>
struct Consumer {
  const Arguments& args;
  Shared<Tile> shared;
  int block, warp, lane;
  float sums[Tile::kColumns / 2];  // a tile's first product writes them all
  uint32_t bias[8];                // of two columns each

  __device__ Consumer(const Arguments& args, Shared<Tile> shared, int block, int warp, int lane)
      : args(args), shared(shared), block(block), warp(warp), lane(lane) {}
  __device__ int rank() const { return block; }
  __device__ void wait_full(int s, uint32_t parity) { barrier_wait(shared.full(s), parity); }

  template <Major major, int blocks>
  __device__ __forceinline__ void multiply(int s, bool accumulate) {
    const uint64_t a = descriptor_a(shared.stage(s), warp / 4);
    const uint64_t b = descriptor_b<Tile>(shared.stage(s), major);
    mma_fence();
#pragma unroll
    for (int i = 0; i < blocks; ++i) {
      mma<scalar_t, major == Major::kColumn>(sums, a + i * descriptor_step(Major::kDepth),
                                             b + i * descriptor_step(major), accumulate || i);
    }
    mma_commit();
  }

  template <int left>
  __device__ void settle() {
    mma_wait<left>();
  }
  __device__ void release(int s) {
    if (lane < Tile::kCluster) barrier_arrive(shared.empty(s), lane);
  }
  __device__ __forceinline__ void store(Origin at) { store_tile<Tile>(at, warp, lane, *this); }

  __device__ void claim() {
    if (lane == 0) tma_store_wait<1>();
    __syncwarp();
  }
  // The lane's two columns in each of the next 8 blocks of 8, all at once.
  __device__ __forceinline__ void fetch_bias(int column) {
#pragma unroll
    for (int b = 0; b < 8; ++b, column += 8) {
      const bool there = args.bias && column < args.problem.columns;
      bias[b] = there ? static_cast<const uint32_t*>(args.bias)[column / 2] : 0;
    }
  }
  // Rounds 8 sums: rows r and r + 8 of a block of 8 columns, then of the block to its right.
  __device__ __forceinline__ void put(int buffer, int offset, int box, int pair) {
    const float* const sum = sums + (box * 4 + pair) * 8;
    uint32_t matrices[4];
#pragma unroll
    for (int m = 0; m < 4; ++m) {
      const float2 b = unpack<scalar_t>(bias[pair * 2 + m / 2]);
      matrices[m] = pack<scalar_t>(sum[m * 2] + b.x, sum[m * 2 + 1] + b.y);
    }
    stmatrix(shared.staging(warp, buffer) + offset, matrices);
  }
  __device__ void publish(int buffer, int column, int row) {
    proxy_fence();
    __syncwarp();
    if (lane == 0) tma_store(args.out, shared.staging(warp, buffer), column, row);
  }
};

constexpr int kThreads = 128 * (1 + kConsumers);

template <class Tile, Major first, class scalar_t>
__global__ void __launch_bounds__(kThreads, 1)
    two_source_gemm(const __grid_constant__ Arguments args) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  extern __shared__ char dynamic[];
  const Shared<Tile> shared(shared_address(dynamic));
  // the same in all lanes, and the compiler should know
  const int warp = __shfl_sync(~0u, threadIdx.x / 32, 0), lane = threadIdx.x % 32;
  const int rank = Tile::kCluster == 1 ? 0 : cluster_rank();

  if (threadIdx.x == 0) {
    for (int s = 0; s < Tile::kStages; ++s) {
      barrier_init(shared.full(s), 1);
      barrier_init(shared.empty(s), Tile::kEmptyArrivals);
    }
    barrier_init_fence();
    proxy_fence();
    for (int s = 0; s < args.problem.sources; ++s) prefetch(args.a[s]), prefetch(args.b[s]);
    prefetch(args.out);
  }
  __syncwarp();
  Tile::kCluster == 1 ? __syncthreads() : cluster_sync();

  const Walk<Tile> walk(args.problem, blockIdx.x / Tile::kCluster, gridDim.x / Tile::kCluster);
  if (warp < 4) {
    fewer_registers<40>();
    if (threadIdx.x == 0) {
      Producer<Tile> ports{args, shared, rank};
      produce<Tile, first>(args.problem, walk, ports);
    }
  } else {
    more_registers<232>();  // 40 + 2 * 232 of the 3 * 168 that the launch gave
    Consumer<Tile, scalar_t> ports(args, shared, rank, warp - 4, lane);
    consume<Tile, first>(args.problem, walk, ports);
    if (lane == 0) tma_store_wait<0>();
  }
  __syncwarp();
  // a block's shared memory must outlive what the others send it
  if constexpr (Tile::kCluster > 1) cluster_sync();
#else
  __trap();  // the launcher asks for compute capability 9.0 first
#endif
}

}  // namespace floe::two_source
