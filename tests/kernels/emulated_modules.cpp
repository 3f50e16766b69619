#include "emulated_modules.h"

#include "emulated_cuda.h"

namespace lwquant {
namespace emulated_modules {

#define MODULES_OF(bits) \
  template <>            \
  const Module (&modules_of<bits>())[3];
MODULES_OF(2)
MODULES_OF(3)
MODULES_OF(4)
MODULES_OF(5)
MODULES_OF(6)
MODULES_OF(7)
MODULES_OF(8)

namespace {

int load_module(void** module, const void* image) {
  *module = const_cast<void*>(image);
  return 0;
}

int find_function(void** function, void* module, const char* name) {
  for (int k = 0; k < gpu::kKernels; ++k) {
    if (strcmp(gpu::kKernelNames[k], name) != 0) continue;
    *function = const_cast<void*>(
        static_cast<const void*>(&static_cast<const Module*>(module)->functions[k]));
    return 0;
  }
  return 500;  // CUDA_ERROR_NOT_FOUND
}

int launch(void* function, unsigned grid_x, unsigned grid_y, unsigned grid_z, unsigned block_x,
           unsigned block_y, unsigned block_z, unsigned shared_bytes, void*, void** arguments,
           void**) {
  if (block_y != 1 || block_z != 1 || shared_bytes) return 1;  // CUDA_ERROR_INVALID_VALUE
  const int grid[] = {static_cast<int>(grid_x), static_cast<int>(grid_y),
                      static_cast<int>(grid_z)};
  const auto run = *static_cast<void (*const*)(void**)>(function);
  gpu::emulated::launch(grid, static_cast<int>(block_x), [=] { run(arguments); });
  return 0;
}

int error_text(int error, const char** text) {
  *text = error == 500 ? "named symbol not found" : "invalid argument";
  return 0;
}

}  // namespace

const gpu::Driver& driver() {
  static const gpu::Driver own = {load_module, find_function, launch, error_text};
  return own;
}

const Module& module_for(int bits, int planes, int span) {
  const Module* const every[] = {modules_of<2>(), modules_of<3>(), modules_of<4>(), modules_of<5>(),
                                 modules_of<6>(), modules_of<7>(), modules_of<8>()};
  for (int i = 0; i < 3; ++i) {
    const Module& module = every[bits - 2][i];
    if (module.span == span && module.planes == planes) return module;
  }
  gpu::emulated::fail("no such module was compiled");
}

}  // namespace emulated_modules
}  // namespace lwquant
