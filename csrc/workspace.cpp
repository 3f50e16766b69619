#include "workspace.h"

#include <stdlib.h>
#ifdef __linux__
#include <sys/mman.h>
#endif

#include <memory>
#include <new>

namespace lwquant {
namespace {

constexpr size_t kHugePage = size_t{1} << 21;

struct Free {
  void operator()(void* data) const { free(data); }
};

struct Workspace {
  std::unique_ptr<uint8_t, Free> data;
  size_t size = 0;
};

}  // namespace

uint8_t* thread_workspace(size_t size) {
  static thread_local Workspace own;
#ifdef __SANITIZE_ADDRESS__
  own = Workspace();  // anew, and no larger than asked for, so that the sanitizer sees its end
  own.data.reset(static_cast<uint8_t*>(aligned_alloc(64, (size + 63) / 64 * 64)));
  return own.data.get();
#endif
  if (own.size < size) {
    const size_t pages = (size + kHugePage - 1) / kHugePage * kHugePage;
    own = Workspace();
    own.data.reset(static_cast<uint8_t*>(aligned_alloc(kHugePage, pages)));
    if (!own.data) throw std::bad_alloc();
#ifdef MADV_HUGEPAGE
    madvise(own.data.get(), pages, MADV_HUGEPAGE);  // a wish: small pages do as well
#endif
    own.size = pages;
  }
  return own.data.get();
}

}  // namespace lwquant
