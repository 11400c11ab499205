// One row of x in float32: levels come apart in registers, in the order in which x has been arranged,
// so that none of them has to be shuffled. A row of four bits takes a shift, a mask, a conversion and a
// product for eight features.
#pragma once
#define FLASHNORM_ONE_ROW
#include "columns_avx2.h"
#include "one_row.h"
#include "one_row_groups_avx2.h"

namespace {

// Bits 4K..4K + 3 of each number of 32 bits.
template <int K> inline Vec nibble(__m256i v) {
  const __m256i low = K ? _mm256_srli_epi32(v, 4 * K) : v;
  return widened(K == 7 ? low : _mm256_and_si256(low, _mm256_set1_epi32(15)));
}
// The same less 8, of bits that were exclusive-ored with 8.
template <int K> inline Vec signed_nibble(__m256i v) {
  return widened(_mm256_srai_epi32(K == 7 ? v : _mm256_slli_epi32(v, 28 - 4 * K), 28));
}
// Byte B of each number of 32 bits, with and without sign.
template <int B> inline Vec byte(__m256i v) {
  const __m256i low = B ? _mm256_srli_epi32(v, 8 * B) : v;
  return widened(B == 3 ? low : _mm256_and_si256(low, _mm256_set1_epi32(255)));
}
template <int B> inline Vec signed_byte(__m256i v) {
  return widened(_mm256_srai_epi32(B == 3 ? v : _mm256_slli_epi32(v, 24 - 8 * B), 24));
}

// Σ q_k x_k over eight vectors, in two sums.
template <class Level> inline Vec eight(const Level& level, const float* x) {
  Vec even = level.template get<0>() * at(x, 0), odd = level.template get<1>() * at(x, 1);
  even = fma(level.template get<2>(), at(x, 2), even), odd = fma(level.template get<3>(), at(x, 3), odd);
  even = fma(level.template get<4>(), at(x, 4), even), odd = fma(level.template get<5>(), at(x, 5), odd);
  even = fma(level.template get<6>(), at(x, 6), even), odd = fma(level.template get<7>(), at(x, 7), odd);
  return even + odd;
}
template <class Level> inline Vec four(const Level& level, const float* x) {
  const Vec even = fma(level.template get<2>(), at(x, 2), level.template get<0>() * at(x, 0));
  const Vec odd = fma(level.template get<3>(), at(x, 3), level.template get<1>() * at(x, 1));
  return even + odd;
}

struct Nibbles {
  __m256i v;
  template <int K> inline Vec get() const { return nibble<K>(v); }
};
struct SignedNibbles {
  __m256i v;
  explicit SignedNibbles(__m256i raw)
      : v(_mm256_xor_si256(raw, _mm256_set1_epi32(static_cast<int>(0x88888888u)))) {}
  template <int K> inline Vec get() const { return signed_nibble<K>(v); }
};
struct ShiftedNibbles {  // less a zero of their own
  __m256i v;
  Vec zero;
  template <int K> inline Vec get() const { return nibble<K>(v) - zero; }
};
struct TableNibbles {
  __m256i v;
  __m256 low, high;
  template <int K> inline Vec get() const {
    const __m256i index = K ? _mm256_srli_epi32(v, 4 * K) : v;
    const __m256i top = K == 7 ? v : _mm256_slli_epi32(v, 28 - 4 * K);
    return {_mm256_blendv_ps(_mm256_permutevar8x32_ps(low, index),
                             _mm256_permutevar8x32_ps(high, index), _mm256_castsi256_ps(top))};
  }
};
struct Bytes {
  __m256i v;
  template <int K> inline Vec get() const { return byte<K>(v); }
};
struct SignedBytes {
  __m256i v;
  template <int K> inline Vec get() const { return signed_byte<K>(v); }
};

inline Vec thirty_two(const Byte* q, const float* x) {
  const Vec even = fma(signed_bytes_at(q + 16), at(x, 2), signed_bytes_at(q) * at(x, 0));
  const Vec odd = fma(signed_bytes_at(q + 24), at(x, 3), signed_bytes_at(q + 8) * at(x, 1));
  return even + odd;
}

// ---- How x is arranged.

// to[c · 8 + l] = x[8 l + c]
inline void across(const float* x, float* to) { Vec::transpose(x, 8, to, 8); }

// Four by four: to[c · step + r] = x[4 r + c]
inline void across_four(const float* x, float* to, int64_t step) {
  __m128 a = _mm_loadu_ps(x), b = _mm_loadu_ps(x + 4), c = _mm_loadu_ps(x + 8), d = _mm_loadu_ps(x + 12);
  _MM_TRANSPOSE4_PS(a, b, c, d);
  _mm_storeu_ps(to, a), _mm_storeu_ps(to + step, b);
  _mm_storeu_ps(to + 2 * step, c), _mm_storeu_ps(to + 3 * step, d);
}

// Of 64 features, where the halves of 16 bytes hold 16 features and the 16 after them: to[2 b + h][4
// block + l] = x[32 block + 16 h + 4 l + b].
inline void by_blocks(const float* x, float* to) {
  for (int block = 0; block < 2; ++block)
    for (int h = 0; h < 2; ++h)
      across_four(x + 32 * block + 16 * h, to + 8 * h + 4 * block, 16);
}

// Of 64 features, 32 by 32: to[32 h + 8 b + l] = x[32 h + 4 l + b].
inline void by_eighths(const float* x, float* to) {
  for (int h = 0; h < 2; ++h)
    for (int side = 0; side < 2; ++side)
      across_four(x + 32 * h + 16 * side, to + 32 * h + 4 * side, 8);
}

// Of 64 features, neighbours in the halves of a byte: to[k][l] = x[8 l + k]; `swapped` where the first
// of them is in the high half.
inline void by_pairs(const float* x, float* to, bool swapped) {
  across(x, to);
  if (!swapped) return;
  for (int k = 0; k < 8; k += 2) {
    const Vec first = at(to, k), second = at(to, k + 1);
    second.store(to + k * 8), first.store(to + (k + 1) * 8);
  }
}

inline Vec lane_sums(const float* x) {
  return ((at(x, 0) + at(x, 1)) + (at(x, 2) + at(x, 3))) + ((at(x, 4) + at(x, 5)) + (at(x, 6) + at(x, 7)));
}

inline Vec lane_sums_of_32(const float* x) { return (at(x, 0) + at(x, 1)) + (at(x, 2) + at(x, 3)); }

inline float* sums_of(const float* x, int64_t n) { return const_cast<float*>(x) + whole(n, CUT); }

// x and zeros behind it, arranged 64 by 64, and the sums behind that: a vector for each 64, or where
// blocks have 256 features one number for each 32.
inline bool arrange_floats(const Op& op, const float* x, float* to) {
  const int32_t type = op.weight_type;
  float* sums = sums_of(to, op.n);
  alignas(32) float rest[EACH];
  for (int64_t i = 0; i < whole(op.n, CUT); i += EACH) {
    const float *from = padded_part(x, i, op.n, rest), *place = to + i;
    if (type >= Q4_K) by_eighths(from, to + i);
    else if (type >= Q4_0) by_blocks(from, to + i);
    else if (type == INT4 || type == CODEBOOK4) by_pairs(from, to + i, type == CODEBOOK4);
    else memcpy(to + i, from, EACH * sizeof(float));
    if (type >= Q4_K)
      for (int h = 0; h < 2; ++h, place += 32)
        sums[i / 32 + h] = ((at(place, 0) + at(place, 1)) + (at(place, 2) + at(place, 3))).sum();
    else lane_sums(place).store(sums + i / 8);
  }
  return true;
}

// ---- Steps: weights, the x for them, and the sum before.

struct Floats {
  const float *x, *sums;
  static inline Floats of(const PackedProduct& p, int64_t i) {
    return {p.x + i, sums_of(p.x, p.op.n) + i / (p.op.weight_type >= Q4_K ? 32 : 8)};
  }
};

struct OnFloats {
  using Input = Floats;
  static inline Floats input(const PackedProduct& p, int64_t i) { return Floats::of(p, i); }
};

struct FloatsQ4_0 : OnFloats {
  static constexpr int64_t bytes = 18;
  static inline Vec step(const Byte* a, const Byte* b, Floats s, Vec sum) {
    return fma(eight(SignedNibbles(two_of_16(a + 2, b + 2)), s.x), halves(a, b), sum);
  }
};
struct FloatsQ4_1 : OnFloats {
  static constexpr int64_t bytes = 20;
  static inline Vec step(const Byte* a, const Byte* b, Floats s, Vec sum) {
    sum = fma(halves(a + 2, b + 2), Vec::load(s.sums), sum);
    return fma(eight(Nibbles{two_of_16(a + 4, b + 4)}, s.x), halves(a, b), sum);
  }
};

// Halves of bytes that have been taken apart: x is arranged as for whole ones.
template <class Level> inline Vec eight_of(const Level& low, const Level& high, const float* x) {
  Vec even = low.template get<0>() * at(x, 0), odd = high.template get<0>() * at(x, 1);
  even = fma(low.template get<1>(), at(x, 2), even), odd = fma(high.template get<1>(), at(x, 3), odd);
  even = fma(low.template get<2>(), at(x, 4), even), odd = fma(high.template get<2>(), at(x, 5), odd);
  even = fma(low.template get<3>(), at(x, 6), even), odd = fma(high.template get<3>(), at(x, 7), odd);
  return even + odd;
}

struct FloatsQ5_0 : OnFloats {
  static constexpr int64_t bytes = 22;
  static inline Vec step(const Byte* a, const Byte* b, Floats s, Vec sum) {
    const Levels q = five_bits(a + 6, b + 6, a + 2, b + 2);
    const __m256i zero = _mm256_set1_epi8(16);
    const SignedBytes low{_mm256_sub_epi8(q.low, zero)}, high{_mm256_sub_epi8(q.high, zero)};
    return fma(eight_of(low, high, s.x), halves(a, b), sum);
  }
};
struct FloatsQ5_1 : OnFloats {
  static constexpr int64_t bytes = 24;
  static inline Vec step(const Byte* a, const Byte* b, Floats s, Vec sum) {
    const Levels q = five_bits(a + 8, b + 8, a + 4, b + 4);
    sum = fma(halves(a + 2, b + 2), Vec::load(s.sums), sum);
    return fma(eight_of(Bytes{q.low}, Bytes{q.high}, s.x), halves(a, b), sum);
  }
};
struct FloatsQ8_0 : OnFloats {
  static constexpr int64_t bytes = 34;
  static inline Vec step(const Byte* a, const Byte* b, Floats s, Vec sum) {
    sum = fma(thirty_two(a + 2, s.x), half(a), sum);
    return fma(thirty_two(b + 2, s.x + 32), half(b), sum);
  }
};

struct FloatsQ4_K : OnFloats {
  static constexpr int64_t bytes = 144;
  static inline Vec step(const Byte* p, Floats s, Vec sum) {
    const Eighths e = eighths(p);
    sum = less(e.minima, Vec::load(s.sums), sum);
    levels_of_q4_k(p, [&](int i, __m256i q) {
      sum = fma(four(Bytes{q}, s.x + 32 * i), lane(e.scales, i), sum);
    });
    return sum;
  }
};
struct FloatsQ5_K : OnFloats {
  static constexpr int64_t bytes = 176;
  static inline Vec step(const Byte* p, Floats s, Vec sum) {
    const Eighths e = eighths(p);
    sum = less(e.minima, Vec::load(s.sums), sum);
    levels_of_q5_k(p, [&](int i, __m256i q) {
      sum = fma(four(Bytes{q}, s.x + 32 * i), lane(e.scales, i), sum);
    });
    return sum;
  }
};
struct FloatsQ6_K : OnFloats {
  static constexpr int64_t bytes = 210;
  static inline Vec step(const Byte* p, Floats s, Vec sum) {
    const Vec d = half(p + 208);
    const Vec scales[2] = {signed_bytes_at(p + 192) * d, signed_bytes_at(p + 200) * d};
    levels_of_q6_k(p, [&](int i, __m256i q) {
      const SignedBytes level{_mm256_sub_epi8(q, _mm256_set1_epi8(32))};
      sum = fma(four(level, s.x + 32 * i), two_lanes(scales[i / 4], i % 4), sum);
    });
    return sum;
  }
};

// ---- Steps of groups: levels times x, less a zero where there is one.

struct FloatsInt8 : OnFloats {
  static constexpr int64_t features = 32, bytes = 32;
  static inline Vec step(const Byte* q, Floats s, const Segment&) { return thirty_two(q, s.x); }
  static inline Vec shifted(const Byte* q, Floats s, Vec zero) {
    Vec sum = (signed_bytes_at(q) - zero) * at(s.x, 0);
    for (int k = 1; k < 4; ++k) sum = fma(signed_bytes_at(q + 8 * k) - zero, at(s.x, k), sum);
    return sum;
  }
  static inline Vec sums(Floats s) { return lane_sums_of_32(s.x); }
};

// Two vectors of 16 numbers in e4m3: they are float16 with another bias, 2^-8 of what they stand for.
inline void fp8_to_floats(const Byte* q, Vec& low, Vec& high) {
  const __m256i wide = _mm256_cvtepu8_epi16(load_128(q)), mask = _mm256_set1_epi16(0x7f);
  const __m256i size = _mm256_and_si256(wide, mask);
  const __m256i sign = _mm256_slli_epi16(_mm256_andnot_si256(mask, wide), 8);
  const __m256i nan = _mm256_cmpeq_epi16(size, mask);
  const __m256i bits = _mm256_or_si256(_mm256_or_si256(_mm256_slli_epi16(size, 7), sign), nan);
  low = {_mm256_cvtph_ps(_mm256_castsi256_si128(bits))};
  high = {_mm256_cvtph_ps(_mm256_extracti128_si256(bits, 1))};
}

struct FloatsFp8 : OnFloats {
  static constexpr int64_t features = 32, bytes = 32;
  static inline Vec step(const Byte* q, Floats s, const Segment&) {
    Vec a, b, c, d;
    fp8_to_floats(q, a, b), fp8_to_floats(q + 16, c, d);
    const Vec even = fma(c, at(s.x, 2), a * at(s.x, 0)), odd = fma(d, at(s.x, 3), b * at(s.x, 1));
    return (even + odd) * Vec::set(256.0f);
  }
  static inline Vec shifted(const Byte* q, Floats s, Vec zero) {
    const Vec scale = Vec::set(256.0f);
    Vec sum = Vec::set(0);
    for (int k = 0; k < 4; k += 2) {
      Vec a, b;
      fp8_to_floats(q + 8 * k, a, b);
      sum = fma(a * scale - zero, at(s.x, k), sum), sum = fma(b * scale - zero, at(s.x, k + 1), sum);
    }
    return sum;
  }
  static inline Vec sums(Floats s) { return lane_sums_of_32(s.x); }
};

struct FloatsInt4 : OnFloats {
  static constexpr int64_t features = 64, bytes = 32;
  static inline Vec step(const Byte* q, Floats s, const Segment&) {
    return eight(SignedNibbles(load_256(q)), s.x);
  }
  static inline Vec shifted(const Byte* q, Floats s, Vec zero) {
    return eight(ShiftedNibbles{load_256(q), zero}, s.x);
  }
  static inline Vec sums(Floats s) { return Vec::load(s.sums); }
};

struct FloatsTable : OnFloats {
  static constexpr int64_t features = 64, bytes = 32;
  static inline Vec step(const Byte* q, Floats s, const Segment& of) {
    const __m256 low = _mm256_loadu_ps(of.table), high = _mm256_loadu_ps(of.table + 8);
    return eight(TableNibbles{load_256(q), low, high}, s.x);
  }
  static inline Vec shifted(const Byte*, Floats, Vec) { return Vec::set(0); }  // it has no zeros
  static inline Vec sums(Floats s) { return Vec::load(s.sums); }
};

// ---- Who has a way.

const OneRow* one_row(const Op& op) {
  static const OneRow int8{arrange_floats, groups<FloatsInt8>}, fp8{arrange_floats, groups<FloatsFp8>},
      int4{arrange_floats, groups<FloatsInt4>}, table{arrange_floats, groups<FloatsTable>},
      q8_0{arrange_floats, pairs_of_blocks<FloatsQ8_0>},
      q4_0{arrange_floats, pairs_of_blocks<FloatsQ4_0>},
      q4_1{arrange_floats, pairs_of_blocks<FloatsQ4_1>},
      q5_0{arrange_floats, pairs_of_blocks<FloatsQ5_0>},
      q5_1{arrange_floats, pairs_of_blocks<FloatsQ5_1>},
      q4_k{arrange_floats, large_blocks<FloatsQ4_K>}, q5_k{arrange_floats, large_blocks<FloatsQ5_K>},
      q6_k{arrange_floats, large_blocks<FloatsQ6_K>}, gptq4{nullptr, columns_of_words<GptqWords>},
      awq4{nullptr, columns_of_words<AwqWords>};
  switch (op.weight_type) {
    case INT8: return fits_steps(op, FloatsInt8::features) ? &int8 : nullptr;
    case FP8: return fits_steps(op, FloatsFp8::features) ? &fp8 : nullptr;
    case INT4: return fits_steps(op, FloatsInt4::features) ? &int4 : nullptr;
    case CODEBOOK4: return fits_steps(op, FloatsTable::features) ? &table : nullptr;
    case GPTQ4: return &gptq4;
    case AWQ4: return &awq4;
    case Q8_0: return &q8_0;
    case Q4_0: return &q4_0;
    case Q4_1: return &q4_1;
    case Q5_0: return &q5_0;
    case Q5_1: return &q5_1;
    case Q4_K: return &q4_k;
    case Q5_K: return &q5_k;
    case Q6_K: return &q6_k;
    default: return nullptr;
  }
}

}  // namespace
