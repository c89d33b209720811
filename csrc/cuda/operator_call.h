// What the operators of this folder ask of torch: a stream, rows that lie side by side, a launch.
#pragma once

#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/macros.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <cstdint>
#include <optional>

#include "cuda/grad_square_tiles.cuh"

namespace floe::cuda {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using torch::stable::accelerator::DeviceGuard;

inline cudaStream_t current_stream(const Tensor& tensor) {
  void* stream;
  STABLE_TORCH_ERROR_CODE_CHECK(
      aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &stream));
  return static_cast<cudaStream_t>(stream);
}

// What torch.promote_types says of two floating point types.
inline ScalarType promoted(ScalarType a, ScalarType b) {
  if (a == b) return a;
  if (a == ScalarType::Double || b == ScalarType::Double) return ScalarType::Double;
  return ScalarType::Float;
}

// A matrix whose rows are contiguous, copied if need be.
inline Tensor with_rows(const Tensor& matrix) {
  const bool usable = matrix.stride(1) == 1 && matrix.stride(0) >= matrix.size(1);
  return usable ? matrix : torch::stable::contiguous(matrix);
}

// A matrix of float32 or of 16 bits with contiguous rows.
inline Source source_of(const Tensor& matrix) {
  const auto* data = static_cast<const char*>(matrix.const_data_ptr());
  const int64_t row_bytes = matrix.stride(0) * (matrix.scalar_type() == ScalarType::Float ? 4 : 2);
  const bool aligned = reinterpret_cast<uintptr_t>(data) % 16 == 0 && row_bytes % 16 == 0;
  return {data, row_bytes, static_cast<int>(matrix.size(1)), aligned};
}

// Scale factors as the kernels read them: float32, null for none.
inline std::optional<Tensor> as_scale(const std::optional<Tensor>& scale) {
  if (!scale) return scale;
  return torch::stable::contiguous(torch::stable::to(*scale, ScalarType::Float));
}

inline Tensor floats(const Tensor& like, int64_t size) {
  return torch::stable::new_empty(like, {size}, ScalarType::Float);
}

// Shared memory above 48 KB has to be asked for.
template <typename kernel_t, typename... arguments_t>
void launch(kernel_t* kernel, dim3 grid, int threads, int shared_bytes, cudaStream_t stream,
            arguments_t... arguments) {
  if (shared_bytes > 48 << 10) {
    STD_CUDA_CHECK(
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes));
  }
  kernel<<<grid, threads, shared_bytes, stream>>>(arguments...);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

}  // namespace floe::cuda
