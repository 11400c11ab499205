// One row of x in whole numbers against levels of eight or four bits whose scales are for groups of
// features, or for rows.
#pragma once
#include "one_row_bytes_vnni.h"

namespace {

inline __mmask16 first_of_16(int64_t count) {
  return static_cast<__mmask16>(count < 16 ? (1 << count) - 1 : 0xffff);
}

// `count` numbers of a grid from place `at` on, `step` apart, 16 at most, with zeros behind them.
inline __m512 sixteen(const void* data, int32_t type, int64_t at, int64_t step, int64_t count) {
  if (step != 1) {
    alignas(64) float v[16] = {};
    for (int64_t i = 0; i < count && i < 16; ++i) v[i] = number_at(data, type, at + i * step);
    return _mm512_load_ps(v);
  }
  const __mmask16 there = first_of_16(count);
  const Byte* bytes = static_cast<const Byte*>(data) + at;
  const uint16_t* words = static_cast<const uint16_t*>(data) + at;
  switch (type) {
    case FLOAT32: return _mm512_maskz_loadu_ps(there, static_cast<const float*>(data) + at);
    case BFLOAT16: {
      const __m512i wide = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(there, words));
      return _mm512_castsi512_ps(_mm512_slli_epi32(wide, 16));
    }
    case FLOAT16: return _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(there, words));
    case SIGNED8: return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_maskz_loadu_epi8(there, bytes)));
    default: return _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_maskz_loadu_epi8(there, bytes)));
  }
}

// The first `left` bytes of a vector, with zeros behind them.
inline __m512i bytes_left(const Byte* p, int64_t left) {
  return left >= SIDE ? load_512(p) : _mm512_maskz_loadu_epi8((1ull << left) - 1, p);
}

struct BytesInt8 {
  static constexpr Levels levels{Order::PLAIN, 128, false, 22, false};
  static constexpr int64_t features = 64, parts = 1;
  static inline int64_t bytes_of(int64_t n) { return n; }
  static inline __m512i load(const Byte* p, int64_t left) {
    return _mm512_xor_si512(bytes_left(p, left), bytes_512(128));
  }
  // Less a zero in each lane.
  static inline __m512 unshifted(__m512i q, const Part* x) { return shifted(q, x); }
};
struct BytesInt4 {
  static constexpr Levels levels{Order::NEIGHBOURS, 8, true, 23, false};
  static constexpr int64_t features = 128, parts = 2;
  static inline int64_t bytes_of(int64_t n) { return (n + 1) / 2; }
  static inline Halves load(const Byte* p, int64_t left) { return halves_of(bytes_left(p, left)); }
  static inline __m512 unshifted(Halves q, const Part* x) { return raw(q, x); }
};

constexpr int64_t whole_row = INT64_MAX;  // features of a group that has all of them

// Which of 16 groups each lane is in, step by step: a step has several groups, or a group steps.
template <class S> class Lanes {
 public:
  explicit Lanes(int64_t group) : steps_(group / S::features), left_(steps_), of_(_mm512_setzero_si512()) {
    if (steps_) return;
    const __m512i lanes = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    const int64_t many = S::features / group;
    of_ = _mm512_srli_epi32(lanes, many == 4 ? 2 : 3);
    next_ = _mm512_set1_epi32(static_cast<int>(many));
  }
  inline __m512i of() const { return of_; }
  inline void advance() {
    if (left_ > 1) {
      --left_;
    } else {
      of_ = _mm512_add_epi32(of_, next_);
      left_ = steps_;
    }
  }

 private:
  int64_t steps_, left_;
  __m512i of_, next_ = _mm512_set1_epi32(1);
};

// Numbers of 16 groups for each of C rows.
template <int C> struct OfGroups {
  __m512 of[C];
  OfGroups() = default;
  OfGroups(const Grid& grid, int32_t type, int64_t row, int64_t group, int64_t count) {
    for (int c = 0; c < C; ++c)
      of[c] = sixteen(grid.data, type, (row + c) * grid.row + group * grid.group, grid.group, count);
  }
  inline __m512 lanes(int c, __m512i which) const { return _mm512_permutexvar_ps(which, of[c]); }
};

