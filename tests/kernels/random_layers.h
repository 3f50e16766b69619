// Random layers for the kernels' own test programs: stored, as tiles, and as plain numbers.
#pragma once
#include "kernels.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <memory>
#include <vector>

namespace lwquant {

// Exactly n elements on the heap, so that one read beyond them is found.
template <typename T>
class Exact {
 public:
  explicit Exact(int64_t n) : n_(n), data_(new T[static_cast<size_t>(n)]()) {}
  T* get() const { return data_.get(); }
  T& operator[](int64_t k) const { return data_[static_cast<size_t>(k)]; }
  int64_t size() const { return n_; }

 private:
  int64_t n_;
  std::unique_ptr<T[]> data_;
};

struct Random {
  uint64_t state;
  uint32_t next() {
    state = state * 6364136223846793005u + 1442695040888963407u;
    return static_cast<uint32_t>(state >> 33);
  }
  int64_t below(int64_t n) { return next() % n; }
  float symmetric() { return static_cast<float>(next()) / 1073741824.0f - 1.0f; }
};

enum class Values { kUsual, kSaturating, kTiny, kHuge };
enum class Zeros { kNone, kWhole, kFine };

struct Case {
  int bits;
  int64_t out_features, in_features, group_size;
  bool scale_bytes;
  Zeros zeros;
  int64_t n_outliers;
  Values values;
};

inline const char* running = nullptr;  // where it is not the current instruction set

[[noreturn]] inline void fail(const Case& c, const char* what) {
  fprintf(stderr, "%s: %s of %d bits, %lld x %lld, groups of %lld, scales in %s, zeros %d, %lld "
          "outliers, values %d\n",
          running ? running : current_isa().name, what, c.bits, static_cast<long long>(c.out_features),
          static_cast<long long>(c.in_features), static_cast<long long>(c.group_size),
          c.scale_bytes ? "bytes" : "float16", static_cast<int>(c.zeros),
          static_cast<long long>(c.n_outliers), static_cast<int>(c.values));
  exit(1);
}

// A stored layer with every code, scale and zero beside it as a plain number.
struct Layer {
  Case is;
  int64_t n_groups;
  Exact<int32_t> words;
  Exact<uint16_t> halves;
  Exact<uint8_t> bytes;
  Exact<int32_t> zero_words;
  Exact<uint8_t> zero_bytes;
  Exact<uint16_t> values, columns;
  Exact<int32_t> rows;
  Exact<float> bias;
  Weight weight;
  std::vector<uint8_t> codes;        // (out_features, in_features)
  std::vector<double> scales, zeros;  // (out_features, n_groups)
  std::vector<double> outliers;      // (out_features, in_features)

