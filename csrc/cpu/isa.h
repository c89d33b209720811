// Which instruction set the CPU kernels use. No torch in this file.
//
//   switch (isa()) {             // read once per operator call, outside the loops
//     case kAmx: ...             // the cases fall from the best to kDefault
//     default: ...
//   }
#pragma once

namespace floe::cpu {

// Each includes all those before it, so `isa() >= kAvx512` asks for AVX-512 or better.
enum Isa : int {
  kDefault,     // what the compiler assumes: SSE2 on x86-64, NEON on AArch64
  kAvx2,        // AVX2, FMA, F16C
  kAvx512,      // AVX-512 F, BW, DQ, VL
  kAvx512Bf16,  // AVX-512 BF16: vdpbf16ps
  kAmx,         // AMX tiles of bf16 and int8
};

inline constexpr const char* kIsaNames[] = {"default", "avx2", "avx512", "avx512_bf16", "amx"};

// The best that this CPU has and its operating system lets us use. Found once. Where there are
// tiles the first call asks Linux for them: from then on every thread of the process may use them,
// those that ran before as well, and signal handlers need 8 KiB more of their stacks.
Isa best_isa() noexcept;

// The best that is used without being asked for: kAmx is not, since its kernels are compiled and
// emulated, but have not run on a CPU that has it. Asks Linux for nothing.
Isa automatic_isa() noexcept;

// The one in use: automatic_isa(), until set_isa() chooses another.
Isa isa() noexcept;

// The caller promises wanted <= best_isa(); an operator call under way may finish on the old one.
void set_isa(Isa wanted) noexcept;

// _C and _info are two shared objects with one choice between them, which lives in _C, where the
// kernels are. _C hands these pointers to _info in a capsule, CPython's own way for one extension
// module to call another: no symbol is looked up by name and neither links to the other.
struct IsaTable {
  decltype(&best_isa) best;
  decltype(&isa) get;
  decltype(&set_isa) set;
};

inline constexpr const char* kIsaCapsule = "floe_kernels._C._isa";

}  // namespace floe::cpu
