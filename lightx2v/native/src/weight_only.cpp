// Linear layers whose weights alone are quantized: y[M, N] = x[M, K] W^T + b, codes turned into bfloat16 a few kilobytes at
// a time right before they are multiplied. bfloat16 holds every code exactly; scales are applied to sums, in float32.

#include "panels.h"

namespace {

using namespace lx;

constexpr int64_t kPair = 2 * kColumns;  // codes of two input channels, [64][2], which one step of a panel holds

// Each decodes `pairs` steps of a panel into kPair bfloat16 numbers each: code less kMiddle.
struct Bits8 {  // signed bytes; of unsigned codes less 128
  static constexpr int64_t kBytes = kPair;
  static constexpr float kMiddle = 128;
  static void decode(const uint8_t* codes, int64_t pairs, bf16* out) {
#pragma omp simd
    for (int64_t i = 0; i < pairs * kPair; ++i) out[i] = bf16(to_bits(float(int8_t(codes[i]))) >> 16);
  }
};

struct Float8 {  // e4m3
  static constexpr int64_t kBytes = kPair;
  static constexpr float kMiddle = 0;
  static void decode(const uint8_t* codes, int64_t pairs, bf16* out) { decode_e4m3(codes, pairs * kPair, out); }
};

// Byte j holds the codes j, j + kBytes, j + 2 kBytes, ... of a step, the first in its lowest bits.
template <int kBits>
struct Few {
  static constexpr int64_t kBytes = kPair * kBits / 8;
  static constexpr float kMiddle = 1 << (kBits - 1);
  static void decode(const uint8_t* codes, int64_t pairs, bf16* out) {
    constexpr int kMask = (1 << kBits) - 1, kHalf = 1 << (kBits - 1);
#if defined(__AVX512BW__)
    alignas(64) bf16 values[32];
    for (int j = 0; j < 32; ++j) values[j] = bf16(to_bits(float((j & kMask) - kHalf)) >> 16);
    const __m512i table = _mm512_load_si512(values);
    for (int64_t step = 0; step < pairs; ++step, codes += kBytes, out += kPair)
      for (int64_t j = 0; j < kBytes; j += 32) {
        __m512i code = _mm512_cvtepu8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(codes + j)));
        for (int part = 0; part < 8 / kBits; ++part, code = _mm512_srli_epi16(code, kBits))
          _mm512_storeu_si512(out + part * kBytes + j,
                              _mm512_permutexvar_epi16(_mm512_and_si512(code, _mm512_set1_epi16(kMask)), table));
      }
#else
    for (int64_t step = 0; step < pairs; ++step, codes += kBytes, out += kPair)
      for (int part = 0; part < 8 / kBits; ++part) {
#pragma omp simd
        for (int64_t j = 0; j < kBytes; ++j)
          out[part * kBytes + j] = bf16(to_bits(float(int(codes[j] >> (part * kBits) & kMask) - kHalf)) >> 16);
      }
#endif
  }
};

// What is the same for every width of codes. `layer.scale` is [N] for whole rows, [panels][groups][64] for groups.
struct Weight {
  Layer layer;
  const uint8_t* codes;
  const float* zero;  // as the scales, [panels][groups][64]; null where codes are symmetric
  int64_t group;      // input channels under one scale; 0: whole rows
  int64_t parts;      // bfloat16 numbers that stand for one of x: 2 for float32
};

template <class Decoder>
struct WeightOnly : Weight {
  using Code = bf16;
  using Acc = float;
  static constexpr int64_t kDepth = 512;
  static constexpr int64_t kTile = 64;  // rows whose sums stay in the innermost cache through the groups of a chunk

  int64_t groups() const { return group ? layer.padded / group : 1; }
  int64_t chunk() const { return group ? std::max<int64_t>(1, 2 * kDepth / group) * group : kDepth; }
  int64_t code_count(int64_t rows) const { return rows * layer.padded * parts; }
  int64_t token_scales() const { return groups(); }
  int64_t panel_count() const { return chunk() * kColumns; }

  // Rows of x as bfloat16, float32 as the sum of two; and the sums of its groups, which zero points are multiplied with.
  template <class T>
  void quantize(const Values<T>& x, int64_t rows, Code* to, float* sums) const {
    for (int64_t i = 0; i < rows; ++i) {
      const T* from = x.from(i).data;
      for (int64_t part = 0; part < parts; ++part) {
        Code* out = to + (part * rows + i) * layer.padded;
        if constexpr (sizeof(T) == sizeof(Code)) {
          std::memcpy(out, from, layer.k * sizeof(Code));
        } else {
          const Code* first = to + i * layer.padded;
#pragma omp simd
          for (int64_t k = 0; k < layer.k; ++k) store(part ? from[k] - load(first + k) : from[k], out + k);
        }
        std::memset(out + layer.k, 0, (layer.padded - layer.k) * sizeof(Code));
      }
      if (zero)
        for (int64_t g = 0; g < groups(); ++g) {
          const int64_t start = group ? g * group : 0, stop = group ? std::min(start + group, layer.k) : layer.k;
          float sum = 0;
#pragma omp simd reduction(+ : sum)
          for (int64_t k = start; k < stop; ++k) sum += load(from + k);
          sums[g * rows + i] = sum;
        }
    }
  }