  Layer(const Case& c, Random& random)
      : is(c),
        n_groups((c.in_features + c.group_size - 1) / c.group_size),
        words(c.out_features * row_words(c.in_features, c.bits)),
        halves(c.scale_bytes ? 0 : c.out_features * n_groups),
        bytes(c.scale_bytes ? c.out_features * (1 + n_groups) : 0),
        zero_words(c.zeros == Zeros::kWhole ? n_groups * row_words(c.out_features, c.bits) : 0),
        zero_bytes(c.zeros == Zeros::kFine ? n_groups * c.out_features : 0),
        values(c.n_outliers),
        columns(c.n_outliers),
        rows(c.out_features + 1),
        bias(c.out_features),
        codes(static_cast<size_t>(c.out_features * c.in_features)),
        scales(static_cast<size_t>(c.out_features * n_groups)),
        zeros(scales.size()),
        outliers(codes.size()) {
    const int most = (1 << c.bits) - 1;
    const int64_t row_size = row_words(c.in_features, c.bits);
    for (int64_t r = 0; r < c.out_features; ++r) {
      uint8_t* row = codes.data() + r * c.in_features;
      for (int64_t k = 0; k < c.in_features; ++k) {
        const bool full = c.values == Values::kSaturating;
        row[k] = static_cast<uint8_t>(full ? most : random.below(most + 1));
      }
      pack_row(c.bits, row, c.in_features, words.get() + r * row_size);
      if (c.scale_bytes) bytes[r * (1 + n_groups)] = static_cast<uint8_t>(random.below(15));
      for (int64_t g = 0; g < n_groups; ++g) {
        uint16_t half;
        if (c.scale_bytes) {
          uint8_t* own = bytes.get() + r * (1 + n_groups);
          own[1 + g] = static_cast<uint8_t>(random.below(256));
          half = static_cast<uint16_t>((own[0] << kByteExponent) + (own[1 + g] << kByteStep));
        } else {
          // Subnormal, usual and largest ones.
          const uint16_t patterns[] = {0, 1, 0x03ff, 0x2c00, 0x3555, 0x7bff};
          half = patterns[c.values == Values::kUsual ? 4 : random.below(6)];
          halves[r * n_groups + g] = half;
        }
        scales[static_cast<size_t>(r * n_groups + g)] = half_to_float(half);
      }
      bias[r] = random.symmetric();
    }
    for (int64_t g = 0; g < n_groups; ++g) {
      std::vector<uint8_t> of_group(static_cast<size_t>(c.out_features));
      for (int64_t r = 0; r < c.out_features; ++r) {
        const int64_t stored = random.below(c.zeros == Zeros::kFine ? 256 : most + 1);
        of_group[static_cast<size_t>(r)] = static_cast<uint8_t>(stored);
        double zero = static_cast<double>(stored);
        if (c.zeros == Zeros::kFine) {
          zero_bytes[g * c.out_features + r] = static_cast<uint8_t>(stored);
          zero *= byte_zero_step(c.bits);
        }
        if (c.zeros == Zeros::kNone) zero = 1 << (c.bits - 1);
        zeros[static_cast<size_t>(r * n_groups + g)] = zero;
      }
      if (c.zeros == Zeros::kWhole) {
        pack_row(c.bits, of_group.data(), c.out_features,
                 zero_words.get() + g * row_words(c.out_features, c.bits));
      }
    }
    for (int64_t k = 0; k < c.n_outliers; ++k) {
      const int64_t row = k * c.out_features / c.n_outliers, column = random.below(c.in_features);
      values[k] = 0x3c00;  // 1
      columns[k] = static_cast<uint16_t>(column);
      outliers[static_cast<size_t>(row * c.in_features + column)] += 1.0;
      for (int64_t r = row; r < c.out_features; ++r) rows[r + 1] = static_cast<int32_t>(k + 1);
    }
    weight = {words.get(),
              c.scale_bytes ? nullptr : halves.get(),
              c.scale_bytes ? bytes.get() : nullptr,
              c.zeros == Zeros::kWhole ? zero_words.get() : nullptr,
              c.zeros == Zeros::kFine ? zero_bytes.get() : nullptr,
              c.bits,
              c.group_size < c.in_features ? c.group_size : c.in_features,
              c.in_features,
              c.out_features,
              n_groups,
              row_size,
              row_words(c.out_features, c.bits),
              random.below(2) == 1,
              {values.get(), columns.get(), nullptr, c.n_outliers ? rows.get() : nullptr}};
  }

  double at(int64_t r, int64_t k) const {
    const size_t group = static_cast<size_t>(r * n_groups + k / is.group_size);
    const size_t index = static_cast<size_t>(r * is.in_features + k);
    return (codes[index] - zeros[group]) * scales[group] + outliers[index];
  }
};

// Tiles in memory that ends with them: the kernels may fetch ahead, but read nothing behind.
struct OwnTiles {
  std::unique_ptr<uint8_t, void (*)(void*)> data;
  Tiles tiles;

  explicit OwnTiles(const Layer& l) : data(nullptr, free) {
    const int64_t size = tiles_size(l.weight);
    data.reset(static_cast<uint8_t*>(aligned_alloc(kLine, static_cast<size_t>(size))));
    make_tiles(l.weight, 1, data.get());
    if (!read_tiles(data.get(), size, &tiles)) fail(l.is, "its tiles are none");
  }
};

inline void check_dequantized(const Layer& l, const float* got, const char* what) {
  for (int64_t r = 0; r < l.is.out_features; ++r) {
    for (int64_t k = 0; k < l.is.in_features; ++k) {
      const double wanted = l.at(r, k), error = fabs(got[r * l.is.in_features + k] - wanted);
      if (!(error <= 1e-6 * (fabs(wanted) + 1e-30))) fail(l.is, what);
    }
  }
}

}  // namespace lwquant