template <class S, bool ZEROS, bool OFFSETS, int C>
inline void rows_of_groups(const PackedProduct& p, int64_t first) {
  const Op& op = p.op;
  const int64_t n = op.n, group = smaller(op.group, n), span = 16 * group, row = p.at + first;
  const Part* x = reinterpret_cast<const Part*>(p.x);
  Beside<C> w(p, first);
  Totals<C> sum;
  for (int64_t from = 0; from < n; from += span) {
    const int64_t end = smaller(from + span, n);
    const int64_t at = from / group, count = (end - from + group - 1) / group;
    const OfGroups<C> scales(p.s.scales, op.scale_type, row, at, count);
    OfGroups<C> zeros, offsets;
    if (ZEROS) zeros = {p.s.zeros, op.zero_type, row, at, count};
    if (OFFSETS) offsets = {p.s.offsets, op.offset_type, row, at, count};
    Lanes<S> lanes(op.group >= n ? whole_row : group);
    for (int64_t i = from; i < end; i += S::features, x += S::parts) {
      const int64_t left = S::bytes_of(n - i);
      for (int c = 0; c < C; ++c) {
        const auto q = S::load(w.at(c), left);
        __m512 v = ZEROS ? S::unshifted(q, x) : shifted(q, x);
        if (ZEROS) v = _mm512_fnmadd_ps(zeros.lanes(c, lanes.of()), _mm512_loadu_ps(x->sums), v);
        sum.of[c] = _mm512_fmadd_ps(v, scales.lanes(c, lanes.of()), sum.of[c]);
        if (OFFSETS)
          sum.of[c] = _mm512_fmadd_ps(offsets.lanes(c, lanes.of()), _mm512_loadu_ps(x->sums), sum.of[c]);
      }
      w.advance(smaller(left, SIDE));
      lanes.advance();
    }
  }
  sum.store(p.out + first);
}

// ---- Ways.

template <class S> bool arrange_bytes(const Op& op, const float* x, float* to) {
  return arrange_whole<S>(op.n, x, reinterpret_cast<Part*>(to));
}
template <class S> void blocks(const PackedProduct& p) {
  side_by_side(p.count, [&](auto c, int64_t at) { rows_of_blocks<S, decltype(c)::value>(p, at); });
}
template <class S> void large_blocks(const PackedProduct& p) {
  side_by_side(p.count, [&](auto c, int64_t at) { rows_of_large_blocks<S, decltype(c)::value>(p, at); });
}
template <class S> void groups(const PackedProduct& p) {
  const bool zeros = p.s.zeros.data, offsets = p.s.offsets.data;
  side_by_side(p.count, [&](auto c, int64_t first) {
    constexpr int C = decltype(c)::value;
    if (zeros && offsets) rows_of_groups<S, true, true, C>(p, first);
    else if (zeros) rows_of_groups<S, true, false, C>(p, first);
    else if (offsets) rows_of_groups<S, false, true, C>(p, first);
    else rows_of_groups<S, false, false, C>(p, first);
  });
}

// Whether a step has whole groups of 32 or more, or a group whole steps.
inline bool fits_steps(const Op& op, int64_t features) {
  if (!op.segment[0].scales.data) return false;
  if (op.group >= op.n || op.group % features == 0) return true;
  return op.group % 32 == 0 && features % op.group == 0;
}

template <class S> const OneRow* blocks_way() {
  static const OneRow way{arrange_bytes<S>, blocks<S>};
  return &way;
}
template <class S> const OneRow* large_blocks_way() {
  static const OneRow way{arrange_bytes<S>, large_blocks<S>};
  return &way;
}
template <class S> const OneRow* groups_way(const Op& op) {
  static const OneRow way{arrange_bytes<S>, groups<S>};
  return fits_steps(op, S::features) ? &way : nullptr;
}

}  // namespace
