#include "cpu/isa.h"

#include <atomic>
#include <cstdint>
#include <initializer_list>

#if defined(__x86_64__)
#include <cpuid.h>
#endif
#if defined(__x86_64__) && defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace floe::cpu {
namespace {

#if defined(__x86_64__)

struct Registers {
  uint32_t eax = 0, ebx = 0, ecx = 0, edx = 0;
};

// Zeros, which claim no feature, where the CPU has no such leaf.
Registers cpuid(uint32_t leaf, uint32_t subleaf) {
  Registers r;
  __get_cpuid_count(leaf, subleaf, &r.eax, &r.ebx, &r.ecx, &r.edx);
  return r;
}

bool has(uint64_t word, std::initializer_list<int> bits) {
  for (const int bit : bits) {
    if (!(word >> bit & 1)) return false;
  }
  return true;
}

// The register states that the operating system saves. Without them an instruction that cpuid
// promises still faults.
uint64_t xcr0() {
  uint32_t low, high;
  __asm__("xgetbv" : "=a"(low), "=d"(high) : "c"(0));  // the intrinsic would need -mxsave
  return uint64_t{high} << 32 | low;
}

// Linux gives a process the 8 KiB of tile state only if it asks, and not where a thread has an
// alternate signal stack that is too small for them. The permission is the process's, so that it
// does not matter which threads exist already; a child inherits it, and exec takes it away.
bool may_use_tiles() {
#if defined(__linux__)
  constexpr long kRequestPermission = 0x1023, kTileData = 18;
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}

Isa detect_vectors() {
  const Registers one = cpuid(1, 0), seven = cpuid(7, 0);
  const bool os_saves = has(one.ecx, {27});  // OSXSAVE: xgetbv exists
  const uint64_t saved = os_saves ? xcr0() : 0;

  const bool avx2 = has(saved, {1, 2})             // xmm, ymm
                    && has(one.ecx, {12, 28, 29})  // FMA, AVX, F16C
                    && has(seven.ebx, {5});
  if (!avx2) return kDefault;
  const bool avx512 = has(saved, {5, 6, 7})                 // opmask, zmm0-15, zmm16-31
                      && has(seven.ebx, {16, 17, 30, 31});  // F, DQ, BW, VL
  if (!avx512) return kAvx2;
  return has(cpuid(7, 1).eax, {5}) ? kAvx512Bf16 : kAvx512;
}

// Where the vectors are AVX-512's.
bool detect_tiles() {
  if (!has(xcr0(), {17, 18}) || !has(cpuid(7, 0).edx, {22, 24, 25})) {
    return false;  // tile configuration and data; BF16, TILE, INT8
  }
  // palette 1 as the kernels know it: eight registers of 16 rows of 64 bytes
  const Registers palette = cpuid(0x1d, 1);
  return palette.ebx >> 16 >= 8 && (palette.ebx & 0xffff) >= 64 && (palette.ecx & 0xffff) >= 16 &&
         may_use_tiles();
}

#else

Isa detect_vectors() { return kDefault; }

bool detect_tiles() { return false; }

#endif

std::atomic<Isa>& chosen() {
  static std::atomic<Isa> choice{automatic_isa()};
  return choice;
}

}  // namespace

Isa best_isa() noexcept {
  static const Isa best = automatic_isa() == kAvx512Bf16 && detect_tiles() ? kAmx : automatic_isa();
  return best;
}

Isa automatic_isa() noexcept {
  static const Isa best = detect_vectors();
  return best;
}

Isa isa() noexcept { return chosen().load(std::memory_order_relaxed); }

void set_isa(Isa wanted) noexcept { chosen().store(wanted, std::memory_order_relaxed); }

}  // namespace floe::cpu
