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

constexpr unsigned kTile = 1u << 24, kInt8 = 1u << 25;  // of leaf 7's edx
constexpr int kRequestPermission = 0x1023, kTileData = 18;  // arch_prctl's

}  // namespace

bool amx_permitted() {
  unsigned a, b, c, d;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) return false;
  if (!(d & kTile) || !(d & kInt8)) return false;
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
}

}  // namespace lwquant

#else

namespace lwquant {
bool amx_permitted() { return false; }
}  // namespace lwquant

#endif
