// Rows of x against words of four bits held as [in, out] (GPTQ's and AWQ's): eight outputs side by side
// in a vector, so that words are read as they lie and x is broadcast.
#pragma once
#include "one_row_avx2.h"

namespace {

constexpr int64_t SIDE_BY_SIDE = CHUNK / Vec::lanes + 1;  // vectors of outputs, whatever word is first

// A number of a grid for each of eight outputs; of those behind the weight's last one the last one's.
inline Vec eight_of_grid(const Grid& grid, int32_t type, const Segment& s, int64_t first, int64_t group) {
  alignas(32) float v[8];
  for (int64_t l = 0; l < 8; ++l) v[l] = grid_at(grid, type, smaller(first + l, s.rows - 1), group);
  return Vec::load(v);
}

// Levels of one feature, eight outputs from `first` on, a multiple of eight.
struct GptqWords {
  static constexpr int64_t features = 8;  // in a word of an output
  static inline __m256i load(const Segment& s, int64_t word, int64_t first) {
    const int32_t* p = static_cast<const int32_t*>(s.weight) + word * s.stride + first;
    if (first + 8 <= s.rows) return load_256(p);
    alignas(32) int32_t rest[8] = {};
    for (int64_t l = 0; first + l < s.rows; ++l) rest[l] = p[l];
    return load_256(rest);
  }
  static inline __m256i level(__m256i words, int64_t k) {
    const __m256i low = _mm256_srl_epi32(words, _mm_cvtsi32_si128(static_cast<int>(4 * k)));
    return _mm256_and_si256(low, _mm256_set1_epi32(15));
  }
};
struct AwqWords {
  static constexpr int64_t features = 1;
  static inline __m256i load(const Segment& s, int64_t word, int64_t first) {
    return _mm256_set1_epi32(static_cast<const int32_t*>(s.weight)[word * s.stride + first / 8]);
  }
  static inline __m256i level(__m256i words, int64_t) {
    const __m256i places = _mm256_setr_epi32(0, 16, 4, 20, 8, 24, 12, 28);
    return _mm256_and_si256(_mm256_srlv_epi32(words, places), _mm256_set1_epi32(15));
  }
};

// Rows of words are far apart: what is read some rows later is asked for now.
constexpr int64_t ROWS_AHEAD = 24;
template <class W> inline void fetch_words(const PackedProduct& p, int64_t word, int64_t first, int64_t vectors) {
  const int64_t each = W::features == 1 ? 1 : 8;  // words that eight outputs take
  const int64_t later = smaller(word + ROWS_AHEAD, (p.op.n + W::features - 1) / W::features - 1);
  const int32_t* at = static_cast<const int32_t*>(p.s.weight) + later * p.s.stride + first / 8 * each;
  fetch(reinterpret_cast<const char*>(at), vectors * each * 4);
}

// Σ (q − zero) x over the features of one group.
template <class W>
inline void group_products(const PackedProduct& p, const float* x, int64_t from, int64_t to,
                           int64_t first, int64_t vectors, const Vec* zeros, Vec* part) {
  for (int64_t v = 0; v < vectors; ++v) part[v] = Vec::set(0);
  for (int64_t word = from / W::features; word * W::features < to; ++word) {
    const int64_t base = word * W::features;
    fetch_words<W>(p, word, first, vectors);
    for (int64_t v = 0; v < vectors; ++v) {
      const __m256i words = W::load(p.s, word, first + 8 * v);
      if (base >= from && base + W::features <= to) {
        for (int64_t k = 0; k < W::features; ++k)
          part[v] = fma(widened(W::level(words, k)) - zeros[v], Vec::set(x[base + k]), part[v]);
        continue;
      }
      for (int64_t i = from > base ? from : base; i < smaller(to, base + W::features); ++i)
        part[v] = fma(widened(W::level(words, i - base)) - zeros[v], Vec::set(x[i]), part[v]);
    }
  }
}

template <class W> void columns_of_words(const PackedProduct& p) {
  const Op& op = p.op;
  const int64_t first = p.at / 8 * 8, vectors = (p.at + p.count - first + 7) / 8;
  for (int64_t m = 0; m < p.rows; ++m) {
    const float* x = p.x + m * p.x_stride;
    Vec sum[SIDE_BY_SIDE], part[SIDE_BY_SIDE], zeros[SIDE_BY_SIDE];
    for (int64_t v = 0; v < vectors; ++v) sum[v] = Vec::set(0), zeros[v] = Vec::set(8.0f);
    for (int64_t from = 0, group = 0; from < op.n; from += op.group, ++group) {
      if (p.s.zeros.data)
        for (int64_t v = 0; v < vectors; ++v)
          zeros[v] = eight_of_grid(p.s.zeros, op.zero_type, p.s, first + 8 * v, group);
      const int64_t to = smaller(from + op.group, op.n);
      group_products<W>(p, x, from, to, first, vectors, zeros, part);
      float total = 0;
      if (p.s.offsets.data)
        for (int64_t i = from; i < to; ++i) total += x[i];
      for (int64_t v = 0; v < vectors; ++v) {
        const int64_t at = first + 8 * v;
        const Vec scale = p.s.scales.data ? eight_of_grid(p.s.scales, op.scale_type, p.s, at, group)
                                          : Vec::set(1.0f);
        sum[v] = fma(part[v], scale, sum[v]);
        if (p.s.offsets.data)
          sum[v] = fma(eight_of_grid(p.s.offsets, op.offset_type, p.s, at, group), Vec::set(total), sum[v]);
      }
    }
    alignas(32) float out[SIDE_BY_SIDE * 8];
    for (int64_t v = 0; v < vectors; ++v) sum[v].store(out + 8 * v);
    memcpy(p.out + m * CHUNK, out + (p.at - first), static_cast<size_t>(p.count) * sizeof(float));
  }
}

}  // namespace
