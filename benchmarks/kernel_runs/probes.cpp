// What one core can do at best: bytes a second it reads, and int8 products a second it adds up.
// Compiled on the machine that is measured, by probes.py.
#include <immintrin.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

namespace {

constexpr size_t kHugePage = size_t{1} << 21;
constexpr size_t kLine = 64;

double seconds() {
  timespec now;
  clock_gettime(CLOCK_MONOTONIC, &now);
  return static_cast<double>(now.tv_sec) + 1e-9 * static_cast<double>(now.tv_nsec);
}

#ifdef __AVX512F__
using Vec = __m512i;
Vec load(const uint8_t* p) { return _mm512_load_si512(p); }
Vec merge(Vec a, Vec b) { return _mm512_or_si512(a, b); }
#else
using Vec = __m256i;
Vec load(const uint8_t* p) { return _mm256_load_si256(reinterpret_cast<const __m256i*>(p)); }
Vec merge(Vec a, Vec b) { return _mm256_or_si256(a, b); }
#endif

#ifdef __AVX512VNNI__
inline void dot(Vec& sum, Vec a, Vec b) {
  asm volatile("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(a), "v"(b));
}
#else
inline void dot(__m256i& sum, __m256i a, __m256i b) {
  asm volatile("" : "+x"(a));  // anew in every round
  const __m256i pairs = _mm256_maddubs_epi16(a, b);
  sum = _mm256_add_epi32(sum, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
}
#endif

volatile uint8_t kept;

void keep(Vec v) {
  uint8_t bytes[sizeof v];
  memcpy(bytes, &v, sizeof v);
  kept = bytes[0];
}

// Reads [begin, begin + n) once from its start, touching the lines `ahead` bytes further on.
void read_once(const uint8_t* begin, size_t n, size_t ahead) {
  Vec sums[4] = {};
  for (size_t at = 0; at + 4 * sizeof(Vec) <= n; at += 4 * sizeof(Vec)) {
    for (size_t i = 0; i < 4 && ahead; ++i) {
      _mm_prefetch(reinterpret_cast<const char*>(begin + at + i * sizeof(Vec) + ahead), _MM_HINT_T0);
    }
    for (size_t i = 0; i < 4; ++i) sums[i] = merge(sums[i], load(begin + at + i * sizeof(Vec)));
  }
  keep(merge(merge(sums[0], sums[1]), merge(sums[2], sums[3])));
}

// Operations a second (a product and its addition are two) of the widest int8 dot product, in
// registers, with more sums than its latency needs. Written out: g++ 12 keeps arrays in memory.
double probe_int8_vectors(int64_t rounds) {
  constexpr int kSums = 12;
  Vec a, b;
  memset(&a, 3, sizeof a), memset(&b, 1, sizeof b);
  Vec s0 = b, s1 = b, s2 = b, s3 = b, s4 = b, s5 = b, s6 = b, s7 = b, s8 = b, s9 = b, s10 = b;
  Vec s11 = b;
  const double start = seconds();
  for (int64_t i = 0; i < rounds; ++i) {
    dot(s0, a, b), dot(s1, a, b), dot(s2, a, b), dot(s3, a, b), dot(s4, a, b), dot(s5, a, b);
    dot(s6, a, b), dot(s7, a, b), dot(s8, a, b), dot(s9, a, b), dot(s10, a, b), dot(s11, a, b);
  }
  const double took = seconds() - start;
  keep(merge(merge(merge(s0, s1), merge(s2, s3)), merge(merge(s4, s5), merge(s6, s7))));
  keep(merge(merge(s8, s9), merge(s10, s11)));
  return 2.0 * static_cast<double>(rounds) * kSums * sizeof(Vec) / took;
}

// The same of tile registers, 0 where there are none. Of random values: with zeros in them the
// processor clocks a fifth higher, which no matmul sees.
double probe_int8_tiles(int64_t rounds) {
#ifdef __AMX_INT8__
  constexpr int kRequestPermission = 0x1023, kTileData = 18, kSums = 4;
  constexpr double kProducts = 16 * 16 * 64;
  if (syscall(SYS_arch_prctl, kRequestPermission, kTileData) != 0) return 0;
  alignas(64) uint8_t config[64] = {1};
  for (int t = 0; t < 8; ++t) config[16 + 2 * t] = 64, config[48 + t] = 16;
  _tile_loadconfig(config);
  alignas(64) uint8_t values[4][1024];
  uint32_t random = 1;
  for (auto& of_register : values) {
    for (uint8_t& value : of_register) {
      random = random * 1664525u + 1013904223u;
      value = static_cast<uint8_t>(random >> 24);
    }
  }
  asm volatile("" ::"r"(values) : "memory");  // g++ 12 does not know that they are read
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  _tile_loadd(4, values[0], 64);
  _tile_loadd(5, values[1], 64);
  _tile_loadd(6, values[2], 64);
  _tile_loadd(7, values[3], 64);
  const double start = seconds();
  for (int64_t i = 0; i < rounds / kSums; ++i) {
    _tile_dpbusd(0, 4, 6);
    _tile_dpbusd(1, 4, 7);
    _tile_dpbusd(2, 5, 6);
    _tile_dpbusd(3, 5, 7);
  }
  const double took = seconds() - start;
  _tile_release();
  return 2.0 * static_cast<double>(rounds) * kProducts / took;
#else
  (void)rounds;
  return 0;
#endif
}

}  // namespace

extern "C" {

// Memory in huge pages, written to; freed by nobody, the process is short.
uint8_t* probe_buffer(size_t n) {
  void* memory = nullptr;
  n = (n + kHugePage - 1) / kHugePage * kHugePage;
  if (posix_memalign(&memory, kHugePage, n)) return nullptr;
  madvise(memory, n, MADV_HUGEPAGE);
  memset(memory, 1, n);
  return static_cast<uint8_t*>(memory);
}

// Bytes a second of one pass over the buffer.
double probe_read(const uint8_t* buffer, size_t n, size_t ahead) {
  const double start = seconds();
  read_once(buffer, n, ahead);
  return static_cast<double>(n) / (seconds() - start);
}

// Operations a second of the faster of both.
double probe_int8(int64_t rounds) {
  const double vectors = probe_int8_vectors(rounds), tiles = probe_int8_tiles(rounds);
  return tiles > vectors ? tiles : vectors;
}

}  // extern "C"
