// One row of x in whole numbers against words of four bits held as [in, out] (GPTQ's): a lane is an
// output and its four bytes are features of it, so that sums stay apart and words are read as they lie.
#pragma once
#include "one_row_bytes_groups.h"

namespace {

constexpr int WIDE = CHUNK / 16;        // vectors of outputs
constexpr int64_t WORD = 8, UNIT = 32;  // features of a word, and of x that share a unit

struct GptqBytes {
  static constexpr Levels levels{Order::NEIGHBOURS, 0, true, 23, false};
};

// A number of a grid for each of V times 16 outputs.
template <int V> struct OfOutputs {
  __m512 of[V];
  OfOutputs() = default;
  OfOutputs(const PackedProduct& p, const Grid& grid, int32_t type, int64_t group) {
    for (int v = 0; v < V; ++v) {
      const int64_t at = (p.at + 16 * v) * grid.row + group * grid.group;
      of[v] = sixteen(grid.data, type, at, grid.row, p.count - 16 * v);
    }
  }
};

inline __m512i four_bytes(const signed char* bytes, int64_t at) {
  int32_t four;
  memcpy(&four, bytes + 4 * at, 4);
  return _mm512_set1_epi32(four);
}

// Σ q X of 32 features by the three bytes of X.
template <int V> struct OfBytes {
  __m512i of[PIECES][V];
  OfBytes() {
    for (int i = 0; i < PIECES; ++i)
      for (int v = 0; v < V; ++v) of[i][v] = _mm512_setzero_si512();
  }
  inline __m512 total(int v, float unit) const {
    const auto times = [unit](__m512i sum, float by, __m512 more) {
      return _mm512_fmadd_ps(_mm512_cvtepi32_ps(sum), _mm512_set1_ps(by * unit), more);
    };
    const __m512 low = times(of[2][v], 1.0f, _mm512_setzero_ps());
    return times(of[0][v], 65536.0f, times(of[1][v], 256.0f, low));
  }
};

// One word of every output.
template <int V> inline void add_words(const PackedProduct& p, int64_t word, const Part* x, OfBytes<V>& sums) {
  constexpr int64_t ahead = 16;  // words
  const int32_t* row = static_cast<const int32_t*>(p.s.weight) + word * p.s.stride + p.at;
  Halves q[V];
  for (int v = 0; v < V; ++v) {
    q[v] = halves_of(_mm512_maskz_loadu_epi32(first_of_16(p.count - 16 * v), row + 16 * v));
    prefetch(reinterpret_cast<const char*>(row + ahead * p.s.stride + 16 * v));
  }
  for (int i = 0; i < PIECES; ++i) {
    const __m512i low = four_bytes(x[0].bytes[i], word % 16), high = four_bytes(x[1].bytes[i], word % 16);
    for (int v = 0; v < V; ++v) {
      const __m512i sum = _mm512_dpbusd_epi32(sums.of[i][v], q[v].low, low);
      sums.of[i][v] = _mm512_dpbusd_epi32(sum, q[v].high, high);
    }
  }
}

template <int V> inline void columns_of_words(const PackedProduct& p) {
  const Op& op = p.op;
  const int64_t words = (op.n + WORD - 1) / WORD, each = UNIT / WORD;
  const Part* parts = reinterpret_cast<const Part*>(p.x);
  OfOutputs<V> scales, zeros, offsets;
  __m512 sum[V];
  for (int v = 0; v < V; ++v) {
    scales.of[v] = _mm512_set1_ps(1.0f), zeros.of[v] = _mm512_set1_ps(8.0f);
    sum[v] = _mm512_setzero_ps();
  }
  int64_t group = 0, end = 0;  // the next group, and where the one before ends
  for (int64_t i = 0; i < op.n; i += UNIT) {
    if (i >= end) {
      if (p.s.scales.data) scales = {p, p.s.scales, op.scale_type, group};
      if (p.s.zeros.data) zeros = {p, p.s.zeros, op.zero_type, group};
      if (p.s.offsets.data) offsets = {p, p.s.offsets, op.offset_type, group};
      ++group, end += smaller(op.group, op.n);
    }
    const Part* x = parts + i / STEP * 2;
    const int64_t lane = i % STEP / WORD, word = i / WORD;
    OfBytes<V> products;
    for (int64_t w = word; w < smaller(word + each, words); ++w) add_words(p, w, x, products);
    const float* s = x->sums + lane;
    const __m512 all = _mm512_set1_ps((s[0] + s[1]) + (s[2] + s[3]));
    for (int v = 0; v < V; ++v) {
      const __m512 q = _mm512_fnmadd_ps(zeros.of[v], all, products.total(v, x->units[lane]));
      sum[v] = _mm512_fmadd_ps(q, scales.of[v], sum[v]);
      if (p.s.offsets.data) sum[v] = _mm512_fmadd_ps(offsets.of[v], all, sum[v]);
    }
  }
  for (int v = 0; v < V; ++v) {
    const int64_t left = p.count - 16 * v;
    _mm512_mask_storeu_ps(p.out + 16 * v, first_of_16(left), sum[v]);
  }
}

void gptq_products(const PackedProduct& p) {
  static_assert(WIDE == 4, "as many cases");
  switch ((p.count + 15) / 16) {
    case 1: return columns_of_words<1>(p);
    case 2: return columns_of_words<2>(p);
    case 3: return columns_of_words<3>(p);
    default: return columns_of_words<4>(p);
  }
}

const OneRow* gptq_way(const Op& op) {
  static const OneRow way{arrange_bytes<GptqBytes>, gptq_products};
  return op.group >= op.n || op.group % UNIT == 0 ? &way : nullptr;
}

}  // namespace
