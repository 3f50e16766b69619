// A libcuda.so.1 for tests of the whole way from Python: the driver's C interface on emulated_modules.h.
// An image is "bits planes span" or "rounding".
#include <stdio.h>
#include <string.h>

#include "emulated_modules.h"

using namespace lwquant;

extern "C" {

int cuModuleLoadData(void** module, const void* image) {
  if (strcmp(static_cast<const char*>(image), "rounding") == 0) {
    return emulated_modules::driver().load_module(module, emulated_modules::rounding_module());
  }
  int bits, planes, span;
  if (sscanf(static_cast<const char*>(image), "%d %d %d", &bits, &planes, &span) != 3) return 200;
  const void* found = emulated_modules::module_for(bits, planes, span);
  if (bits == 9) return 987;  // an error that the driver has no words for
  return found ? emulated_modules::driver().load_module(module, found) : 209;
}

int cuModuleGetFunction(void** function, void* module, const char* name) {
  return emulated_modules::driver().find_function(function, module, name);
}

int cuLaunchKernel(void* function, unsigned grid_x, unsigned grid_y, unsigned grid_z,
                   unsigned block_x, unsigned block_y, unsigned block_z, unsigned shared_bytes,
                   void* stream, void** arguments, void** extra) {
  return emulated_modules::driver().launch(function, grid_x, grid_y, grid_z, block_x, block_y,
                                           block_z, shared_bytes, stream, arguments, extra);
}

int cuGetErrorString(int error, const char** text) {
  return emulated_modules::driver().error_text(error, text);
}

int cuDeviceGet(int* device, int index) {
  return emulated_modules::driver().find_device(device, index);
}

int cuDevicePrimaryCtxRetain(void** context, int device) {
  return emulated_modules::driver().retain_context(context, device);
}

int cuCtxGetCurrent(void** context) { return emulated_modules::driver().get_context(context); }

int cuOccupancyMaxActiveBlocksPerMultiprocessor(int* n_blocks, void* function, int block_threads,
                                                size_t shared_bytes) {
  return emulated_modules::driver().count_resident(n_blocks, function, block_threads, shared_bytes);
}

int cuCtxSetCurrent(void* context) { return emulated_modules::driver().set_context(context); }
}
