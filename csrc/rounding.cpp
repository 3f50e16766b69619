// The host side of rounding: cut the rows into tasks, share them out.
#include "rounding.h"

#include "kernels.h"
#include "pool.h"

#include <algorithm>

namespace lwquant {
namespace {

constexpr int64_t kGroupsPerTask = 64;

template <typename Body>
void for_each_part(int64_t n, int64_t size, int n_threads, Body body) {
  struct Context {
    Body* body;
    int64_t n, size;
  } context{&body, n, size};
  run_tasks(
      static_cast<int>((n + size - 1) / size), n_threads,
      [](void* pointer, int index, int) {
        const Context& c = *static_cast<Context*>(pointer);
        const int64_t first = index * c.size;
        (*c.body)(first, std::min(c.size, c.n - first));
      },
      &context);
}

}  // namespace

void round_block(const ColumnBlock& block, int n_threads) {
  const RoundingLoops& loops = *current_isa().rounding;
  for_each_part(block.n_rows, kLanes, n_threads,
                [&](int64_t first, int64_t n) { loops.round_rows(block, first, n); });
}

void fit_groups(const GroupFit& fit, int64_t n, int n_threads) {
  const RoundingLoops& loops = *current_isa().rounding;
  for_each_part(n, kGroupsPerTask, n_threads,
                [&](int64_t first, int64_t part) { loops.fit_groups(fit, first, part); });
}

}  // namespace lwquant
