// One row of x against levels of 8 or 4 bits whose scales are for groups of features.
#pragma once
#include "one_row_avx2.h"

namespace {

// Numbers of a grid as float32, of a type that is known.
template <class T> struct GridRow {
  const T* data;
  int64_t group;
  GridRow(const Grid& g, int64_t row) : data(static_cast<const T*>(g.data) + row * g.row), group(g.group) {}
  inline float operator[](int64_t i) const { return widen(data[i * group]); }
};
template <> inline float GridRow<Fp16>::operator[](int64_t i) const {
  return _mm_cvtss_f32(_mm_cvtph_ps(_mm_cvtsi32_si128(data[i * group].bits)));
}

// One row of weights; how many features share a scale: as many as a step has or more, or half of them.
template <class S, class T> struct GroupRow {
  const PackedProduct& p;
  int64_t row;
  GridRow<T> scales;
  const Byte* weight;
  const char* ahead;

  GroupRow(const PackedProduct& product, int64_t c)
      : p(product), row(product.at + c), scales(product.s.scales, row),
        weight(static_cast<const Byte*>(product.s.weight) + row * product.s.stride),
        ahead(later(product, c)) {}

  inline float zero(int64_t group) const { return grid_at(p.s.zeros, p.op.zero_type, row, group); }
  inline float offset(int64_t group) const { return grid_at(p.s.offsets, p.op.offset_type, row, group); }

  // The product of a step, and zeros for what is behind the row.
  template <bool ZEROS> inline Vec step(int64_t i, Vec zeros) {
    const int64_t first = i * S::bytes / S::features, left = bytes_of(p.op.weight_type, p.op.n) - first;
    prefetch(ahead + first);
    const Byte* q = weight + first;
    alignas(32) Byte rest[S::bytes] = {};
    if (left < S::bytes) {
      memcpy(rest, q, static_cast<size_t>(left));
      q = rest;
    }
    const typename S::Input x = S::input(p, i);
    return ZEROS ? S::shifted(q, x, zeros) : S::step(q, x, p.s);
  }

  // x has zeros behind its n features, so that a step may go on into them.
  template <bool ZEROS> inline float whole_groups() {
    Vec sum = Vec::set(0);
    for (int64_t first = 0, group = 0; first < p.op.n; first += p.op.group, ++group) {
      const int64_t end = smaller(first + p.op.group, p.op.n);
      const Vec zeros = Vec::set(ZEROS ? zero(group) : 0.0f);
      Vec a = Vec::set(0), b = a;
      int64_t i = first;
      for (; i + 2 * S::features <= end; i += 2 * S::features)
        a = a + step<ZEROS>(i, zeros), b = b + step<ZEROS>(i + S::features, zeros);
      for (; i < end; i += S::features) a = a + step<ZEROS>(i, zeros);
      sum = fma(a + b, Vec::set(scales[group]), sum);
      if (p.s.offsets.data)
        for (i = first; i < end; i += S::features)
          sum = fma(Vec::set(offset(group)), S::sums(S::input(p, i)), sum);
    }
    return sum.sum();
  }

  // Two groups in a step.
  template <bool ZEROS> inline float half_groups() {
    Vec sum = Vec::set(0);
    for (int64_t i = 0; i < p.op.n; i += S::features) {
      const int64_t a = i / p.op.group, b = i + p.op.group < p.op.n ? a + 1 : a;
      const Vec zeros = ZEROS ? both(zero(a), zero(b)) : Vec::set(0);
      sum = fma(step<ZEROS>(i, zeros), both(scales[a], scales[b]), sum);
      if (p.s.offsets.data) sum = fma(both(offset(a), offset(b)), S::sums(S::input(p, i)), sum);
    }
    return sum.sum();
  }
};

template <class S, class T> void group_rows(const PackedProduct& p) {
  const bool halves = p.op.group < S::features, zeros = p.s.zeros.data;
  for (int64_t c = 0; c < p.count; ++c) {
    GroupRow<S, T> row(p, c);
    p.out[c] = halves ? (zeros ? row.template half_groups<true>() : row.template half_groups<false>())
                      : (zeros ? row.template whole_groups<true>() : row.template whole_groups<false>());
  }
}

template <class S> void groups(const PackedProduct& p) {
  if (p.op.scale_type == FLOAT32) return group_rows<S, float>(p);
  if (p.op.scale_type == BFLOAT16) return group_rows<S, Bf16>(p);
  return group_rows<S, Fp16>(p);
}

// Whether steps do not go beyond groups, or have just two of them.
inline bool fits_steps(const Op& op, int64_t features) {
  if (!op.segment[0].scales.data) return false;
  return op.group >= op.n || op.group % features == 0 || (features == EACH && op.group * 2 == features);
}

}  // namespace
