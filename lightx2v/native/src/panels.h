// What quantized linear layers have in common: the packed weight's shape, the end of a product, and how threads share it out.
// W is packed in panels of 64 output channels, [N/64][K/p][64][p].
#pragma once

#include "fastmath.h"
#include "quantize.h"

namespace lx {

struct Layer {
  int64_t n, k, padded;  // padded: K filled up to what the panels hold
  const float* scale;    // [N], or [ceil(N/128), ceil(K/128)] for blocks
  const float* bias;     // [N] or null
};

constexpr int64_t kRows = 256;
enum Epilogue : int { kNone = 0, kGeluTanh = 1 };

// One row of sums to outputs: sum * channel scale * token scale + bias, each step rounded, as the reference does.
template <int kEpilogue, class Acc, class Y>
inline void finish_row(const Acc* sums, const int32_t* shift, const float* scale, float token, const float* bias,
                       int64_t count, Y* y) {
  float values[kColumns];  // short loops, each of which the compiler turns into vector code
  if (shift) {
#pragma omp simd
    for (int64_t j = 0; j < count; ++j) values[j] = float(sums[j] - Acc(shift[j]));
  } else {
#pragma omp simd
    for (int64_t j = 0; j < count; ++j) values[j] = float(sums[j]);
  }
  if (scale) {
#pragma omp simd
    for (int64_t j = 0; j < count; ++j) values[j] = values[j] * scale[j] * token;
  }
  if (bias) {
#pragma omp simd
    for (int64_t j = 0; j < count; ++j) values[j] += bias[j];
  }
  if (kEpilogue == kGeluTanh) {
#pragma omp simd
    for (int64_t j = 0; j < count; ++j) values[j] = gelu_tanh(values[j]);
  }
#pragma omp simd
  for (int64_t j = 0; j < count; ++j) store(values[j], y + j);
}

// The same for the rows of a panel; `shift`, `scale` and `tokens` are null where a kind has none.
template <int kEpilogue, class Acc, class Y>
void finish_panel(const Layer& layer, const Acc* sums, const int32_t* shift, const float* scale, const float* tokens,
                  int64_t rows, int64_t panel, Y* y) {
  const int64_t first = panel * kColumns, count = std::min(kColumns, layer.n - first);
  for (int64_t i = 0; i < rows; ++i)
    finish_row<kEpilogue>(sums + i * kColumns, shift ? shift + first : nullptr, scale ? scale + first : nullptr,
                          tokens ? tokens[i] : 1.0f, layer.bias ? layer.bias + first : nullptr, count,
                          y + i * layer.n + first);
}

inline void multiply(int64_t rows, int64_t depth, int64_t lda, bool add, const bf16* codes, const bf16* panel, float* sums) {
  at::native::cpublas::brgemm(rows, kColumns, depth, lda, kColumns, kColumns, add,
                              reinterpret_cast<const c10::BFloat16*>(codes),
                              reinterpret_cast<const c10::BFloat16*>(panel), sums, true);
}

template <class Kind>
struct Scratch {
  decltype(scratch<typename Kind::Code>(0)) codes;
  decltype(scratch<float>(0)) scales;
  decltype(scratch<bf16>(0)) decoded;
  decltype(scratch<float>(0)) part;
  decltype(scratch<typename Kind::Acc>(0)) sums;

  Scratch(const Kind& kind, int64_t rows)
      : codes(scratch<typename Kind::Code>(kind.code_count(rows))),
        scales(scratch<float>(rows * kind.token_scales())),
        decoded(scratch<bf16>(kind.panel_count())),
        part(scratch<float>(kind.panel_count() ? rows * kColumns : 0)),
        sums(scratch<typename Kind::Acc>(rows * kColumns)) {}
};

// Many rows: each thread takes blocks of rows through all panels. Few rows: all rows are quantized by each thread, which is
// little work, and the threads share out the panels.
template <class Kind, int kEpilogue, class X, class Y>
bool run(const Kind& kind, const X& x, int64_t rows, Y* y) {
  const int64_t panels = ceil_div(kind.layer.n, kColumns), threads = omp_get_max_threads();
  const bool by_rows = threads == 1 || rows >= threads * 64;
  const int64_t block = by_rows ? row_block(rows, kRows) : std::min(rows, kRows);
  const int64_t blocks = ceil_div(rows, block);
  const int64_t shares = by_rows ? 1 : std::min(threads, panels);
  const auto body = [&](int64_t index, Scratch<Kind>& own) {
    const int64_t first = index / shares * block, count = std::min(block, rows - first), share = index % shares;
    kind.quantize(x.from(first), count, own.codes.get(), own.scales.get());
    for (int64_t panel = panels * share / shares; panel < panels * (share + 1) / shares; ++panel) {
      kind.product(own.codes.get(), own.scales.get(), count, panel, own.decoded.get(), own.part.get(), own.sums.get());
      kind.template finish<kEpilogue>(own.sums.get(), own.scales.get(), count, panel, y + first * kind.layer.n);
    }
  };
  return parallel(blocks * shares, [&] { return Scratch<Kind>(kind, block); }, body);
}

// What x and y hold.
enum Input : int { kBfloat16 = 0, kFloat32 = 1, kCodes = 2 };

}  // namespace lx
