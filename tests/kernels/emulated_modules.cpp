#include "emulated_modules.h"

#include "emulated_cuda.h"

#include <deque>

#include "cuda/rounding.cu"

namespace lwquant {
namespace emulated_modules {

namespace {

constexpr int kInvalidContext = 201;  // CUDA_ERROR_INVALID_CONTEXT

// Two GPUs; a thread begins without a context, as it does in CUDA.
char contexts[2];
thread_local void* current = nullptr;

// Handles belong to the context in which they were made.
struct LoadedModule {
  const Module* module;
  void* context;
};
struct LoadedFunction {
  const Function* function;
  void* context;
};

std::deque<LoadedModule> modules;
std::deque<LoadedFunction> functions;

constexpr Module kRounding = {0, 0, 0, {{"round_block", run<ColumnBlock, ::round_block>}}};

std::vector<const Module*>& all_modules() {
  static std::vector<const Module*> own;
  return own;
}

int load_module(void** module, const void* image) {
  if (!current) return kInvalidContext;
  modules.push_back({static_cast<const Module*>(image), current});
  *module = &modules.back();
  return 0;
}

int find_function(void** function, void* module, const char* name) {
  const LoadedModule& loaded = *static_cast<const LoadedModule*>(module);
  for (const Function& known : loaded.module->functions) {
    if (!known.name || strcmp(known.name, name) != 0) continue;
    functions.push_back({&known, loaded.context});
    *function = &functions.back();
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
  const LoadedFunction& kernel = *static_cast<const LoadedFunction*>(function);
  if (kernel.context != current) return kInvalidContext;
  gpu::emulated::launch(grid, static_cast<int>(block_x), [&] { kernel.function->run(arguments); });
  return 0;
}

int error_text(int error, const char** text) {
  *text = error == 200   ? "device kernel image is invalid"
          : error == 209 ? "no kernel image is available for execution on the device"
          : error == 500 ? "named symbol not found"
          : error == 201 ? "invalid device context"
          : error == 101 ? "invalid device ordinal"
          : error == 1   ? "invalid argument"
                         : nullptr;  // as CUDA does with what it does not know
  return *text ? 0 : 1;
}

int find_device(int* device, int index) {
  *device = index;
  return index >= 0 && index < 2 ? 0 : 101;  // CUDA_ERROR_INVALID_DEVICE
}

int retain_context(void** context, int device) {
  *context = &contexts[device];
  return 0;
}

int get_context(void** context) {
  *context = current;
  return 0;
}

int set_context(void* context) {
  current = context;
  return 0;
}

int count_resident(int* n_blocks, void* function, int block_threads, size_t) {
  if (static_cast<const LoadedFunction*>(function)->context != current) return kInvalidContext;
  *n_blocks = kResidentThreads / block_threads;
  return 0;
}

}  // namespace

const gpu::Driver& driver() {
  static const gpu::Driver own = {load_module,    find_function,  launch,      error_text,
                                  find_device,    retain_context, get_context, set_context,
                                  count_resident};
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
