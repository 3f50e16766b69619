// Whether this process may use AMX: Linux gives the registers to those that ask.
#include "kernels.h"

#if defined(LWQUANT_EMULATE_AMX)

namespace lwquant {
bool amx_permitted() { return true; }
}  // namespace lwquant

#elif defined(__linux__)

#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>

namespace lwquant {
namespace {

constexpr unsigned kNeeded = 7u << 22;  // of leaf 7's edx: bf16, tiles, int8
constexpr int kRequestPermission = 0x1023, kTileData = 18;  // arch_prctl's

}  // namespace

bool amx_permitted() {
  unsigned a, b, c, d;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) return false;
  if ((d & kNeeded) != kNeeded) return false;
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
}

}  // namespace lwquant

#else

namespace lwquant {
bool amx_permitted() { return false; }
}  // namespace lwquant

#endif
