// The driver of csrc/cuda/launch.h on a CPU: csrc/cuda/kernels.cu as a C++ compiler makes it of
// emulated_module.cpp, behind the names that a compiled module has.
//
// Every width of codes, of activations and of spans is in it, and every pair of these; not every
// three, which would take twice as long to compile.
#pragma once
#include "cuda/launch.h"

namespace lwquant {
namespace emulated_modules {

constexpr int kSpans[] = {1, 2, 4};
constexpr int planes_of(int bits, int span) { return 1 + (bits + span / 2) % 2; }

struct Function {
  const char* name;
  void (*run)(void** arguments);
};

struct Module {
  int bits, planes, span;
  Function functions[gpu::kKernels];  // those without a name are not there
};

template <typename Arguments, void (*FUNCTION)(Arguments)>
void run(void** arguments) {
  FUNCTION(*static_cast<Arguments*>(arguments[0]));
}

// Makes a file's modules known, one for each span.
struct Known {
  explicit Known(const Module (&modules)[3]);
};

constexpr int kResidentThreads = 768;  // of every kernel, on a multiprocessor
const gpu::Driver& driver();
// What driver().load_module() takes for an image; null where none was compiled.
const Module* module_for(int bits, int planes, int span);
const Module* rounding_module();

}  // namespace emulated_modules
}  // namespace lwquant
