// What every kernel here needs: number formats, the row blocks that threads share out, and oneDNN's block product.
#pragma once

#include <omp.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <memory>

#if defined(__AVX512F__)
#include <immintrin.h>
#endif

// libtorch_cpu exports oneDNN's batch-reduce GEMM ("brgemm") with these signatures. Declaring them here in place of
// including torch's headers keeps the compilation at a second. is_vnni: B is packed as [K/p][N][p], p = 4 bytes / width.
namespace c10 {
struct BFloat16;
}
namespace at::native::cpublas {
void brgemm(int64_t m, int64_t n, int64_t k, int64_t lda, int64_t ldb, int64_t ldc, const bool add,
            const unsigned char* a, const signed char* b, int32_t* c, bool is_vnni);
void brgemm(int64_t m, int64_t n, int64_t k, int64_t lda, int64_t ldb, int64_t ldc, const bool add,
            const c10::BFloat16* a, const c10::BFloat16* b, float* c, bool is_vnni);
void brgemm_release(bool is_vnni);
}  // namespace at::native::cpublas

namespace lx {

using bf16 = uint16_t;
constexpr int64_t kColumns = 64;  // output channels that one product computes

inline float from_bits(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}
inline uint32_t to_bits(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  return bits;
}

inline float load(const bf16* p) { return from_bits(uint32_t(*p) << 16); }
inline float load(const float* p) { return *p; }
inline void store(float value, float* p) { *p = value; }
inline void store(float value, bf16* p) {  // to nearest, ties to even
  const uint32_t bits = to_bits(value);
  const uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  *p = bf16((bits & 0x7fffffff) > 0x7f800000 ? 0x7fc0 : rounded);
}

// Uninitialised scratch of one thread, aligned to cache lines.
template <class T>
std::unique_ptr<T[], decltype(&std::free)> scratch(int64_t count) {
  const size_t bytes = (size_t(count) * sizeof(T) + 127) / 64 * 64;
  return {static_cast<T*>(std::aligned_alloc(64, bytes)), &std::free};
}

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Rows per block: at most `most`, the same number of blocks for each thread.
inline int64_t row_block(int64_t rows, int64_t most) {
  const int64_t threads = omp_get_max_threads();
  const int64_t blocks = ceil_div(rows, most * threads) * threads;
  return std::max<int64_t>(1, std::min(most, ceil_div(ceil_div(rows, blocks), 8) * 8));
}

// Runs body(index) for index in [0, count) on all threads. C callers know no exceptions: false says that one was thrown.
template <class Scratch, class Body>
bool parallel(int64_t count, Scratch make_scratch, Body body) {
  bool good = true;
#pragma omp parallel
  {
    auto own = make_scratch();
#pragma omp for schedule(dynamic)
    for (int64_t index = 0; index < count; ++index) {
      try {
        body(index, own);
      } catch (...) {
#pragma omp atomic write
        good = false;
      }
    }
    at::native::cpublas::brgemm_release(true);
  }
  return good;
}

}  // namespace lx
