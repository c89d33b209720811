#include "cpu/moe_lora_steps.h"

namespace floe::cpu {

const Kernels* tables::default_isa(Dtype x) {
  static constexpr Kernels kFloat64 = Steps<Portable<double>, double>::table(Dtype::kFloat64);
  static constexpr Kernels kFloat32 = Steps<Portable<float>, float>::table(Dtype::kFloat32);
  static constexpr Kernels kBFloat16 = Steps<Portable<float>, BFloat16>::table(Dtype::kFloat32);
  static constexpr Kernels kFloat16 = Steps<Portable<float>, Float16>::table(Dtype::kFloat32);
  switch (x) {
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

const Kernels& moe_lora_kernels(Dtype x, Isa isa) {
  const Kernels* found = nullptr;
#if defined(__x86_64__) && defined(__GNUC__)
  if (isa >= kAmx) found = tables::amx(x);
  if (!found && isa >= kAvx512Bf16) found = tables::avx512_bf16(x);
  if (!found && isa >= kAvx512) found = tables::avx512(x);
  if (!found && isa >= kAvx2) found = tables::avx2(x);
#endif
  return found ? *found : *tables::default_isa(x);
}

}  // namespace floe::cpu
