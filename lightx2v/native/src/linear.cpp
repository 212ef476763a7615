// Quantized linear layers: y[M, N] = x[M, K] W^T + b, quantizing x, multiplying and rescaling a block of rows at a time, so
// that codes and sums stay in the caches.

#include "panels.h"

namespace {

using namespace lx;

struct Int8 {
  using Code = uint8_t;
  using Acc = int32_t;
  static constexpr int64_t kDepth = 2048;
  Layer layer;
  const int8_t* weight;
  const int32_t* shift;  // [N]: 128 times the sum of a channel's codes, which the shifted activations add

  int64_t code_count(int64_t rows) const { return rows * layer.padded; }
  int64_t token_scales() const { return 1; }
  int64_t panel_count() const { return 0; }

  template <class T>
  void quantize(const Values<T>& x, int64_t rows, Code* codes, float* scales) const {
    for (int64_t i = 0; i < rows; ++i)
      scales[i] = quantize_int8(x.from(i).data, layer.k, layer.padded, codes + i * layer.padded);
  }
  void quantize(const Codes& x, int64_t rows, Code* codes, float* scales) const {
    for (int64_t i = 0; i < rows; ++i) {
      const uint8_t* from = x.from(i).data;
      Code* to = codes + i * layer.padded;
      for (int64_t k = 0; k < layer.padded; ++k) to[k] = k < layer.k ? from[k] ^ 128 : 128;
      scales[i] = x.scales[i];
    }
  }
  void product(const Code* codes, const float*, int64_t rows, int64_t panel, bf16*, float*, Acc* sums) const {
    const int8_t* w = weight + panel * layer.padded * kColumns;
    for (int64_t k = 0; k < layer.padded; k += kDepth)
      at::native::cpublas::brgemm(rows, kColumns, std::min(kDepth, layer.padded - k), layer.padded, kColumns, kColumns,
                                  k > 0, codes + k, reinterpret_cast<const signed char*>(w + k * kColumns), sums, true);
  }
  template <int kEpilogue, class Y>
  void finish(const Acc* sums, const float* scales, int64_t rows, int64_t panel, Y* y) const {
    finish_panel<kEpilogue>(layer, sums, shift, layer.scale, scales, rows, panel, y);
  }
};

// e4m3 weights of one byte, turned into bfloat16 a few kilobytes at a time right before they are multiplied.
struct Fp8Channel {
  using Code = bf16;
  using Acc = float;
  static constexpr int64_t kDepth = 512;
  Layer layer;
  const uint8_t* weight;

  int64_t code_count(int64_t rows) const { return rows * layer.padded; }
  int64_t token_scales() const { return 1; }
  int64_t panel_count() const { return kDepth * kColumns; }

  template <class T>
  void quantize(const Values<T>& x, int64_t rows, Code* codes, float* scales) const {
    for (int64_t i = 0; i < rows; ++i) {
      scales[i] = quantize_e4m3(x.from(i).data, layer.k, codes + i * layer.padded);
      std::memset(codes + i * layer.padded + layer.k, 0, (layer.padded - layer.k) * sizeof(Code));
    }
  }
  void quantize(const Codes& x, int64_t rows, Code* codes, float* scales) const {
    for (int64_t i = 0; i < rows; ++i) {
      decode_e4m3(x.from(i).data, layer.k, codes + i * layer.padded);
      std::memset(codes + i * layer.padded + layer.k, 0, (layer.padded - layer.k) * sizeof(Code));
      scales[i] = x.scales[i];
    }
  }
  void product(const Code* codes, const float*, int64_t rows, int64_t panel, bf16* decoded, float*, Acc* sums) const {
    const uint8_t* w = weight + panel * layer.padded * kColumns;
    for (int64_t k = 0; k < layer.padded; k += kDepth) {
      const int64_t depth = std::min(kDepth, layer.padded - k);
      decode_e4m3(w + k * kColumns, depth * kColumns, decoded);
      multiply(rows, depth, layer.padded, k > 0, codes + k, decoded, sums);
    }
  }
  template <int kEpilogue, class Y>
  void finish(const Acc* sums, const float* scales, int64_t rows, int64_t panel, Y* y) const {
    finish_panel<kEpilogue>(layer, sums, nullptr, layer.scale, scales, rows, panel, y);
  }
};

// 128 x 128 blocks: a sum for each group of 128 input channels, scaled in float32 and added up.
struct Fp8Block {
  using Code = bf16;
  using Acc = float;
  static constexpr int64_t kGroup = 128, kChunk = 8 * kGroup;
  static constexpr int64_t kTile = 64;  // rows whose sums stay in the innermost cache through the groups of a chunk
  Layer layer;
  const uint8_t* weight;

  int64_t groups() const { return layer.padded / kGroup; }
  int64_t code_count(int64_t rows) const { return rows * layer.padded; }
  int64_t token_scales() const { return groups(); }
  int64_t panel_count() const { return kChunk * kColumns; }

