// Which of oneDNN's block products this CPU and this torch have, found by using them.

#include "common.h"

namespace {

using namespace lx;
constexpr int64_t kSize = 64;

bool int8_works() {
  auto a = scratch<uint8_t>(kSize * kSize);
  auto b = scratch<int8_t>(kSize * kSize);
  auto c = scratch<int32_t>(kSize * kSize);
  for (int64_t i = 0; i < kSize * kSize; ++i) a[i] = 255, b[i] = 127;  // sums of neighbours overflow 16 bits
  at::native::cpublas::brgemm(kSize, kSize, kSize, kSize, kSize, kSize, false, a.get(),
                              reinterpret_cast<const signed char*>(b.get()), c.get(), true);
  return std::all_of(c.get(), c.get() + kSize * kSize, [](int32_t sum) { return sum == 255 * 127 * kSize; });
}

bool bfloat16_works() {
  auto a = scratch<bf16>(kSize * kSize), b = scratch<bf16>(kSize * kSize);
  auto c = scratch<float>(kSize * kSize);
  for (int64_t i = 0; i < kSize * kSize; ++i) store(1.5f, &a[i]), store(-2.0f, &b[i]);
  at::native::cpublas::brgemm(kSize, kSize, kSize, kSize, kSize, kSize, false,
                              reinterpret_cast<const c10::BFloat16*>(a.get()),
                              reinterpret_cast<const c10::BFloat16*>(b.get()), c.get(), true);
  return std::all_of(c.get(), c.get() + kSize * kSize, [](float sum) { return sum == -3.0f * kSize; });
}

template <class Test>
bool holds(Test test) {
  bool good = false;
  try {
    good = test();
    at::native::cpublas::brgemm_release(true);
  } catch (...) {
  }
  return good;
}

}  // namespace

// Bit 0: uint8 times int8; bit 1: bfloat16.
extern "C" int lx_supports() { return int(holds(int8_works)) | int(holds(bfloat16_works)) << 1; }
