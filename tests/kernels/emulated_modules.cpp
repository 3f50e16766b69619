#include "emulated_modules.h"

#include "emulated_cuda.h"

#include "cuda/rounding.cu"

namespace lwquant {
namespace emulated_modules {

namespace {

constexpr Module kRounding = {0, 0, 0, {{"round_block", run<ColumnBlock, ::round_block>}}};

std::vector<const Module*>& all_modules() {
  static std::vector<const Module*> own;
  return own;
}

int load_module(void** module, const void* image) {
  *module = const_cast<void*>(image);
  return 0;
}

int find_function(void** function, void* module, const char* name) {
  for (const Function& known : static_cast<const Module*>(module)->functions) {
    if (!known.name || strcmp(known.name, name) != 0) continue;
    *function = const_cast<Function*>(&known);
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
  const Function& kernel = *static_cast<const Function*>(function);
  gpu::emulated::launch(grid, static_cast<int>(block_x), [&] { kernel.run(arguments); });
  return 0;
}

int error_text(int error, const char** text) {
  *text = error == 200   ? "device kernel image is invalid"
          : error == 209 ? "no kernel image is available for execution on the device"
          : error == 500 ? "named symbol not found"
                         : "invalid argument";
  return 0;
}

}  // namespace

const gpu::Driver& driver() {
  static const gpu::Driver own = {load_module, find_function, launch, error_text};
  return own;
}

Known::Known(const Module (&modules)[3]) {
  for (const Module& module : modules) all_modules().push_back(&module);
}

const Module* module_for(int bits, int planes, int span) {
  for (const Module* module : all_modules()) {
    if (module->bits == bits && module->planes == planes && module->span == span) return module;
  }
  return nullptr;
}

const Module* rounding_module() { return &kRounding; }

}  // namespace emulated_modules
}  // namespace lwquant
