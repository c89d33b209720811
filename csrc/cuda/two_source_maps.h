// Tensor maps, which tell TMA where a matrix lies, for a program that does not link with the
// driver.
#pragma once

#include <cuda.h>
#include <cudaTypedefs.h>
#include <cuda_runtime.h>
#include <torch/headeronly/util/Exception.h>

#include <cstdint>

#include "cuda/two_source_schedule.h"

namespace floe::two_source {

// A row-major matrix of 16-bit elements in device memory.
struct Matrix {
  const char* name;  // for messages
  const void* data;
  int64_t rows, columns, stride;  // stride: elements from one row to the next
};

inline PFN_cuTensorMapEncodeTiled_v12000 tensor_map_encoder() {
  static const auto encode = [] {
    void* function = nullptr;
    cudaDriverEntryPointQueryResult found;
    const cudaError_t error = cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function,
                                                               12000, cudaEnableDefault, &found);
    STD_TORCH_CHECK(error == cudaSuccess && found == cudaDriverEntryPointSuccess,
                    "the driver must have cuTensorMapEncodeTiled, of CUDA 12.0, and has not");
    return reinterpret_cast<PFN_cuTensorMapEncodeTiled_v12000>(function);
  }();
  return encode;
}

// TMA's own rule, which PyTorch's allocations and any even number of 8 columns keep.
inline void check_alignment(const Matrix& m) {
  const bool aligned = reinterpret_cast<uintptr_t>(m.data) % 16 == 0 && m.stride % 8 == 0;
  STD_TORCH_CHECK(aligned, m.name,
                  " must start at a multiple of 16 bytes and have rows a multiple of 16 bytes (8 "
                  "elements) apart, got rows ",
                  m.stride, " elements apart, ", reinterpret_cast<uintptr_t>(m.data) % 16,
                  " bytes past a multiple of 16");
}

// A map that copies boxes of this size, swizzled; outside the matrix it reads zeros, writes
// nothing.
inline CUtensorMap tensor_map(const Matrix& m, Box box) {
  check_alignment(m);
  CUtensorMap map;
  const cuuint64_t extents[] = {static_cast<cuuint64_t>(m.columns),
                                static_cast<cuuint64_t>(m.rows)};
  const cuuint64_t row_bytes[] = {static_cast<cuuint64_t>(m.stride) * 2};
  const cuuint32_t sizes[] = {static_cast<cuuint32_t>(box.inner),
                              static_cast<cuuint32_t>(box.outer)};
  const cuuint32_t every[] = {1, 1};
  // zeros are zeros in either 16-bit type, and TMA does no arithmetic here
  const CUresult result = tensor_map_encoder()(
      &map, CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, 2, const_cast<void*>(m.data), extents, row_bytes,
      sizes, every, CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
      CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  STD_TORCH_CHECK(result == CUDA_SUCCESS, "no tensor map for ", m.name, " of ", m.rows, " x ",
                  m.columns, ": error ", static_cast<int>(result), " of the CUDA driver");
  return map;
}

}  // namespace floe::two_source
