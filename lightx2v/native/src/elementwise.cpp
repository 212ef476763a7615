// What a transformer block does between its products, one pass over the rows each. Sums and norms are float32.

#include "fastmath.h"

namespace {

using namespace lx;

template <class Body>
void each_row(int64_t rows, Body body) {
#pragma omp parallel for schedule(static)
  for (int64_t row = 0; row < rows; ++row) body(row);
}

template <class Y>
void layer_norm(const float* x, const float* factor, const float* offset, Y* y, int64_t rows, int64_t width,
                int64_t rows_per_batch, int64_t batch_stride, float eps) {
  each_row(rows, [=](int64_t row) {
    const float* from = x + row * width;
    const float *by = factor, *plus = offset;
    if (batch_stride) {
      by += row / rows_per_batch * batch_stride;
      plus += row / rows_per_batch * batch_stride;
    }
    float sum = 0, squares = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t i = 0; i < width; ++i) sum += from[i];
    const float mean = sum / float(width);
#pragma omp simd reduction(+ : squares)
    for (int64_t i = 0; i < width; ++i) squares += (from[i] - mean) * (from[i] - mean);
    const float inverse = 1.0f / std::sqrt(squares / float(width) + eps);
#pragma omp simd
    for (int64_t i = 0; i < width; ++i) store((from[i] - mean) * inverse * by[i] + plus[i], y + row * width + i);
  });
}

// Rotates neighbouring pairs: (a, b) -> (a cos - b sin, a sin + b cos).
template <class Y>
inline void rotate(const float* x, const float* cosines, const float* sines, int64_t pairs, Y* y) {
#pragma omp simd
  for (int64_t i = 0; i < pairs; ++i) {
    const float even = x[2 * i], odd = x[2 * i + 1];
    store(even * cosines[i] - odd * sines[i], y + 2 * i);
    store(even * sines[i] + odd * cosines[i], y + 2 * i + 1);
  }
}

template <class T>
void rms_rope(const T* x, int64_t stride, const float* weight, const float* cosines, const float* sines, T* y, int64_t rows,
              int64_t rows_per_batch, int64_t heads, int64_t dim, int64_t span, float eps) {
  const int64_t width = heads * dim;
#pragma omp parallel
  {
    auto values = scratch<float>(width);
#pragma omp for schedule(static)
    for (int64_t row = 0; row < rows; ++row) {
      const T* from = x + row * stride;
      T* to = y + row * width;
      float* normed = values.get();
      for (int64_t first = 0; first < width; first += span) {
        const T* part = from + first;
        float squares = 0;
#pragma omp simd reduction(+ : squares)
        for (int64_t i = 0; i < span; ++i) squares += load(part + i) * load(part + i);
        const float inverse = weight ? 1.0f / std::sqrt(squares / float(span) + eps) : 1.0f;
#pragma omp simd
        for (int64_t i = 0; i < span; ++i) normed[first + i] = load(part + i) * inverse * (weight ? weight[i] : 1.0f);
      }
      if (cosines) {
        const int64_t angle = row % rows_per_batch * (dim / 2);
        for (int64_t head = 0; head < heads; ++head)
          rotate(normed + head * dim, cosines + angle, sines + angle, dim / 2, to + head * dim);
      } else {
#pragma omp simd
        for (int64_t i = 0; i < width; ++i) store(normed[i], to + i);
      }
    }
  }
}

template <class Y>
void add_gated(const float* x, const Y* y, const float* gate, float* out, int64_t rows, int64_t width, int64_t rows_per_batch,
               int64_t batch_stride) {
  each_row(rows, [=](int64_t row) {
    const float* by = gate ? gate + row / rows_per_batch * batch_stride : nullptr;
    const int64_t at = row * width;
    if (by) {
#pragma omp simd
      for (int64_t i = 0; i < width; ++i) out[at + i] = x[at + i] + load(y + at + i) * by[i];
    } else {
#pragma omp simd
      for (int64_t i = 0; i < width; ++i) out[at + i] = x[at + i] + load(y + at + i);
    }
  });
}

template <class T>
void gelu(const T* x, T* y, int64_t count) {
  constexpr int64_t chunk = 4096;
  each_row(ceil_div(count, chunk), [=](int64_t index) {
    const int64_t first = index * chunk, last = std::min(count, first + chunk);
#pragma omp simd
    for (int64_t i = first; i < last; ++i) store(gelu_tanh(load(x + i)), y + i);
  });
}

}  // namespace

extern "C" {

// y = (x - mean) / sqrt(variance + eps) * factor + offset. x [rows, width] float32; factor and offset [width], or with
// batch_stride one such row for every rows_per_batch rows.
void lx_layer_norm(const float* x, const float* factor, const float* offset, void* y, int64_t rows, int64_t width,
                   int64_t rows_per_batch, int64_t batch_stride, float eps, int to_float) {
  if (to_float)
    layer_norm(x, factor, offset, static_cast<float*>(y), rows, width, rows_per_batch, batch_stride, eps);
  else
    layer_norm(x, factor, offset, static_cast<bf16*>(y), rows, width, rows_per_batch, batch_stride, eps);
}

// RMS norm of every `span` of the heads * dim components, a head or all of them, with weight [span] (none when it is
// null), then the rotary embedding of each head (none when cosines is null). Rows of x are `stride` elements apart, those
// of y are dense; cosines and sines [rows_per_batch, dim / 2].
void lx_rms_rope(const void* x, int64_t stride, const float* weight, const float* cosines, const float* sines, void* y,
                 int64_t rows, int64_t rows_per_batch, int64_t heads, int64_t dim, int64_t span, float eps,
                 int is_float) {
  if (is_float)
    rms_rope(static_cast<const float*>(x), stride, weight, cosines, sines, static_cast<float*>(y), rows, rows_per_batch,
             heads, dim, span, eps);
  else
    rms_rope(static_cast<const bf16*>(x), stride, weight, cosines, sines, static_cast<bf16*>(y), rows, rows_per_batch,
             heads, dim, span, eps);
}

// out = x + y * gate (x + y when gate is null); out may be x.
void lx_add_gated(const float* x, const void* y, const float* gate, float* out, int64_t rows, int64_t width,
                  int64_t rows_per_batch, int64_t batch_stride, int is_float) {
  if (is_float)
    add_gated(x, static_cast<const float*>(y), gate, out, rows, width, rows_per_batch, batch_stride);
  else
    add_gated(x, static_cast<const bf16*>(y), gate, out, rows, width, rows_per_batch, batch_stride);
}

// GELU with the tanh approximation; y may be x.
void lx_gelu_tanh(const void* x, void* y, int64_t count, int is_float) {
  if (is_float)
    gelu(static_cast<const float*>(x), static_cast<float*>(y), count);
  else
    gelu(static_cast<const bf16*>(x), static_cast<bf16*>(y), count);
}
}
