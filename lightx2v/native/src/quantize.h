// One row of activations to codes, with the arithmetic of lightx2v/quant/numerics.py (Rounding "levels").
#pragma once

#include "common.h"

namespace lx {

// Largest |x|; an inf or NaN among them comes out as such, since their bits are the largest integers.
template <class T>
float absolute_maximum(const T* x, int64_t k) {
  uint32_t most = 0;
#pragma omp simd reduction(max : most)
  for (int64_t i = 0; i < k; ++i) most = std::max(most, to_bits(load(x + i)) & 0x7fffffffu);
  return from_bits(most);
}

inline float multiplier(float amax, float levels) { return std::min(levels / amax, 3.402823466e38f); }

// int8 codes shifted by 128, as oneDNN's unsigned operand; the columns up to `padded` are zero codes.
template <class T>
float quantize_int8(const T* x, int64_t k, int64_t padded, uint8_t* codes) {
  const float amax = absolute_maximum(x, k), by = multiplier(amax, 127.0f);
#pragma omp simd
  for (int64_t i = 0; i < k; ++i) codes[i] = uint8_t(int32_t(__builtin_rintf(load(x + i) * by)) + 128);
  std::memset(codes + k, 128, padded - k);
  return amax / 127.0f;
}

// The nearest e4m3 value, ties to even, of |value| <= 448.
inline float round_e4m3(float value) {
  const uint32_t bits = to_bits(value);
  const float normal = from_bits((bits + 0x7ffff + ((bits >> 20) & 1)) & 0xfff00000u);
  const float subnormal = __builtin_rintf(value * 512.0f) * (1.0f / 512.0f);  // steps of 2**-9 below 2**-6
  return std::fabs(value) < 0.015625f ? subnormal : normal;
}

// e4m3 codes as bfloat16, which holds each of them exactly.
template <class T>
float quantize_e4m3(const T* x, int64_t k, bf16* codes) {
  const float amax = absolute_maximum(x, k), by = multiplier(amax, 448.0f);
#pragma omp simd
  for (int64_t i = 0; i < k; ++i) codes[i] = bf16(to_bits(round_e4m3(load(x + i) * by)) >> 16);
  return amax / 448.0f;
}

// `count` e4m3 bytes to bfloat16, without touching subnormal floats, which some CPUs are slow with.
inline void decode_e4m3(const uint8_t* codes, int64_t count, bf16* out) {
  int64_t i = 0;
#if defined(__AVX512BW__)
  alignas(64) int16_t small[32];  // 0..7 times 2**-9, four times
  for (int j = 0; j < 32; ++j) small[j] = int16_t(to_bits(float(j % 8) * (1.0f / 512.0f)) >> 16);
  const __m512i subnormal = _mm512_load_si512(small);
  for (; i + 32 <= count; i += 32) {
    const __m512i code = _mm512_cvtepu8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(codes + i)));
    const __m512i magnitude = _mm512_and_si512(code, _mm512_set1_epi16(0x7f));
    __m512i value = _mm512_add_epi16(_mm512_slli_epi16(magnitude, 4), _mm512_set1_epi16(120 << 7));
    const __mmask32 is_small = _mm512_cmplt_epu16_mask(magnitude, _mm512_set1_epi16(8));
    value = _mm512_mask_permutexvar_epi16(value, is_small, magnitude, subnormal);
    const __m512i sign = _mm512_slli_epi16(_mm512_and_si512(code, _mm512_set1_epi16(0x80)), 8);
    _mm512_storeu_si512(out + i, _mm512_or_si512(value, sign));
  }
#endif
#pragma omp simd
  for (int64_t j = i; j < count; ++j) {
    const uint32_t magnitude = codes[j] & 0x7fu;
    const uint32_t normal = (magnitude << 4) + (120 << 7);
    const uint32_t small_value = to_bits(float(int32_t(magnitude)) * (1.0f / 512.0f)) >> 16;
    out[j] = bf16((magnitude < 8 ? small_value : normal) | (codes[j] & 0x80u) << 8);
  }
}

// What a layer is given: rows of floats, or codes that were quantized before, with `groups` scales each.
template <class T>
struct Values {
  const T* data;
  int64_t stride;
  Values from(int64_t row) const { return {data + row * stride, stride}; }
};
struct Codes {
  const uint8_t* data;
  const float* scales;
  int64_t stride, groups;
  Codes from(int64_t row) const { return {data + row * stride, scales + row * groups, stride, groups}; }
};

}  // namespace lx
