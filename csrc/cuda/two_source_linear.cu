// floe::experimental_two_source_linear and _grad on Hopper. The schema is Python's,
// ops/experimental_two_source.py.
#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/macros.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <initializer_list>
#include <optional>

#include "cuda/two_source_gemm.cuh"
#include "cuda/two_source_maps.h"

namespace floe {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using two_source::Arguments;
using two_source::Major;
using two_source::Matrix;
using Optional = std::optional<Tensor>;

struct Source {
  Matrix a, b;  // (T, K), and what Major says
};

Matrix matrix(const char* name, const Tensor& t, const Tensor& like) {
  STD_TORCH_CHECK(t.dim() == 2, name, " must have 2 dimensions, got ", t.dim());
  STD_TORCH_CHECK(t.scalar_type() == like.scalar_type(), name,
                  " must have the dtype of the first argument, and has another");
  STD_TORCH_CHECK(t.get_device_index() == like.get_device_index(), name,
                  " must be on the device of the first argument, and is on another");
  STD_TORCH_CHECK(t.stride(1) == 1 || t.size(1) <= 1, name,
                  " must have adjacent columns, got a stride of ", t.stride(1));
  // the stride of a single row says nothing
  const int64_t stride = t.size(0) > 1 ? t.stride(0) : (t.size(1) + 7) / 8 * 8;
  return {name, t.const_data_ptr(), t.size(0), t.size(1), stride};
}

int attribute(cudaDeviceAttr which) {
  int device, value;
  STD_CUDA_CHECK(cudaGetDevice(&device));
  STD_CUDA_CHECK(cudaDeviceGetAttribute(&value, which, device));
  return value;
}

template <class Tile, Major first, class scalar_t>
void launch(Arguments args, std::initializer_list<Source> sources, const Matrix& out, int64_t sms,
            cudaStream_t stream) {
  using namespace two_source;
  for (const Source& source : sources) {
    if (source.a.columns == 0) continue;
    const int s = args.problem.sources++;
    const Major major = s == 0 ? first : Major::kColumn;
    args.problem.depth[s] = static_cast<int>(source.a.columns);
    args.a[s] = tensor_map(source.a, box_a<Tile>());
    args.b[s] = tensor_map(source.b, box_b<Tile>(major));
  }
  args.out = tensor_map(out, box_out());

  auto* const kernel = two_source_gemm<Tile, first, scalar_t>;
  static const bool complete = [kernel] {
    cudaFuncAttributes found;
    STD_CUDA_CHECK(cudaFuncGetAttributes(&found, kernel));
    return found.numRegs > 128;  // the body for other targets is a trap, of 4 registers
  }();
  STD_TORCH_CHECK(complete, "the two-source GEMM must be built for sm_90a, as by ",
                  "TORCH_CUDA_ARCH_LIST=9.0a, and was built for something else");
  STD_CUDA_CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                      Tile::kSharedBytes));
  const int64_t clusters =
      std::min(cluster_tiles<Tile>(out.rows, out.columns), sms / Tile::kCluster);
  cudaLaunchAttribute cluster;
  cluster.id = cudaLaunchAttributeClusterDimension;
  cluster.val.clusterDim = {Tile::kCluster, 1, 1};
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(clusters * Tile::kCluster);
  config.blockDim = dim3(kThreads);
  config.dynamicSmemBytes = Tile::kSharedBytes;
  config.stream = stream;
  config.attrs = &cluster;
  config.numAttrs = 1;
  STD_CUDA_CHECK(cudaLaunchKernelEx(&config, kernel, args));
}

