#include "cpu/grad_square_steps.h"

namespace floe::cpu {

const GradSquareKernels* grad_square_tables::default_isa(Dtype dtype) {
  static constexpr auto kFloat64 = GradSquareSteps<Portable<double>, double>::table();
  static constexpr auto kFloat32 = GradSquareSteps<Portable<float>, float>::table();
  static constexpr auto kBFloat16 = GradSquareSteps<Portable<float>, BFloat16>::table();
  static constexpr auto kFloat16 = GradSquareSteps<Portable<float>, Float16>::table();
  switch (dtype) {
    case Dtype::kFloat64:
      return &kFloat64;
    case Dtype::kFloat32:
      return &kFloat32;
    case Dtype::kBFloat16:
      return &kBFloat16;
    case Dtype::kFloat16:
      return &kFloat16;
  }
  return nullptr;
}

const GradSquareKernels& grad_square_kernels(Dtype dtype, Isa isa) {
  const GradSquareKernels* found = nullptr;
#if defined(__x86_64__) && defined(__GNUC__)
  if (isa >= kAmx) found = grad_square_tables::amx(dtype);
  if (!found && isa >= kAvx512Bf16) found = grad_square_tables::avx512_bf16(dtype);
  if (!found && isa >= kAvx512) found = grad_square_tables::avx512(dtype);
  if (!found && isa >= kAvx2) found = grad_square_tables::avx2(dtype);
#endif
  return found ? *found : *grad_square_tables::default_isa(dtype);
}

}  // namespace floe::cpu
