// Python bindings. Tensors cross as addresses with their sizes; every size is checked here against
// the others before a pointer is followed, and the GIL is released while the kernels run.
#include "kernels.h"

#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <stdexcept>
#include <string>
#include <vector>

namespace nb = nanobind;
using Address = uintptr_t;  // of the first element of a contiguous CPU tensor; 0: no such tensor

namespace lwquant {
namespace {

void require(bool holds, const char* message) {  // makes no string unless it is wanted
  if (!holds) throw std::invalid_argument(message);
}

void require(bool holds, const std::string& message) { require(holds, message.c_str()); }

void require_size(const char* name, int64_t size, int64_t expected) {
  require(size == expected, std::string(name) + " has " + std::to_string(size) + ", expected " +
                                std::to_string(expected));
}

void require_bits(int64_t bits) {
  require(bits >= 2 && bits <= 8, "bits=" + std::to_string(bits) + " is not in 2..8");
}

template <typename T>
T* pointer(Address address) {
  return reinterpret_cast<T*>(address);
}

// The addresses of a layer's outliers, all 0 where it has none.
struct SparsePart {
  Address values, columns;
  bool wide;
  Address rows;
  int64_t n;
};

// Rows and columns come from files: none may lead outside the layer.
Outliers make_outliers(const SparsePart& sparse, int64_t out_features, int64_t in_features) {
  require(sparse.n >= 0 && (!sparse.n || (sparse.values && sparse.columns && sparse.rows)),
          "no address for outliers");
  const Outliers o = {pointer<const uint16_t>(sparse.values),
                      pointer<const uint16_t>(sparse.wide ? 0 : sparse.columns),
                      pointer<const int32_t>(sparse.wide ? sparse.columns : 0),
                      pointer<const int32_t>(sparse.rows)};
  if (!o.rows) return o;
  require(o.rows[0] == 0 && o.rows[out_features] == sparse.n,
          "the row pointers of outliers miss some");
  bool inside = true;
  for (int64_t r = 0; r < out_features; ++r) inside &= o.rows[r] <= o.rows[r + 1];
  for (int64_t k = 0; inside && k < sparse.n; ++k) {
    const int64_t column = outlier_column(o, k);
    inside = column >= 0 && column < in_features;
  }
  require(inside, "outliers lie outside the layer");
  return o;
}

Weight make_weight(Address codes, int64_t out_features, int64_t n_words, int64_t in_features,
                   Address scales, bool scale_bytes, int64_t n_groups, Address zeros,
                   bool zero_bytes, int64_t zero_width, int64_t bits, int64_t group_size,
                   const SparsePart& sparse, bool int8_weights = false) {
  require_bits(bits);
  require(in_features >= 1 && out_features >= 1, "a layer without inputs or outputs");
  require(group_size >= 1, "group_size=" + std::to_string(group_size) + " is less than 1");
  group_size = group_size < in_features ? group_size : in_features;
  require_size("words of a row of codes", n_words, row_words(in_features, bits));
  require_size("groups", n_groups, (in_features + group_size - 1) / group_size);
  if (zeros && zero_bytes) {
    require_size("bytes of a row of zeros", zero_width, out_features);
  } else if (zeros) {
    require_size("words of a row of zeros", zero_width, row_words(out_features, bits));
  }
  require(codes && scales, "no address for codes or scales");
  return {pointer<const int32_t>(codes),
          pointer<const uint16_t>(scale_bytes ? 0 : scales),
          pointer<const uint8_t>(scale_bytes ? scales : 0),
          pointer<const int32_t>(zero_bytes ? 0 : zeros),
          pointer<const uint8_t>(zero_bytes ? zeros : 0),
          static_cast<int>(bits),
          group_size,
          in_features,
          out_features,
          n_groups,
          n_words,
          zero_width,
          int8_weights,
          make_outliers(sparse, out_features, in_features)};
}

// The layer that `data` holds; its sizes must be the ones that the caller has room for.
Tiles require_tiles(Address data, int64_t size, int64_t out_features, int64_t in_features) {
  Tiles tiles;
  require(data && data % kLine == 0 && read_tiles(pointer<const uint8_t>(data), size, &tiles),
          "these are no tiles");
  require_size("outputs", tiles.is.out_features, out_features);
  require_size("inputs", tiles.is.in_features, in_features);
  return tiles;
}

int64_t bind_tiles_size(int64_t out_features, int64_t in_features, bool scale_bytes, bool zeros,
                        int64_t bits, int64_t group_size) {
  require_bits(bits);
  require(in_features >= 1 && out_features >= 1 && group_size >= 1, "an empty layer or group");
  const uint8_t some = 0;  // only whether there are scales in bytes and zeros matters
  Weight w{};
  w.scale_bytes = scale_bytes ? &some : nullptr;
  w.zero_bytes = zeros ? &some : nullptr;
  w.bits = static_cast<int>(bits);
  w.group_size = group_size < in_features ? group_size : in_features;
  w.in_features = in_features;
  w.out_features = out_features;
  w.n_groups = (in_features + w.group_size - 1) / w.group_size;
  return tiles_fit(w) ? tiles_size(w) : 0;
}

void bind_make_tiles(Address codes, int64_t out_features, int64_t n_words, int64_t in_features,
                     Address scales, bool scale_bytes, int64_t n_groups, Address zeros,
                     bool zero_bytes, int64_t zero_width, int64_t bits, int64_t group_size,
                     bool int8_weights, int64_t n_threads, Address data, int64_t size) {
  const Weight w = make_weight(codes, out_features, n_words, in_features, scales, scale_bytes,
                               n_groups, zeros, zero_bytes, zero_width, bits, group_size, {},
                               int8_weights);
  require(tiles_fit(w), "groups of " + std::to_string(group_size) + " do not fit tiles");
  require_size("bytes of tiles", size, tiles_size(w));
  require(data && n_threads >= 1, "no address for the tiles, or no threads");
  make_tiles(w, static_cast<int>(n_threads), pointer<uint8_t>(data));
}

void bind_unmake_tiles(Address data, int64_t size, int64_t out_features, int64_t in_features,
                       int64_t n_threads, Address codes, Address scales, Address zeros) {
  const Tiles tiles = require_tiles(data, size, out_features, in_features);
  require(codes && scales && n_threads >= 1 && (zeros != 0) == (tiles.is.zeros != 0),
          "no address for codes, scales or zeros, or no threads");
  unmake_tiles(tiles, static_cast<int>(n_threads), pointer<int32_t>(codes),
               pointer<uint8_t>(scales), pointer<uint8_t>(zeros));
}

// One layer whose sizes have been checked, for calls that have no time to do it again.
class TiledLinear {
 public:
  TiledLinear(Address data, int64_t size, int64_t out_features, int64_t in_features,
              Address outlier_values, Address outlier_columns, bool wide_columns,
              Address outlier_rows, int64_t n_outliers)
      : tiles_(require_tiles(data, size, out_features, in_features)),
        outliers_(make_outliers(
            {outlier_values, outlier_columns, wide_columns, outlier_rows, n_outliers},
            out_features, in_features)) {}

