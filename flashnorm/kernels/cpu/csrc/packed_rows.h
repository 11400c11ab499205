// Several rows of x against packed rows of weights: some rows of weights are decoded into the nearest
// cache, a stretch at a time, and multiplied there by all rows of x.
#pragma once
#include "decode.h"
#include "skinny.h"

namespace {

constexpr int64_t STRETCH = 2 * CUT;  // features of a stretch: 8 KB of four rows

inline void fetch_row(const PackedProduct& p, int64_t row, int64_t from, int64_t to) {
  if (has_columns(p.op.weight_type) || row >= p.s.rows) return;
  const char* first = static_cast<const char*>(p.s.weight) + row * p.s.stride;
  const int64_t end = bytes_of(p.op.weight_type, to);
  for (int64_t b = bytes_of(p.op.weight_type, from); b < end; b += LINE) prefetch(first + b);
}

// C rows of weights from `at` on; sums of stretches are added up.
template <int C> inline void packed_columns(const PackedProduct& p, int64_t at, float* out) {
  alignas(64) float block[C * STRETCH], sums[MAX_ROWS * CHUNK];
  for (int64_t from = 0; from < p.op.n; from += STRETCH) {
    const int64_t n = smaller(STRETCH, p.op.n - from);
    for (int c = 0; c < C; ++c) {
      fetch_row(p, at + c + C, from, from + n);
      decode(p.op, p.s, at + c, from, from + n, block + c * STRETCH);
    }
    const Tile<Plain<float>> t{block, STRETCH, p.x + from, p.x_stride, n, from ? sums : out, nullptr};
    columns<Plain<float>, C>(t, Fetch::NO, p.rows);
    if (!from) continue;
    for (int64_t m = 0; m < p.rows; ++m)
      for (int c = 0; c < C; ++c) out[m * CHUNK + c] += sums[m * CHUNK + c];
  }
}

__attribute__((noinline)) inline void packed_products(const PackedProduct& p) {
  int64_t c = 0;
  for (; c + COLUMNS <= p.count; c += COLUMNS) packed_columns<COLUMNS>(p, p.at + c, p.out + c);
  for (; c < p.count; ++c) packed_columns<1>(p, p.at + c, p.out + c);
}

}  // namespace