  template <class T>
  void quantize(const Values<T>& x, int64_t rows, Code* codes, float* scales) const {
    for (int64_t i = 0; i < rows; ++i)
      for (int64_t g = 0; g < groups(); ++g) {
        const int64_t start = g * kGroup, count = std::min(kGroup, layer.k - start);
        Code* out = codes + i * layer.padded + start;
        scales[g * rows + i] = quantize_e4m3(x.from(i).data + start, count, out);
        std::memset(out + count, 0, (kGroup - count) * sizeof(Code));
      }
  }
  void quantize(const Codes& x, int64_t rows, Code* codes, float* scales) const {
    for (int64_t i = 0; i < rows; ++i) {
      decode_e4m3(x.from(i).data, layer.k, codes + i * layer.padded);
      std::memset(codes + i * layer.padded + layer.k, 0, (layer.padded - layer.k) * sizeof(Code));
      for (int64_t g = 0; g < groups(); ++g) scales[g * rows + i] = x.from(i).scales[g];
    }
  }
  void product(const Code* codes, const float* scales, int64_t rows, int64_t panel, bf16* decoded, float* part,
               Acc* sums) const {
    const uint8_t* w = weight + panel * layer.padded * kColumns;
    const float* block = layer.scale + panel * kColumns / kGroup * groups();
    for (int64_t start = 0; start < layer.padded; start += kChunk) {
      const int64_t depth = std::min(kChunk, layer.padded - start);
      decode_e4m3(w + start * kColumns, depth * kColumns, decoded);
      for (int64_t row = 0; row < rows; row += kTile) {
        const int64_t count = std::min(kTile, rows - row);
        for (int64_t k = start; k < start + depth; k += kGroup) {
          const int64_t g = k / kGroup;
          multiply(count, kGroup, layer.padded, false, codes + row * layer.padded + k, decoded + (k - start) * kColumns, part);
          add(part, scales + g * rows + row, block[g], count, k > 0, sums + row * kColumns);
        }
      }
    }
  }
  static void add(const float* part, const float* scales, float block, int64_t rows, bool more, Acc* sums) {
    for (int64_t i = 0; i < rows; ++i) {
      const float by = scales[i] * block;
      const float* from = part + i * kColumns;
      float* to = sums + i * kColumns;
      if (more) {
#pragma omp simd
        for (int64_t j = 0; j < kColumns; ++j) to[j] += from[j] * by;
      } else {
#pragma omp simd
        for (int64_t j = 0; j < kColumns; ++j) to[j] = from[j] * by;
      }
    }
  }
  template <int kEpilogue, class Y>
  void finish(const Acc* sums, const float*, int64_t rows, int64_t panel, Y* y) const {
    finish_panel<kEpilogue>(layer, sums, nullptr, nullptr, nullptr, rows, panel, y);
  }
};

struct Call {
  const void* x;
  const float* x_scales;  // of codes, [M, groups]
  int64_t x_stride, rows;
  void* y;
  int input, epilogue;
};

template <class Kind>
bool dispatch(const Kind& kind, const Call& call) {
  const auto start = [&](const auto& x, auto* y) {
    return call.epilogue ? run<Kind, kGeluTanh>(kind, x, call.rows, y) : run<Kind, kNone>(kind, x, call.rows, y);
  };
  if (call.input == kBfloat16)
    return start(Values<bf16>{static_cast<const bf16*>(call.x), call.x_stride}, static_cast<bf16*>(call.y));
  auto* y = static_cast<float*>(call.y);
  if (call.input == kFloat32) return start(Values<float>{static_cast<const float*>(call.x), call.x_stride}, y);
  const auto* codes = static_cast<const uint8_t*>(call.x);
  return start(Codes{codes, call.x_scales, call.x_stride, kind.token_scales()}, y);
}

}  // namespace

extern "C" {

// Of each: x [m, k] with rows x_stride apart is bfloat16, float32, or codes with x_scales (`input`); y [m, n] is bfloat16
// in the first case, else float32. Returns whether it worked.
bool lx_linear_int8(const void* x, const float* x_scales, int64_t x_stride, void* y, int64_t m, int64_t n, int64_t k,
                    int64_t padded, int input, int epilogue, const float* bias, const float* scale, const int8_t* weight,
                    const int32_t* shift) {
  return dispatch(Int8{{n, k, padded, scale, bias}, weight, shift}, {x, x_scales, x_stride, m, y, input, epilogue});
}

bool lx_linear_fp8(const void* x, const float* x_scales, int64_t x_stride, void* y, int64_t m, int64_t n, int64_t k,
                   int64_t padded, int input, int epilogue, const float* bias, const float* scale, const uint8_t* weight) {
  return dispatch(Fp8Channel{{n, k, padded, scale, bias}, weight}, {x, x_scales, x_stride, m, y, input, epilogue});
}

bool lx_linear_fp8_block(const void* x, const float* x_scales, int64_t x_stride, void* y, int64_t m, int64_t n, int64_t k,
                         int64_t padded, int input, int epilogue, const float* bias, const float* scale,
                         const uint8_t* weight) {
  return dispatch(Fp8Block{{n, k, padded, scale, bias}, weight}, {x, x_scales, x_stride, m, y, input, epilogue});
}
}
