// The driver's functions in libcuda, which comes with the driver and is looked for when it is needed.
#include "launch.h"

#if defined(__linux__)
#include <dlfcn.h>
#endif

namespace lwquant {
namespace gpu {
namespace {

Driver found;

#if defined(__linux__)
template <typename Function>
bool find(void* library, const char* name, Function* to) {
  *to = reinterpret_cast<Function>(dlsym(library, name));
  return *to != nullptr;
}

bool find_all() {
  void* library = dlopen("libcuda.so.1", RTLD_NOW | RTLD_LOCAL);
  return library && find(library, "cuModuleLoadData", &found.load_module) &&
         find(library, "cuModuleGetFunction", &found.find_function) &&
         find(library, "cuLaunchKernel", &found.launch) &&
         find(library, "cuGetErrorString", &found.error_text) &&
         find(library, "cuDeviceGet", &found.find_device) &&
         find(library, "cuDevicePrimaryCtxRetain", &found.retain_context) &&
         find(library, "cuCtxGetCurrent", &found.get_context) &&
         find(library, "cuCtxSetCurrent", &found.set_context) &&
         find(library, "cuOccupancyMaxActiveBlocksPerMultiprocessor", &found.count_resident);
}
#else
bool find_all() { return false; }
#endif

}  // namespace

const Driver* system_driver() {
  static const bool there = find_all();
  return there ? &found : nullptr;
}

}  // namespace gpu
}  // namespace lwquant
