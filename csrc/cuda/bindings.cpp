// The GPU kernels for Python: addresses, sizes and checks of both.
#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>

#include <string.h>

#include <stdexcept>
#include <string>

#include "launch.h"

namespace nb = nanobind;

namespace lwquant {
namespace {

using Address = uintptr_t;

void require(bool holds, const std::string& what) {
  if (!holds) throw std::invalid_argument(what);
}

void require_done(const char* error) {
  if (error) throw std::runtime_error(std::string("CUDA: ") + error);
}

gpu::Float float_type(int type) {
  require(type >= gpu::kFloat32 && type <= gpu::kBfloat16, "a type of floats that no kernel has");
  return static_cast<gpu::Float>(type);
}

const gpu::Driver& required_driver() {
  const gpu::Driver* driver = gpu::system_driver();
  require(driver != nullptr, "there is no NVIDIA driver: libcuda.so.1 is not found");
  return *driver;
}

// Machine code for one kind of layer, loaded into one GPU.
struct GpuKernels {
  gpu::Module module;
  GpuKernels(const nb::bytes& code, int device_index, int bits, int activation_bits,
             int span_blocks, int n_multiprocessors) {
    require(activation_bits == 8 || activation_bits == 16, "activations have 8 or 16 bits");
    require(n_multiprocessors >= 1, "a GPU has a multiprocessor");
    require_done(gpu::load_module(required_driver(), device_index, code.data(), bits,
                                  activation_bits, span_blocks, n_multiprocessors, &module));
  }
};

// A layer whose tiles are in the memory of a GPU; `header` is a copy of their first bytes.
class GpuLayer {
 public:
  GpuLayer(const nb::bytes& header, Address tiles, int64_t size, int64_t out_features,
           int64_t in_features)
      : address_(reinterpret_cast<const uint8_t*>(tiles)) {
    TilesHeader is;
    require(header.size() == sizeof is && tiles, "a header has 64 bytes, tiles an address");
    memcpy(&is, header.data(), sizeof is);
    require(read_header(is, size, &tiles_), "these are no tiles of this size");
    require(is.out_features == out_features && is.in_features == in_features,
            "tiles of " + std::to_string(is.out_features) + " x " +
                std::to_string(is.in_features) + ", expected " + std::to_string(out_features) +
                " x " + std::to_string(in_features));
    require(gpu::fits_gpu(tiles_), "a layer has more inputs or outputs than the GPU kernels take");
    require(tiles % kLine == 0, "tiles are aligned to 64 bytes");
  }

  int bits() const { return tiles_.is.bits; }
  int span() const { return static_cast<int>(span_blocks(tiles_)); }

  int64_t workspace_bytes(const GpuKernels& kernels, int64_t n_tokens) const {
    return plan(kernels, n_tokens).workspace_bytes;
  }

  void multiply(const GpuKernels& kernels, Address x, int x_type, int64_t n_tokens, Address bias,
                int bias_type, Address y, Address workspace, int64_t workspace_bytes,
                Address stream) const {
    const gpu::Plan found = plan(kernels, n_tokens);
    require(workspace_bytes >= found.workspace_bytes, "too small a workspace");
    require(x && y && workspace && workspace % 16 == 0, "an address is missing or not aligned");
    const gpu::Float type = float_type(x_type);
    require_done(gpu::multiply(
        kernels.module, tiles_, found,
        {address_, reinterpret_cast<const void*>(x), type, n_tokens,
         reinterpret_cast<const void*>(bias), float_type(bias_type), reinterpret_cast<void*>(y),
         type, reinterpret_cast<uint8_t*>(workspace), reinterpret_cast<void*>(stream)}));
  }

  void dequantize(const GpuKernels& kernels, Address out, int out_type, Address stream) const {
    require_kind(kernels);
    require(out != 0, "no address for the weight");
    require_done(gpu::dequantize(kernels.module, tiles_, address_, 0, tiles_.is.out_features,
                                 reinterpret_cast<void*>(out), float_type(out_type),
                                 reinterpret_cast<void*>(stream)));
  }

 private:
  gpu::Plan plan(const GpuKernels& kernels, int64_t n_tokens) const {
    require_kind(kernels);
    const int64_t most = gpu::most_tokens(kernels.module.activation_bits);
    require(n_tokens >= 1 && n_tokens <= most, "kernels take 1 to " + std::to_string(most) + " tokens");
    return gpu::make_plan(kernels.module, tiles_, n_tokens);
  }
  void require_kind(const GpuKernels& kernels) const {
    require(kernels.module.bits == bits() && kernels.module.span_blocks == span(),
            "these kernels are for another kind of layer");
  }

  Tiles tiles_;
  const uint8_t* address_;
};

// Machine code of csrc/cuda/rounding.cu, loaded into one GPU.
class GpuRounding {
 public:
  GpuRounding(const nb::bytes& code, int device_index) {
    require_done(gpu::load_rounding(required_driver(), device_index, code.data(), &module_));
  }

  void round_block(Address targets, int64_t n_columns, int64_t n_rows, Address feedback,
                   int64_t stride, Address base, Address scales, Address zeros, float max_code,
                   Address errors, Address stream) const {
    require(n_columns >= 1 && n_columns <= gpu::kRoundingColumns, "columns of a block are 1..128");
    require(n_rows >= 1 && stride >= n_columns, "a block has rows, and feedback for its columns");
    require(targets && feedback && scales && zeros && errors, "an address is missing");
    const auto floats = [](Address address) { return reinterpret_cast<float*>(address); };
    require_done(gpu::round_block(
        module_,
        {floats(targets), floats(feedback), stride, floats(base), floats(scales), floats(zeros),
         floats(errors), max_code, n_columns, n_rows},
        reinterpret_cast<void*>(stream)));
  }

 private:
  gpu::RoundingModule module_;
};

}  // namespace

void bind_gpu(nb::module_& m) {
  using Unlocked = nb::call_guard<nb::gil_scoped_release>;
  nb::class_<GpuKernels>(m, "GpuKernels")
      .def(nb::init<const nb::bytes&, int, int, int, int, int>());
  nb::class_<GpuLayer>(m, "GpuLayer")
      .def(nb::init<const nb::bytes&, Address, int64_t, int64_t, int64_t>())
      .def_prop_ro("bits", &GpuLayer::bits)
      .def_prop_ro("span_blocks", &GpuLayer::span)
      .def("workspace_bytes", &GpuLayer::workspace_bytes)
      .def("multiply", &GpuLayer::multiply, Unlocked())
      .def("dequantize", &GpuLayer::dequantize, Unlocked());
  nb::class_<GpuRounding>(m, "GpuRounding")
      .def(nb::init<const nb::bytes&, int>())
      .def("round_block", &GpuRounding::round_block, Unlocked());
  m.def("gpu_tokens", &gpu::most_tokens);
}

}  // namespace lwquant
