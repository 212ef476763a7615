// Scaled dot-product attention in bfloat16 with float32 sums, one block of queries and keys at a time (FlashAttention,
// arXiv 2205.14135). Tensors are [B, L, H, D] with any strides but a dense last dimension.

#include "fastmath.h"

namespace {

using namespace lx;

struct View {
  const bf16* data;
  int64_t batch, token, head;  // strides in elements
  const bf16* at(int64_t b, int64_t h, int64_t row) const { return data + b * batch + h * head + row * token; }
};

struct Shape {
  int64_t batch, heads, queries, keys, dim;
  int64_t padded;     // dim filled up to a multiple of 16
  int64_t key_block;  // keys that are packed and multiplied at a time
};

constexpr int64_t kQueries = 128, kKeys = 256;  // most that one block has

// Keys of one block as the right operand of Q K^T: [D/2][block][2].
void pack_keys(const View& k, int64_t b, int64_t h, int64_t first, int64_t count, const Shape& s, uint32_t* out) {
  for (int64_t key = 0; key < s.key_block; ++key) {
    if (key >= count) {
      for (int64_t pair = 0; pair < s.padded / 2; ++pair) out[pair * s.key_block + key] = 0;
      continue;
    }
    const bf16* row = k.at(b, h, first + key);
    for (int64_t pair = 0; pair < s.padded / 2; ++pair) {
      const uint32_t low = 2 * pair < s.dim ? row[2 * pair] : 0, high = 2 * pair + 1 < s.dim ? row[2 * pair + 1] : 0;
      out[pair * s.key_block + key] = low | high << 16;
    }
  }
}

// Values of one block as the right operand of P V: [block/2][D][2].
void pack_values(const View& v, int64_t b, int64_t h, int64_t first, int64_t count, const Shape& s, uint32_t* out) {
  for (int64_t pair = 0; pair < s.key_block / 2; ++pair) {
    const bf16* low = 2 * pair < count ? v.at(b, h, first + 2 * pair) : nullptr;
    const bf16* high = 2 * pair + 1 < count ? v.at(b, h, first + 2 * pair + 1) : nullptr;
    uint32_t* to = out + pair * s.padded;
    if (low && high) {
#pragma omp simd
      for (int64_t d = 0; d < s.dim; ++d) to[d] = uint32_t(low[d]) | uint32_t(high[d]) << 16;
    } else {
      for (int64_t d = 0; d < s.dim; ++d) to[d] = low ? low[d] : 0;
    }
    for (int64_t d = s.dim; d < s.padded; ++d) to[d] = 0;
  }
}

struct Scratch {
  decltype(scratch<float>(0)) scores = scratch<float>(kQueries * kKeys), sums;
  decltype(scratch<bf16>(0)) weights = scratch<bf16>(kQueries * kKeys), queries;
  float most[kQueries], total[kQueries];
  explicit Scratch(const Shape& s)
      : sums(scratch<float>(kQueries * s.padded)), queries(scratch<bf16>(kQueries * s.padded)) {}
};

const c10::BFloat16* as_torch(const void* p) { return static_cast<const c10::BFloat16*>(p); }

// Scores of one row to weights of a running softmax. Returns what the sums so far have to be multiplied with.
float soften(float* scores, int64_t count, int64_t width, float factor, float* most, float* total, bf16* weights) {
  float highest = *most;
#pragma omp simd reduction(max : highest)
  for (int64_t j = 0; j < count; ++j) highest = std::max(highest, scores[j] * factor);
  const float correction = exp2_bounded(*most - highest);
  float sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t j = 0; j < count; ++j) {
    const float weight = exp2_bounded(__builtin_fmaf(scores[j], factor, -highest));
    sum += weight;
    store(weight, weights + j);
  }
  std::memset(weights + count, 0, (width - count) * sizeof(bf16));
  *total = *total * correction + sum;
  *most = highest;
  return correction;
}