  // x and y are float32, or bf16; the bias is float32.
  bool run(Address x, int64_t n_tokens, Address bias, int64_t activation_bits, int64_t n_threads,
           Address y, bool in_bf16) const {
    require(n_tokens >= 0 && n_threads >= 1, "negative tokens or no threads");
    // The words of a message are put together only where it is wanted: this is the short path.
    if (activation_bits != 8 && activation_bits != 16) {
      throw std::invalid_argument("activation_bits=" + std::to_string(activation_bits) +
                                  " is not 8 or 16");
    }
    if (n_tokens == 0) return true;
    require(x && y, "no address for x or y");
    const auto multiply = [&](const auto* inputs, auto* outputs) {
      return linear(tiles_, outliers_, pointer<const float>(bias), inputs, n_tokens,
                    static_cast<int>(activation_bits), static_cast<int>(n_threads), outputs);
    };
    return in_bf16 ? multiply(pointer<const uint16_t>(x), pointer<uint16_t>(y))
                   : multiply(pointer<const float>(x), pointer<float>(y));
  }

  // Whether a call should hand bf16 over: torch converts many tokens faster than the kernels do that
  // need them in float32.
  bool takes_bf16(int64_t n_tokens, int64_t activation_bits) const {
    constexpr int64_t kMostConverted = 16;
    return n_tokens <= kMostConverted ||
           panel_kernels(tiles_.is.bits, tiles_.is.int8_weights, n_tokens,
                         static_cast<int>(activation_bits), true);
  }

