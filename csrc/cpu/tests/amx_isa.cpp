// In place of isa.cpp where tiles are emulated: AMX on top of every set that has the rest of it.
#define best_isa best_isa_of_this_cpu
#include "cpu/isa.cpp"
#undef best_isa

namespace floe::cpu {

Isa best_isa() noexcept;

Isa best_isa() noexcept { return automatic_isa() == kAvx512Bf16 ? kAmx : automatic_isa(); }

}  // namespace floe::cpu