void attend(const Shape& s, const View& q, const uint32_t* keys, const uint32_t* values, bf16* out, int64_t b, int64_t h,
            int64_t first, float factor, Scratch& own) {
  using at::native::cpublas::brgemm;
  const int64_t rows = std::min(kQueries, s.queries - first);
  const bf16* query = q.at(b, h, first);
  int64_t stride = q.token;
  if (s.padded != s.dim) {
    for (int64_t i = 0; i < rows; ++i) {
      std::memcpy(own.queries.get() + i * s.padded, q.at(b, h, first + i), s.dim * sizeof(bf16));
      std::memset(own.queries.get() + i * s.padded + s.dim, 0, (s.padded - s.dim) * sizeof(bf16));
    }
    query = own.queries.get();
    stride = s.padded;
  }
  std::fill_n(own.most, rows, -INFINITY);
  std::fill_n(own.total, rows, 0.0f);
  float* sums = own.sums.get();
  for (int64_t block = 0; block * s.key_block < s.keys; ++block) {
    const int64_t count = std::min(s.key_block, s.keys - block * s.key_block), width = ceil_div(count, 32) * 32;
    brgemm(rows, width, s.padded, stride, s.key_block, s.key_block, false, as_torch(query),
           as_torch(keys + block * s.key_block * s.padded / 2), own.scores.get(), true);
    for (int64_t i = 0; i < rows; ++i) {
      const float correction = soften(own.scores.get() + i * s.key_block, count, width, factor, own.most + i, own.total + i,
                                      own.weights.get() + i * s.key_block);
      if (block && correction != 1.0f) {
#pragma omp simd
        for (int64_t d = 0; d < s.padded; ++d) sums[i * s.padded + d] *= correction;
      }
    }
    brgemm(rows, s.padded, width, s.key_block, s.padded, s.padded, block > 0, as_torch(own.weights.get()),
           as_torch(values + block * s.key_block * s.padded / 2), sums, true);
  }
  for (int64_t i = 0; i < rows; ++i) {
    const float by = 1.0f / own.total[i];
    bf16* to = out + ((b * s.queries + first + i) * s.heads + h) * s.dim;
#pragma omp simd
    for (int64_t d = 0; d < s.dim; ++d) store(sums[i * s.padded + d] * by, to + d);
  }
}

}  // namespace

extern "C" {

// q [B, L, H, D], k and v [B, S, H, D] with the strides (batch, token, head) of each; out [B, L, H, D] is dense.
bool lx_attention(const bf16* q, const int64_t* q_strides, const bf16* k, const int64_t* k_strides, const bf16* v,
                  const int64_t* v_strides, bf16* out, int64_t batch, int64_t heads, int64_t queries, int64_t keys,
                  int64_t dim, float scale) {
  const Shape s{batch, heads, queries, keys, dim, ceil_div(dim, 16) * 16,
                std::min(kKeys, ceil_div(keys, 32) * 32)};
  const View qs{q, q_strides[0], q_strides[1], q_strides[2]}, ks{k, k_strides[0], k_strides[1], k_strides[2]},
      vs{v, v_strides[0], v_strides[1], v_strides[2]};
  const int64_t blocks = ceil_div(keys, s.key_block), block_size = s.key_block * s.padded / 2, head_size = blocks * block_size;
  const int64_t tiles = ceil_div(queries, kQueries), total = batch * heads;
  // Heads are taken in groups, so that their packed keys and values stay within the outer caches.
  const int64_t group = std::max<int64_t>(1, std::min(total, (int64_t(1) << 22) / head_size));
  auto keys_packed = scratch<uint32_t>(group * head_size), values_packed = scratch<uint32_t>(group * head_size);
  if (!keys_packed || !values_packed) return false;
  bool good = true;
  for (int64_t start = 0; start < total && good; start += group) {
    const int64_t here = std::min(group, total - start);
    good = parallel(
               here * blocks, [] { return 0; },
               [&](int64_t index, int) {
                 const int64_t head = start + index / blocks, first = index % blocks * s.key_block;
                 const int64_t count = std::min(s.key_block, keys - first);
                 pack_keys(ks, head / heads, head % heads, first, count, s, keys_packed.get() + index * block_size);
                 pack_values(vs, head / heads, head % heads, first, count, s, values_packed.get() + index * block_size);
               }) &&
           parallel(
               here * tiles, [&] { return Scratch(s); },
               [&](int64_t index, Scratch& own) {
                 const int64_t local = index / tiles, head = start + local;
                 attend(s, qs, keys_packed.get() + local * head_size, values_packed.get() + local * head_size, out,
                        head / heads, head % heads, index % tiles * kQueries, scale * 1.44269504f, own);
               });
  }
  return good;
}
}
