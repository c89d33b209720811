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

// Linux gives a process the 8 KiB of tile state only if it asks.
bool may_use_tiles() {
#if defined(__linux__)
  constexpr long kRequestPermission = 0x1023, kTileData = 18;
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}

Isa detect() {
  const Registers one = cpuid(1, 0), seven = cpuid(7, 0), seven_one = cpuid(7, 1);
  const bool os_saves = has(one.ecx, {27});  // OSXSAVE: xgetbv exists
  const uint64_t saved = os_saves ? xcr0() : 0;

  const bool avx2 = has(saved, {1, 2})             // xmm, ymm
                    && has(one.ecx, {12, 28, 29})  // FMA, AVX, F16C
                    && has(seven.ebx, {5});
  if (!avx2) return kDefault;
  const bool avx512 = has(saved, {5, 6, 7})                 // opmask, zmm0-15, zmm16-31
                      && has(seven.ebx, {16, 17, 30, 31});  // F, DQ, BW, VL
  if (!avx512) return kAvx2;
  if (!has(seven_one.eax, {5})) return kAvx512;
  const bool amx = has(saved, {17, 18})              // tile configuration, tile data
                   && has(seven.edx, {22, 24, 25});  // BF16, TILE, INT8
  return amx && may_use_tiles() ? kAmx : kAvx512Bf16;
}

#else

Isa detect() { return kDefault; }

#endif

std::atomic<Isa>& chosen() {
  static std::atomic<Isa> choice{best_isa()};
  return choice;
}

}  // namespace

Isa best_isa() noexcept {
  static const Isa best = detect();
  return best;
}

Isa isa() noexcept { return chosen().load(std::memory_order_relaxed); }

void set_isa(Isa wanted) noexcept { chosen().store(wanted, std::memory_order_relaxed); }

}  // namespace floe::cpu
