// For arithmetic that a kernel, its launcher and a test on the CPU share.
#pragma once

#ifdef __CUDACC__
#define FLOE_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define FLOE_HOST_DEVICE inline
#endif
