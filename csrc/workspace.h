// Memory that a thread's calls write before they read it, and that the next call finds again.
#pragma once
#include <stddef.h>
#include <stdint.h>

namespace lwquant {

// At least `size` bytes of the calling thread, aligned to huge pages and in them where there are
// any: what many rows or tokens are read from at once otherwise waits for pages to be found.
// Throws std::bad_alloc. Valid until the thread's next call.
uint8_t* thread_workspace(size_t size);

// Parts of a piece of memory, one after another, each aligned to lines. Of null they are null, too:
// to find out how much they take.
class Carver {
 public:
  explicit Carver(uint8_t* memory) : memory_(memory) {}

  template <typename T>
  T* take(int64_t n) {
    const size_t from = taken_;
    taken_ += (static_cast<size_t>(n) * sizeof(T) + kAlignment - 1) / kAlignment * kAlignment;
    return memory_ ? reinterpret_cast<T*>(memory_ + from) : nullptr;
  }
  size_t taken() const { return taken_; }

 private:
  static constexpr size_t kAlignment = 64;
  uint8_t* memory_;
  size_t taken_ = 0;
};

}  // namespace lwquant
