// A libcuda.so.1 for tests: what is loaded, found and launched goes to functions of the test, which
// sets them. One device, one context; images are texts.
#include <stddef.h>

namespace {

int (*load)(const char* image);                      // → number of the module
int (*find)(int module, const char* name);           // → number of the function, 0 for none
int (*run)(int function, unsigned x, unsigned y, unsigned z, unsigned n_threads, void* arguments);

constexpr ptrdiff_t kContext = 1;
void* current = nullptr;

void* handle(ptrdiff_t number) { return reinterpret_cast<void*>(number); }
int number(void* handle) { return static_cast<int>(reinterpret_cast<ptrdiff_t>(handle)); }

}  // namespace

extern "C" {

void forward_to(decltype(load) own_load, decltype(find) own_find, decltype(run) own_run) {
  load = own_load, find = own_find, run = own_run;
}

int cuModuleLoadData(void** module, const void* image) {
  *module = handle(load(static_cast<const char*>(image)));
  return 0;
}

int cuModuleGetFunction(void** function, void* module, const char* name) {
  *function = handle(find(number(module), name));
  return *function ? 0 : 500;  // CUDA_ERROR_NOT_FOUND
}

int cuLaunchKernel(void* function, unsigned grid_x, unsigned grid_y, unsigned grid_z,
                   unsigned block_x, unsigned block_y, unsigned block_z, unsigned shared_bytes,
                   void*, void** arguments, void**) {
  if (block_y != 1 || block_z != 1 || shared_bytes || current != handle(kContext)) return 1;
  return run(number(function), grid_x, grid_y, grid_z, block_x, arguments[0]);
}

int cuGetErrorString(int, const char** text) {
  *text = "the test failed";
  return 0;
}

int cuDeviceGet(int* device, int index) {
  *device = index;
  return 0;
}

int cuDevicePrimaryCtxRetain(void** context, int) {
  *context = handle(kContext);
  return 0;
}

int cuCtxGetCurrent(void** context) {
  *context = current;
  return 0;
}

int cuCtxSetCurrent(void* context) {
  current = context;
  return 0;
}

int cuOccupancyMaxActiveBlocksPerMultiprocessor(int* n_blocks, void*, int, size_t) {
  *n_blocks = 2;
  return 0;
}
}
