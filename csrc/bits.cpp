// The row stream one code at a time: the meaning every faster unpacking must equal.
#include "kernels.h"

namespace lwquant {

int64_t row_words(int64_t n_codes, int bits) {
  return (n_codes * bits + kWordBits - 1) / kWordBits;
}

void pack_row(int bits, const uint8_t* codes, int64_t n, int32_t* words) {
  uint64_t pending = 0;  // bits not yet written, the oldest lowest
  int n_pending = 0;
  for (int64_t k = 0; k < n; ++k) {
    pending |= static_cast<uint64_t>(codes[k]) << n_pending;
    n_pending += bits;
    if (n_pending >= kWordBits) {
      *words++ = static_cast<int32_t>(static_cast<uint32_t>(pending));
      pending >>= kWordBits;
      n_pending -= kWordBits;
    }
  }
  if (n_pending > 0) *words = static_cast<int32_t>(static_cast<uint32_t>(pending));
}

void unpack_row(int bits, const int32_t* words, int64_t n, uint8_t* codes) {
  const uint32_t mask = (1u << bits) - 1;
  uint64_t pending = 0;
  int n_pending = 0;
  for (int64_t k = 0; k < n; ++k) {
    if (n_pending < bits) {
      pending |= static_cast<uint64_t>(static_cast<uint32_t>(*words++)) << n_pending;
      n_pending += kWordBits;
    }
    codes[k] = static_cast<uint8_t>(pending & mask);
    pending >>= bits;
    n_pending -= bits;
  }
}

uint8_t code_at(int bits, const int32_t* words, int64_t index) {
  const int64_t bit = index * bits;
  const int64_t word = bit / kWordBits;
  const int shift = static_cast<int>(bit % kWordBits);
  uint64_t window = static_cast<uint32_t>(words[word]);
  if (shift + bits > kWordBits) {
    window |= static_cast<uint64_t>(static_cast<uint32_t>(words[word + 1])) << kWordBits;
  }
  return static_cast<uint8_t>((window >> shift) & ((1u << bits) - 1));
}

}  // namespace lwquant