// out (T, N) = the sum over sources of a b, + bias.
template <Major first>
Tensor multiply(const Tensor& like, int64_t N, std::initializer_list<Source> sources,
                const Optional& bias) {
  using namespace two_source;
  const ScalarType dtype = like.scalar_type();
  STD_TORCH_CHECK(dtype == ScalarType::BFloat16 || dtype == ScalarType::Half,
                  "the two-source GEMM takes bfloat16 or float16, and got another dtype");
  const torch::stable::accelerator::DeviceGuard guard(like.get_device_index());
  STD_TORCH_CHECK(attribute(cudaDevAttrComputeCapabilityMajor) == 9,
                  "the two-source GEMM needs a GPU of compute capability 9.0, got ",
                  attribute(cudaDevAttrComputeCapabilityMajor), ".",
                  attribute(cudaDevAttrComputeCapabilityMinor));
  const int64_t T = like.size(0);
  for (const Source& source : sources) {
    const auto& [a, b] = source;
    const bool deep = first == Major::kDepth && &source == sources.begin();
    const int64_t K = deep ? b.columns : b.rows, columns = deep ? b.rows : b.columns;
    STD_TORCH_CHECK(a.rows == T && a.columns == K && columns == N, a.name, " and ", b.name,
                    " must fit (", T, ", K) times (K, ", N, "), got ", a.rows, " x ", a.columns,
                    " and ", b.rows, " x ", b.columns);
    STD_TORCH_CHECK(std::max({T, K, N}) <= int64_t{1} << 30, a.name, " and ", b.name,
                    " must have at most 2^30 rows and columns, got ", T, ", ", K, " and ", N);
  }
  STD_TORCH_CHECK(sources.begin()->a.columns > 0, sources.begin()->a.name,
                  " must have a column, got none");
  STD_TORCH_CHECK(cluster_tiles<Narrow>(T, N) <= int64_t{1} << 30,
                  "the output must have at most 2^30 tiles of 128 x 128, got ", T, " x ", N);
  if (bias) {
    STD_TORCH_CHECK(bias->dim() == 1 && bias->size(0) == N && bias->is_contiguous() &&
                        bias->scalar_type() == dtype &&
                        reinterpret_cast<uintptr_t>(bias->const_data_ptr()) % 4 == 0,
                    "bias must be ", N, " adjacent elements of the other arguments' dtype that ",
                    "start at a multiple of 4 bytes");
  }

  Tensor out = torch::stable::new_empty(like, {T, N});
  if (T == 0 || N == 0) return out;
  Arguments args = {};
  args.problem.rows = static_cast<int>(T), args.problem.columns = static_cast<int>(N);
  args.bias = bias ? bias->const_data_ptr() : nullptr;
  const Matrix to = {"the output", out.mutable_data_ptr(), T, N, N};
  void* stream;
  STABLE_TORCH_ERROR_CODE_CHECK(
      aoti_torch_get_current_cuda_stream(like.get_device_index(), &stream));
  const int64_t sms = attribute(cudaDevAttrMultiProcessorCount);
  const auto run = [&]<class scalar_t>(scalar_t) {
    const auto go =
        prefers_wide(T, N, sms) ? launch<Wide, first, scalar_t> : launch<Narrow, first, scalar_t>;
    go(args, sources, to, sms, static_cast<cudaStream_t>(stream));
  };
  dtype == ScalarType::Half ? run(__half{}) : run(__nv_bfloat16{});
  return out;
}

Tensor two_source_linear(const Tensor& x, const Tensor& h, const Tensor& weight,
                         const Tensor& lora_B, const Optional& bias) {
  const Source sources[] = {
      {matrix("x", x, x), matrix("weight", weight, x)},
      {matrix("h", h, x), matrix("lora_B", lora_B, x)},
  };
  return multiply<Major::kDepth>(x, weight.size(0), {sources[0], sources[1]}, bias);
}

Tensor two_source_grad(const Tensor& grad_out, const Tensor& dz, const Tensor& dlogits,
                       const Tensor& weight, const Tensor& lora_A, const Tensor& router_weight) {
  const Source sources[] = {
      {matrix("grad_out", grad_out, grad_out), matrix("weight", weight, grad_out)},
      {matrix("dz", dz, grad_out), matrix("lora_A", lora_A, grad_out)},
      {matrix("dlogits", dlogits, grad_out), matrix("router_weight", router_weight, grad_out)},
  };
  return multiply<Major::kColumn>(grad_out, weight.size(1), {sources[0], sources[1], sources[2]},
                                  {});
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(floe, CUDA, m) {
  m.impl("experimental_two_source_linear", TORCH_BOX(&two_source_linear));
  m.impl("experimental_two_source_grad", TORCH_BOX(&two_source_grad));
}

}  // namespace floe