  void product(const Code* x, const float* x_sums, int64_t rows, int64_t panel, bf16* decoded, float* part,
               Acc* sums) const {
    const uint8_t* w = codes + panel * (layer.padded / 2) * Decoder::kBytes;
    for (int64_t start = 0; start < layer.padded; start += chunk()) {
      const int64_t depth = std::min(chunk(), layer.padded - start);
      Decoder::decode(w + start / 2 * Decoder::kBytes, depth / 2, decoded);
      if (!group) {
        add_product(x, rows, 0, rows, start, depth, start > 0, decoded, sums);
        continue;
      }
      for (int64_t row = 0; row < rows; row += kTile) {
        const int64_t count = std::min(kTile, rows - row);
        for (int64_t k = start; k < start + depth; k += group) {
          add_product(x, rows, row, count, k, group, false, decoded + (k - start) * kColumns, part);
          rescale(part, x_sums + k / group * rows + row, panel, k / group, count, k > 0, sums + row * kColumns);
        }
      }
    }
    if (!group && zero)
      for (int64_t i = 0; i < rows; ++i)
#pragma omp simd
        for (int64_t j = 0; j < kColumns; ++j)
          sums[i * kColumns + j] -= x_sums[i] * (zero[panel * kColumns + j] - Decoder::kMiddle);
  }

  // `depth` input channels from `k` on, of `count` rows from `row` on.
  void add_product(const Code* x, int64_t rows, int64_t row, int64_t count, int64_t k, int64_t depth, bool add,
                   const bf16* decoded, float* sums) const {
    for (int64_t p = 0; p < parts; ++p)
      multiply(count, depth, layer.padded, add || p > 0, x + (p * rows + row) * layer.padded + k, decoded, sums);
  }

  void rescale(const float* part, const float* x_sums, int64_t panel, int64_t g, int64_t rows, bool more,
               Acc* sums) const {
    const int64_t place = (panel * groups() + g) * kColumns;
    const float* scale = layer.scale + place;
    float middle[kColumns] = {};
    if (zero)
      for (int64_t j = 0; j < kColumns; ++j) middle[j] = zero[place + j] - Decoder::kMiddle;
    for (int64_t i = 0; i < rows; ++i) {
      const float* from = part + i * kColumns;
      const float sum = zero ? x_sums[i] : 0.0f;
      float* to = sums + i * kColumns;
#pragma omp simd
      for (int64_t j = 0; j < kColumns; ++j)
        to[j] = (more ? to[j] : 0.0f) + (from[j] - sum * middle[j]) * scale[j];
    }
  }

  template <int kEpilogue, class Y>
  void finish(const Acc* sums, const float*, int64_t rows, int64_t panel, Y* y) const {
    finish_panel<kEpilogue>(layer, sums, nullptr, group ? nullptr : layer.scale, nullptr, rows, panel, y);
  }
};

template <class Decoder>
bool start(const Weight& weight, const void* x, int64_t stride, int64_t rows, void* y, int epilogue) {
  const WeightOnly<Decoder> kind{weight};
  const auto with = [&](const auto& values, auto* out) {
    return epilogue ? run<WeightOnly<Decoder>, kGeluTanh>(kind, values, rows, out)
                    : run<WeightOnly<Decoder>, kNone>(kind, values, rows, out);
  };
  if (weight.parts == 1) return with(Values<bf16>{static_cast<const bf16*>(x), stride}, static_cast<bf16*>(y));
  return with(Values<float>{static_cast<const float*>(x), stride}, static_cast<float*>(y));
}

}  // namespace

// x [m, k] with rows x_stride apart and y [m, n] are bfloat16, or float32 if `input` says so. `kind`: bits of integer codes,
// or 0 for e4m3. Returns whether it worked.
extern "C" bool lx_linear_weight_only(const void* x, int64_t x_stride, void* y, int64_t m, int64_t n, int64_t k,
                                      int64_t padded, int input, int epilogue, const float* bias, const float* scale,
                                      const uint8_t* codes, const float* zero, int64_t group, int kind) {
  const Weight weight{{n, k, padded, scale, bias}, codes, zero, group, input == kFloat32 ? 2 : 1};
  switch (kind) {
    case 0: return start<Float8>(weight, x, x_stride, m, y, epilogue);
    case 2: return start<Few<2>>(weight, x, x_stride, m, y, epilogue);
    case 4: return start<Few<4>>(weight, x, x_stride, m, y, epilogue);
    case 8: return start<Bits8>(weight, x, x_stride, m, y, epilogue);
    default: return false;
  }
}