  void dequantize(int64_t row, int64_t n_rows, int64_t n_threads, Address out) const {
    require(out && n_threads >= 1, "no address for the result, or no threads");
    require(row >= 0 && row % kTileOutputs == 0 && n_rows >= 0 &&
                row + n_rows <= tiles_.is.out_features,
            "rows outside the layer, or not from a tile's first on");
    dequantize_tiles(tiles_, outliers_, row / kTileOutputs, n_rows, static_cast<int>(n_threads),
                     pointer<float>(out));
  }

 private:
  Tiles tiles_;
  Outliers outliers_;
};

void bind_dequantize(Address codes, int64_t out_features, int64_t n_words, int64_t in_features,
                     Address scales, bool scale_bytes, int64_t n_groups, Address zeros,
                     bool zero_bytes, int64_t zero_width, int64_t bits, int64_t group_size,
                     Address outlier_values, Address outlier_columns, bool wide_columns,
                     Address outlier_rows, int64_t n_outliers, int64_t row, int64_t n_rows,
                     int64_t n_threads, Address out) {
  const SparsePart sparse = {outlier_values, outlier_columns, wide_columns, outlier_rows,
                             n_outliers};
  const Weight w = make_weight(codes, out_features, n_words, in_features, scales, scale_bytes,
                               n_groups, zeros, zero_bytes, zero_width, bits, group_size, sparse);
  require(row >= 0 && n_rows >= 0 && row + n_rows <= out_features && n_threads >= 1,
          "rows outside the layer, or no threads");
  if (n_rows == 0) return;
  require(out, "no address for the result");
  dequantize(w, row, n_rows, static_cast<int>(n_threads), pointer<float>(out));
}

void bind_pack(Address codes, int64_t rows, int64_t n_codes, int64_t bits, Address words) {
  require_bits(bits);
  require(rows >= 0 && n_codes >= 0, "negative shape");
  const int64_t n_words = row_words(n_codes, static_cast<int>(bits));
  if (rows * n_codes == 0) return;
  require(codes && words, "no address for codes or words");
  for (int64_t row = 0; row < rows; ++row) {
    pack_row(static_cast<int>(bits), pointer<const uint8_t>(codes) + row * n_codes, n_codes,
             pointer<int32_t>(words) + row * n_words);
  }
}

void bind_unpack(Address words, int64_t rows, int64_t n_words, int64_t bits, int64_t n_codes,
                 Address codes) {
  require_bits(bits);
  require(rows >= 0 && n_codes >= 0, "negative shape");
  require_size("words of a row", n_words, row_words(n_codes, static_cast<int>(bits)));
  if (rows * n_codes == 0) return;
  require(codes && words, "no address for codes or words");
  const Isa& isa = current_isa();
  for (int64_t row = 0; row < rows; ++row) {
    isa.unpack_row(static_cast<int>(bits), pointer<const int32_t>(words) + row * n_words, n_codes,
                   pointer<uint8_t>(codes) + row * n_codes);
  }
}

void bind_round_block(Address targets, int64_t n_columns, int64_t n_rows, Address feedback,
                      int64_t stride, Address base, Address scales, Address zeros, double max_code,
                      int64_t n_threads, Address errors) {
  require(n_columns >= 1 && n_columns <= kMaxBlockColumns && n_rows >= 1 && n_threads >= 1,
          "a block is 1.." + std::to_string(kMaxBlockColumns) + " columns of at least one row");
  require(stride >= n_columns, "rows of feedback overlap");
  require(targets && feedback && scales && zeros && errors, "an address is missing");
  round_block({pointer<float>(targets), pointer<const float>(feedback), stride,
               pointer<const float>(base), pointer<const float>(scales),
               pointer<const float>(zeros), pointer<float>(errors), static_cast<float>(max_code),
               n_columns, n_rows},
              static_cast<int>(n_threads));
}

void bind_fit_groups(Address weights, int64_t n, int64_t size, Address importance,
                     int64_t n_groups, Address shrinks, int64_t n_shrinks, int64_t bits,
                     bool symmetric, int64_t scale_mantissa, bool fine_zeros, int64_t n_halvings,
                     int64_t n_threads, Address scales, Address zeros) {
  require_bits(bits);
  require(n >= 0 && size >= 1 && n_groups >= 1 && n_shrinks >= 1 && n_threads >= 1,
          "no weights, groups, ranges or threads");
  require(n % n_groups == 0, "rows of groups are incomplete");
  require(scale_mantissa >= 1 && scale_mantissa <= 10, "a float16 has up to 10 mantissa bits");
  require(!(symmetric && fine_zeros), "a symmetric group has no zero of its own");
  require(!fine_zeros || (n_shrinks >= 2 && n_halvings >= 0), "too few ends of ranges");
  if (n == 0) return;
  require(weights && importance && shrinks && scales && zeros, "an address is missing");
  fit_groups({pointer<const float>(weights), pointer<const float>(importance),
              pointer<const float>(shrinks), pointer<float>(scales), pointer<float>(zeros),
              n_groups, size, n_shrinks, static_cast<int>(bits), symmetric,
              static_cast<int>(scale_mantissa), fine_zeros, n_halvings},
             n, static_cast<int>(n_threads));
}

std::string weights_rounded_to(int bits, bool int8_weights, int64_t n_tokens, int activation_bits,
                               bool bf16_inputs) {
  const PanelKernels* panels =
      panel_kernels(bits, int8_weights, n_tokens, activation_bits, bf16_inputs);
  return panels ? panels->type : "";
}

std::vector<std::string> isa_names() {
  const Isa* found[8];
  const int n = available_isas(found, 8);
  std::vector<std::string> names;
  for (int i = 0; i < n; ++i) names.emplace_back(found[i]->name);
  return names;
}

void set_isa(const std::string& name) {
  if (select_isa(name.c_str())) return;
  std::string message = "isa '" + name + "' is not one this machine has:";
  for (const std::string& known : isa_names()) message += " " + known;
  throw std::invalid_argument(message);
}

}  // namespace

void bind_gpu(nb::module_&);  // cuda/bindings.cpp

}  // namespace lwquant

NB_MODULE(_kernels, m) {
  using namespace lwquant;
  using Unlocked = nb::call_guard<nb::gil_scoped_release>;
  nb::class_<TiledLinear>(m, "TiledLinear")
      .def(nb::init<Address, int64_t, int64_t, int64_t, Address, Address, bool, Address, int64_t>())
      .def("run", &TiledLinear::run, Unlocked())
      .def("takes_bf16", &TiledLinear::takes_bf16)
      .def("dequantize", &TiledLinear::dequantize, Unlocked());
  m.def("tiles_size", bind_tiles_size);
  m.def("make_tiles", bind_make_tiles, Unlocked());
  m.def("unmake_tiles", bind_unmake_tiles, Unlocked());
  m.def("dequantize", bind_dequantize, Unlocked());
  m.def("pack", bind_pack, Unlocked());
  m.def("unpack", bind_unpack, Unlocked());
  m.def("round_block", bind_round_block, Unlocked());
  m.def("fit_groups", bind_fit_groups, Unlocked());
  m.def("weights_rounded_to", weights_rounded_to);
  m.def("isa", [] { return std::string(current_isa().name); });
  m.def("available_isas", isa_names);
  m.def("set_isa", set_isa);
  bind_gpu(m);
}
