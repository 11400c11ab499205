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

// What a format reads in a step: the product of `features` levels, less a zero where there is one.
struct Int8Step {
  static constexpr int64_t features = 32, bytes = 32;
  static inline Vec step(const Byte* q, const float* x, const Op&) { return thirty_two(q, x); }
  static inline Vec shifted(const Byte* q, const float* x, Vec zero) {
    Vec sum = (bytes_to_floats(q) - zero) * at(x, 0);
    for (int k = 1; k < 4; ++k) sum = fma(bytes_to_floats(q + 8 * k) - zero, at(x, k), sum);
    return sum;
  }
};

// Two vectors of 16 numbers in e4m3: they are float16 with another bias, 2^-8 of what they stand for.
inline void fp8_to_floats(const Byte* q, Vec& low, Vec& high) {
  const __m256i wide = _mm256_cvtepu8_epi16(load_128(q)), mask = _mm256_set1_epi16(0x7f);
  const __m256i size = _mm256_and_si256(wide, mask);
  const __m256i sign = _mm256_slli_epi16(_mm256_andnot_si256(mask, wide), 8);
  const __m256i nan = _mm256_cmpeq_epi16(size, mask);
  const __m256i bits =
      _mm256_or_si256(_mm256_or_si256(_mm256_slli_epi16(size, 7), sign), nan);
  low = {_mm256_cvtph_ps(_mm256_castsi256_si128(bits))};
  high = {_mm256_cvtph_ps(_mm256_extracti128_si256(bits, 1))};
}

struct Fp8Step {
  static constexpr int64_t features = 32, bytes = 32;
  static inline Vec step(const Byte* q, const float* x, const Op&) {
    Vec a, b, c, d;
    fp8_to_floats(q, a, b), fp8_to_floats(q + 16, c, d);
    const Vec even = fma(c, at(x, 2), a * at(x, 0)), odd = fma(d, at(x, 3), b * at(x, 1));
    return (even + odd) * Vec::set(256.0f);
  }
  static inline Vec shifted(const Byte* q, const float* x, Vec zero) {
    const Vec scale = Vec::set(256.0f);
    Vec sum = Vec::set(0);
    for (int k = 0; k < 4; k += 2) {
      Vec a, b;
      fp8_to_floats(q + 8 * k, a, b);
      sum = fma(a * scale - zero, at(x, k), sum), sum = fma(b * scale - zero, at(x, k + 1), sum);
    }
    return sum;
  }
};

struct Int4Step {
  static constexpr int64_t features = 64, bytes = 32;
  static inline Vec step(const Byte* q, const float* x, const Op&) {
    return eight(SignedNibbles(load_256(q)), x);
  }
  static inline Vec shifted(const Byte* q, const float* x, Vec zero) {
    return eight(ShiftedNibbles{load_256(q), zero}, x);
  }
};

struct TableStep {
  static constexpr int64_t features = 64, bytes = 32;
  static inline Vec step(const Byte* q, const float* x, const Op& op) {
    return eight(TableNibbles{load_256(q), _mm256_loadu_ps(op.table), _mm256_loadu_ps(op.table + 8)}, x);
  }
  static inline Vec shifted(const Byte*, const float*, Vec) { return Vec::set(0); }  // it has no zeros
};

// [a, a, a, a, b, b, b, b]
inline Vec both(float a, float b) {
  return {_mm256_set_m128(_mm_set1_ps(b), _mm_set1_ps(a))};
}

// One row of weights; how many features share a scale: as many as a step has or more, or half of them.
template <class S, class T> struct GroupRow {
  const PackedProduct& p;
  int64_t row;
  GridRow<T> scales;
  const Byte* weight;
  const char* ahead;
  int64_t read = 0;  // bytes of the row

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
    return ZEROS ? S::shifted(q, p.x + i, zeros) : S::step(q, p.x + i, p.op);
  }

  // x has zeros behind its n features, so that a step may go on into them.
  template <bool ZEROS> inline float whole_groups() {
    const float* sums = sums_of(p.x, p.op.n);
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
        for (i = first; i < end; i += EACH) sum = fma(Vec::set(offset(group)), Vec::load(sums + i / 8), sum);
    }
    return sum.sum();
  }

  // Two groups in a step.
  template <bool ZEROS> inline float half_groups() {
    const float* sums = sums_of(p.x, p.op.n);
    Vec sum = Vec::set(0);
    for (int64_t i = 0; i < p.op.n; i += S::features) {
      const int64_t a = i / p.op.group, b = i + p.op.group < p.op.n ? a + 1 : a;
      const Vec zeros = ZEROS ? both(zero(a), zero(b)) : Vec::set(0);
      sum = fma(step<ZEROS>(i, zeros), both(scales[a], scales[b]), sum);
      if (p.s.offsets.data) sum = fma(both(offset(a), offset(b)), Vec::load(sums + i / 8), sum);
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

// Whether steps do not go beyond groups, or have just two of them. Sums of x are for 64 features.
inline bool fits_steps(const Op& op, int64_t features) {
  const bool offsets = op.segment[0].offsets.data, whole_row = op.group >= op.n;
  if (!op.segment[0].scales.data) return false;
  if (offsets && features != EACH) return false;
  return whole_row || op.group % features == 0 || (features == EACH && op.group * 2 == features);
}

}  // namespace
