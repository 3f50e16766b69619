// Which instruction set runs: the best this machine has, unless a test asks for another.
#include "kernels.h"

#include <atomic>
#include <cstring>

namespace lwquant {
namespace {

constexpr int kMaxIsas = 5;

const Isa* best_isa() {
  const Isa* found[kMaxIsas];
  return found[available_isas(found, kMaxIsas) - 1];
}

std::atomic<const Isa*>& selected() {
  static std::atomic<const Isa*> isa{best_isa()};
  return isa;
}

}  // namespace

int available_isas(const Isa** out, int capacity) {
  int n = 0;
  auto add = [&](const Isa& isa) {
    if (n < capacity) out[n++] = &isa;
  };
  add(kReference);
#ifdef LWQUANT_X86
  // These also ask the operating system whether it saves the wide registers.
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
      __builtin_cpu_supports("f16c")) {
    add(kAvx2);
#ifdef LWQUANT_AVX_VNNI
    if (__builtin_cpu_supports(LWQUANT_AVX_VNNI)) add(kAvxVnni);
#endif
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512vnni")) {
      add(kAvx512Vnni);
#ifdef LWQUANT_AMX
      if (amx_permitted()) add(kAmx);
#endif
    }
  }
#endif
  return n;
}

const Isa& current_isa() { return *selected().load(std::memory_order_relaxed); }

bool select_isa(const char* name) {
  const Isa* found[kMaxIsas];
  const int n = available_isas(found, kMaxIsas);
  for (int i = 0; i < n; ++i) {
    if (std::strcmp(found[i]->name, name) == 0) {
      selected().store(found[i]);
      return true;
    }
  }
  return false;
}

}  // namespace lwquant
