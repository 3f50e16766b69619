// CUDA threads as fibers, for csrc/cuda on machines without a GPU: the names of csrc/cuda/device.h,
// each instruction as its definition in the PTX manual has it.
//
// Blocks run one after another, the threads of a block in turns: each runs until it has to wait.
// Order::kForward resumes the first that can go on and lets copies arrive as late as they may;
// Order::kBackward resumes the last and lets them arrive at once. Kernels that lack a barrier or a
// wait compute another result in one of the two.
#pragma once
#include <math.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <ucontext.h>

#include <functional>
#include <memory>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#endif

#define KERNEL inline
#define LAUNCHED_WITH(n_threads, n_blocks)
#define SHARED static
#define INLINE inline

namespace lwquant {
namespace gpu {
namespace emulated {

enum class Order { kForward, kBackward };

[[noreturn]] inline void fail(const char* rule) {
  fprintf(stderr, "CUDA: %s\n", rule);
  abort();
}

inline void require(bool holds, const char* rule) {
  if (!holds) fail(rule);
}

// Threads arrive; the last lets all of them on.
struct Gate {
  int arrived = 0;
  uint64_t passed = 0;
  const char* instruction = nullptr;
};

struct Copy {
  uint8_t* to;
  const uint8_t* from;
};

constexpr int kLanes = 32, kSlotWords = 10;
constexpr size_t kStackBytes = size_t{1} << 18;

// What the threads of a warp show each other: two sets, used in turn, since a thread may come to the
// next instruction before another has read what was shown for this one.
struct Warp {
  Gate gate;
  uint32_t shown[2][kLanes][kSlotWords];
};

struct Thread {
  ucontext_t context;
  std::unique_ptr<uint8_t[]> stack{new uint8_t[kStackBytes]};
  void* fake_stack = nullptr;
  bool done = false;
  const Gate* waits_for = nullptr;
  uint64_t passed = 0;
  int n_warp_instructions = 0;
  std::vector<std::vector<Copy>> groups;  // of copies, the last one open
};

struct Machine {
  Order order = Order::kForward;
  int n_threads = 0, current = 0;
  int block[3] = {};
  Gate gate;
  std::vector<Thread> threads;
  std::vector<Warp> warps;
  ucontext_t scheduler;
  void* fake_stack = nullptr;
  const void* stack = nullptr;
  size_t stack_bytes = 0;
  std::function<void()> kernel;
};

inline Machine& machine() {
  static Machine own;
  return own;
}

inline Thread& current() { return machine().threads[static_cast<size_t>(machine().current)]; }

// A fiber of its own stack: AddressSanitizer wants to know.
inline void to_scheduler(Thread& own) {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(own.done ? nullptr : &own.fake_stack, machine().stack,
                                 machine().stack_bytes);
#endif
  swapcontext(&own.context, &machine().scheduler);
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(own.fake_stack, nullptr, nullptr);
#endif
}

inline void to_thread(Thread& next) {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(&machine().fake_stack, next.stack.get(), kStackBytes);
#endif
  swapcontext(&machine().scheduler, &next.context);
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(machine().fake_stack, nullptr, nullptr);
#endif
}

inline void run_thread() {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(nullptr, &machine().stack, &machine().stack_bytes);
#endif
  machine().kernel();
  current().done = true;
  to_scheduler(current());
}

inline void arrive(Gate& gate, int n, const char* instruction) {
  if (gate.arrived == 0) gate.instruction = instruction;
  require(gate.instruction == instruction, "threads that act together meet at one instruction");
  if (++gate.arrived == n) {
    gate.arrived = 0;
    ++gate.passed;
    return;
  }
  Thread& own = current();
  own.waits_for = &gate, own.passed = gate.passed;
  to_scheduler(own);
}

inline bool can_go_on(const Thread& thread) {
  return !thread.done && (!thread.waits_for || thread.waits_for->passed != thread.passed);
}

inline void run_block() {
  Machine& m = machine();
  m.gate = Gate();
  m.warps.assign(static_cast<size_t>((m.n_threads + kLanes - 1) / kLanes), Warp());
  if (m.threads.size() < static_cast<size_t>(m.n_threads)) {
    m.threads = std::vector<Thread>(static_cast<size_t>(m.n_threads));
  }
  for (int i = 0; i < m.n_threads; ++i) {
    Thread& thread = m.threads[static_cast<size_t>(i)];
    thread.done = false, thread.waits_for = nullptr, thread.n_warp_instructions = 0;
    thread.groups.assign(1, {});
    getcontext(&thread.context);
    thread.context.uc_stack.ss_sp = thread.stack.get();
    thread.context.uc_stack.ss_size = kStackBytes;
    thread.context.uc_link = nullptr;
    makecontext(&thread.context, run_thread, 0);
  }
  for (int n_done = 0; n_done < m.n_threads;) {
    bool any = false;
    for (int i = 0; i < m.n_threads; ++i) {
      m.current = m.order == Order::kForward ? i : m.n_threads - 1 - i;
      Thread& thread = current();
      if (!can_go_on(thread)) continue;
      thread.waits_for = nullptr;
      to_thread(thread);
      n_done += thread.done;
      any = true;
    }
    require(any, "threads wait for others that never come");
  }
}

// kernel() for every thread of a grid.
inline void launch(const int (&grid)[3], int n_threads, std::function<void()> kernel) {
  Machine& m = machine();
  require(n_threads >= 1 && n_threads <= 1024, "a block has up to 1024 threads");
  require(grid[0] >= 1 && grid[1] >= 1 && grid[1] < 65536 && grid[2] >= 1 && grid[2] < 65536,
          "a grid has a block, and fewer than 65536 in its second and third direction");
  m.n_threads = n_threads;
  m.kernel = std::move(kernel);
  for (m.block[2] = 0; m.block[2] < grid[2]; ++m.block[2]) {
    for (m.block[1] = 0; m.block[1] < grid[1]; ++m.block[1]) {
      for (m.block[0] = 0; m.block[0] < grid[0]; ++m.block[0]) run_block();
    }
  }
}

// Shows words to the warp; [lane][word] of what all its threads show.
inline const uint32_t (*show(const uint32_t* words, int n, const char* instruction))[kSlotWords] {
  Machine& m = machine();
  require(m.n_threads % kLanes == 0, "warps are whole where their threads act together");
  Thread& own = current();
  Warp& warp = m.warps[static_cast<size_t>(m.current / kLanes)];
  auto& shown = warp.shown[own.n_warp_instructions++ % 2];
  memcpy(shown[m.current % kLanes], words, static_cast<size_t>(n) * sizeof *words);
  arrive(warp.gate, kLanes, instruction);
  return shown;
}

inline void finish_copies(size_t n_under_way) {
  auto& groups = current().groups;  // the last is open and belongs to none
  while (groups.size() - 1 > n_under_way) {
    for (const Copy& copy : groups.front()) memcpy(copy.to, copy.from, 16);
    groups.erase(groups.begin());
  }
}

inline void require_aligned(const void* address, size_t bytes) {
  require(reinterpret_cast<uintptr_t>(address) % bytes == 0, "addresses are whole multiples");
}

template <typename T>
T load(const void* from) {
  require_aligned(from, sizeof(T));
  T v;
  memcpy(&v, from, sizeof v);
  return v;
}

inline int32_t unsigned_byte(uint32_t word, int i) {
  return static_cast<int32_t>(word >> (8 * i) & 255);
}
inline int32_t signed_byte(uint32_t word, int i) {
  return static_cast<int8_t>(word >> (8 * i) & 255);
}

}  // namespace emulated

struct Four {
  uint32_t word[4];
};

inline int thread_index() { return emulated::machine().current; }
inline int n_threads() { return emulated::machine().n_threads; }
inline int block_x() { return emulated::machine().block[0]; }
inline int block_y() { return emulated::machine().block[1]; }
inline int block_z() { return emulated::machine().block[2]; }

inline void barrier() {
  emulated::arrive(emulated::machine().gate, emulated::machine().n_threads, "bar.sync");
}

inline uint32_t load_byte(const uint8_t* from) { return *from; }
inline uint32_t load_half(const uint8_t* from) { return emulated::load<uint16_t>(from); }
inline uint32_t load_word_once(const uint8_t* from) { return emulated::load<uint32_t>(from); }
inline Four load_four(const uint8_t* from) {
  emulated::require_aligned(from, 16);
  return emulated::load<Four>(from);
}
inline float load_float(const float* from) { return *from; }
inline void load_pair(const void* from, float& first, float& second) {
  emulated::require_aligned(from, 8);
  memcpy(&first, from, 4);
  memcpy(&second, static_cast<const uint8_t*>(from) + 4, 4);
}
inline void read_two(const uint8_t* from, uint32_t (&to)[2]) {
  emulated::require_aligned(from, 8);
  memcpy(to, from, 8);
}
inline Four read_four(const uint8_t* from) { return load_four(from); }

inline void start_copy(uint8_t* to, const uint8_t* from) {
  emulated::require_aligned(to, 16);
  emulated::require_aligned(from, 16);
  if (emulated::machine().order == emulated::Order::kBackward) {
    memcpy(to, from, 16);
  } else {
    emulated::current().groups.back().push_back({to, from});
  }
}
inline void end_copies() { emulated::current().groups.push_back({}); }
template <int N>
void wait_copies() {
  emulated::finish_copies(N);
}

inline uint32_t from_lane(uint32_t v, int lane) {
  emulated::require(lane >= 0 && lane < emulated::kLanes, "a lane is one of 32");
  return emulated::show(&v, 1, "shfl.idx")[lane][0];
}
inline uint32_t from_lane_xor(uint32_t v, int bits) {
  const int lane = thread_index() % emulated::kLanes;
  return emulated::show(&v, 1, "shfl.bfly")[lane ^ bits][0];
}

// The instruction wraps around; sums here must not.
inline int32_t add_products(uint32_t codes, uint32_t values, int32_t sum) {
  int64_t wide = sum;
  for (int i = 0; i < 4; ++i) {
    wide += emulated::unsigned_byte(codes, i) * emulated::signed_byte(values, i);
  }
  emulated::require(wide == static_cast<int32_t>(wide), "sums of products fit 32 bits");
  return static_cast<int32_t>(wide);
}

// mma.m16n8k32: element (row, k) of the codes is byte k % 4 of register row / 8 + k / 16 * 2 of lane
// row % 8 * 4 + k % 16 / 4; (k, column) of the values byte k % 4 of register k / 16 of lane
// column * 4 + k % 16 / 4; (row, column) of the sums register row / 8 * 2 + column % 2 of lane
// row % 8 * 4 + column / 2.
inline void add_matrix_products(int32_t (&sums)[4], uint32_t codes0, uint32_t codes1,
                                uint32_t codes2, uint32_t codes3, uint32_t values0,
                                uint32_t values1) {
  const uint32_t own[6] = {codes0, codes1, codes2, codes3, values0, values1};
  const auto shown = emulated::show(own, 6, "mma.m16n8k32");
  const int lane = thread_index() % emulated::kLanes;
  for (int i = 0; i < 4; ++i) {
    const int row = lane / 4 + i / 2 * 8, column = lane % 4 * 2 + i % 2;
    int64_t wide = sums[i];
    for (int k = 0; k < 32; ++k) {
      const uint32_t code = shown[row % 8 * 4 + k % 16 / 4][row / 8 + k / 16 * 2];
      const uint32_t value = shown[column * 4 + k % 16 / 4][4 + k / 16];
      wide += emulated::unsigned_byte(code, k % 4) * emulated::signed_byte(value, k % 4);
    }
    emulated::require(wide == static_cast<int32_t>(wide), "sums of products fit 32 bits");
    sums[i] = static_cast<int32_t>(wide);
  }
}

inline uint32_t bits_of(float v) {
  uint32_t bits;
  memcpy(&bits, &v, sizeof bits);
  return bits;
}
inline float float_of(uint32_t bits) {
  float v;
  memcpy(&v, &bits, sizeof v);
  return v;
}
inline int32_t nearest(float v) { return static_cast<int32_t>(lrintf(v)); }
inline float fused(float a, float b, float c) { return fmaf(a, b, c); }
inline float product(float a, float b) { return a * b; }
inline float difference(float a, float b) { return a - b; }
inline float quotient(float a, float b) { return a / b; }

inline float half_as_float(uint32_t half) {
  const int exponent = static_cast<int>(half >> 10 & 31);
  const float mantissa = static_cast<float>(half & 1023), sign = half & 0x8000 ? -1.0f : 1.0f;
  if (exponent == 31) return sign * (mantissa != 0.0f ? NAN : INFINITY);
  const float whole = exponent ? 1024.0f + mantissa : mantissa;
  return sign * ldexpf(whole, (exponent ? exponent : 1) - 25);
}
// To the nearest float of `mantissa_bits` whose smallest normal number is 2^least; even between two.
inline uint16_t rounded_float(float v, int mantissa_bits, int least, int most) {
  const uint32_t sign = bits_of(v) >> 16 & 0x8000u;
  const uint32_t infinity = static_cast<uint32_t>(most - least + 2) << mantissa_bits;
  if (v != v) return static_cast<uint16_t>(0x7fff);
  const double magnitude = fabs(static_cast<double>(v));
  if (magnitude == 0) return static_cast<uint16_t>(sign);
  int exponent;
  frexp(magnitude, &exponent);  // magnitude = f 2^exponent, f in [1/2, 1)
  exponent = exponent - 1 < least ? least : exponent - 1;
  if (exponent > most) return static_cast<uint16_t>(sign | infinity);
  const double steps = nearbyint(ldexp(magnitude, mantissa_bits - exponent));
  const double pattern = steps + ldexp(exponent - least, mantissa_bits);
  return static_cast<uint16_t>(sign | static_cast<uint32_t>(fmin(pattern, infinity)));
}
inline uint16_t float_as_half(float v) { return rounded_float(v, 10, -14, 15); }
inline uint16_t float_as_bfloat(float v) { return rounded_float(v, 7, -126, 127); }

}  // namespace gpu
}  // namespace lwquant
