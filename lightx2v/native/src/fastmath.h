// exp and what is made of it, as polynomials that compilers turn into vector code.
#pragma once

#include "common.h"

namespace lx {

// 2**x for x clamped to [-126, 126], relative error below 2e-7.
inline float exp2_bounded(float x) {
  const float bounded = std::min(std::max(x, -126.0f), 126.0f);
  const float whole = __builtin_rintf(bounded), f = bounded - whole;
  float p = 1.3333558e-3f;
  p = p * f + 9.6181291e-3f;
  p = p * f + 5.5504109e-2f;
  p = p * f + 2.4022651e-1f;
  p = p * f + 6.9314718e-1f;
  p = p * f + 1.0f;
  return from_bits(to_bits(p) + (uint32_t(int32_t(whole)) << 23));
}

// GELU with the tanh approximation (Hendrycks & Gimpel 2016): x * sigmoid(2 u), u = sqrt(2/pi) (x + 0.044715 x^3).
inline float gelu_tanh(float x) {
  constexpr float factor = -2.302208198f;  // -2 log2(e) sqrt(2/pi)
  return x / (1.0f + exp2_bounded(factor * (x + 0.044715f * x * x * x)));
}

}  // namespace lx
