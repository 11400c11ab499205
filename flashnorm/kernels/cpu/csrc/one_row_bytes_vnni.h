// One row of x in whole numbers: products of bytes (VNNI), 32 to an instruction.
//
// x is taken as X · 2^-e, for each 64 features with an e of their own so that the largest |X| has 23
// bits, and X as three bytes: X = 65536 a + 256 b + c. Sums of levels times a, b and c are exact, so
// that what is rounded is x alone, by 2^-23 of the largest of its 64 at most: float32's precision for
// a sum in which that one occurs. Rows of which a part is not finite or close to the ends of float32's
// range are multiplied in float32.
#pragma once
#include "one_row_groups_avx2.h"

namespace {

constexpr int PIECES = 3;

struct Piece64 {
  signed char bytes[PIECES][EACH];
  int32_t sums[2][8];  // of X: of each four bytes of the first 32 features and of the last
  float lanes[8];      // of x: over both, or where blocks have 256 features one for each 32
  float unit;          // 2^-e
  float unused[7];
};
static_assert(sizeof(Piece64) == (EACH + EACH / 4) * sizeof(float), "as arranged_floats says");

// A part of x in the order of a format's levels: first those in the low halves of bytes.
inline void in_order(int32_t type, const float* x, float* to) {
  for (int j = 0; j < 16; ++j) {
    if (type == INT4) {
      to[j] = x[2 * j], to[16 + j] = x[32 + 2 * j];
      to[32 + j] = x[2 * j + 1], to[48 + j] = x[32 + 2 * j + 1];
    } else {
      to[j] = x[j], to[16 + j] = x[32 + j], to[32 + j] = x[16 + j], to[48 + j] = x[48 + j];
    }
  }
}

inline float largest(const float* x) {
  const __m256 positive = _mm256_castsi256_ps(_mm256_set1_epi32(0x7fffffff));
  __m256 top = _mm256_setzero_ps();
  __m256 odd = top;  // NaN where anything is not finite
  for (int k = 0; k < 8; ++k) {
    const __m256 v = at(x, k).v;
    top = _mm256_max_ps(top, _mm256_and_ps(v, positive));
    odd = _mm256_fmadd_ps(v, _mm256_setzero_ps(), odd);
  }
  const float all = Vec{odd}.sum();
  if (all != all) return all;
  float found = 0;
  alignas(32) float lanes[8];
  _mm256_store_ps(lanes, top);
  for (float v : lanes) found = v > found ? v : found;
  return found;
}

// 32 numbers as bytes, in their order.
inline __m256i narrow_bytes(const __m256i (&v)[4]) {
  const __m256i a = _mm256_packs_epi32(v[0], v[1]), b = _mm256_packs_epi32(v[2], v[3]);
  return _mm256_permutevar8x32_epi32(_mm256_packs_epi16(a, b),
                                     _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7));
}

// The lowest byte of each number with its sign; the rest stays, exactly.
inline __m256i lowest(__m256i& v) {
  const __m256i byte = _mm256_srai_epi32(_mm256_slli_epi32(v, 24), 24);
  v = _mm256_srai_epi32(_mm256_sub_epi32(v, byte), 8);
  return byte;
}

inline void take_apart(const float* x, float scale, int half, Piece64& to) {
  __m256i rest[4], piece[4];
  for (int k = 0; k < 4; ++k)
    rest[k] = _mm256_cvtps_epi32(_mm256_mul_ps(at(x, k).v, _mm256_set1_ps(scale)));
  __m256i sums = _mm256_setzero_si256();
  const __m256i ones = _mm256_set1_epi8(1);
  for (int i = PIECES - 1; i >= 0; --i) {
    for (int k = 0; k < 4; ++k) piece[k] = lowest(rest[k]);
    const __m256i bytes = narrow_bytes(piece);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to.bytes[i] + 32 * half), bytes);
    const __m256i four = _mm256_dpbusd_epi32(_mm256_setzero_si256(), ones, bytes);
    sums = _mm256_add_epi32(sums, _mm256_slli_epi32(four, 8 * (PIECES - 1 - i)));
  }
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to.sums[half]), sums);
}

constexpr float LEAST = 1e-25f, MOST = 1e25f;  // of the largest of 64, where it is not zero

// 2^e so that |x| 2^e is 2^22 at least and not so large that its highest byte would not be one.
inline bool scale_of(float top, float& scale, float& unit) {
  scale = unit = 0.0f;
  if (top == 0.0f) return true;
  if (!(top >= LEAST && top <= MOST)) return false;
  const uint32_t exponent = to_bits(top * 1.01f) >> 23;
  scale = from_bits((254 + 22 - exponent) << 23);
  unit = from_bits((exponent - 22) << 23);
  return true;
}

inline bool arrange_bytes(const Op& op, const float* x, float* to) {
  const int32_t type = op.weight_type;
  Piece64* piece = reinterpret_cast<Piece64*>(to);
  alignas(32) float rest[EACH], ordered[EACH];
  for (int64_t i = 0; i < whole(op.n, CUT); i += EACH, ++piece) {
    const float *from = padded_part(x, i, op.n, rest), *part = from;
    float scale;
    if (!scale_of(largest(from), scale, piece->unit)) return false;
    if (type < Q4_K) in_order(type, from, ordered), part = ordered;
    take_apart(part, scale, 0, *piece);
    take_apart(part + 32, scale, 1, *piece);
    if (type >= Q4_K) {
      float* lanes = piece[-(i / EACH % 4)].lanes + i / EACH % 4 * 2;
      for (int h = 0; h < 2; ++h)
        lanes[h] = ((at(from, 4 * h) + at(from, 4 * h + 1)) + (at(from, 4 * h + 2) + at(from, 4 * h + 3))).sum();
    } else {
      // Four bytes of the low halves and four of the high ones are in one lane.
      for (int l = 0; l < 8; ++l) {
        float sum = 0;
        for (int b = 0; b < 4; ++b) sum += ordered[4 * l + b] + ordered[32 + 4 * l + b];
        piece->lanes[l] = sum;
      }
    }
  }
  return true;
}

// ---- Steps.

struct OnBytes {
  using Input = const Piece64*;
  static inline Input input(const PackedProduct& p, int64_t i) {
    return reinterpret_cast<const Piece64*>(p.x) + i / EACH;
  }
};

inline __m256i dot(__m256i sum, __m256i levels, const signed char* x) {
  return _mm256_dpbusd_epi32(sum, levels, load_256(x));
}

// Σ q X of 64 levels below 32, four and four to a lane: below 2^31, and so are the sums on the way.
inline __m256i levels_times(const Levels& q, const Piece64& x) {
  __m256i sum = _mm256_setzero_si256();
  for (int i = 0; i < PIECES; ++i) {
    if (i) sum = _mm256_slli_epi32(sum, 8);
    sum = dot(dot(sum, q.low, x.bytes[i]), q.high, x.bytes[i] + 32);
  }
  return sum;
}
// The same of 32 levels below 64.
inline __m256i levels_times(__m256i q, const Piece64& x, int half) {
  __m256i sum = _mm256_setzero_si256();
  for (int i = 0; i < PIECES; ++i) {
    if (i) sum = _mm256_slli_epi32(sum, 8);
    sum = dot(sum, q, x.bytes[i] + 32 * half);
  }
  return sum;
}

// zero · Σ X in each lane, for a zero that is a power of two.
template <int SHIFT> inline __m256i zeros_times(const Piece64& x) {
  return _mm256_slli_epi32(_mm256_add_epi32(load_256(x.sums[0]), load_256(x.sums[1])), SHIFT);
}

struct BytesQ4_0 : OnBytes {
  static constexpr int64_t bytes = 18;
  static inline Vec step(const Byte* a, const Byte* b, Input x, Vec sum) {
    const __m256i q = _mm256_sub_epi32(levels_times(four_bits(a + 2, b + 2), *x), zeros_times<3>(*x));
    return fma(widened(q), halves(a, b) * Vec::set(x->unit), sum);
  }
};
struct BytesQ4_1 : OnBytes {
  static constexpr int64_t bytes = 20;
  static inline Vec step(const Byte* a, const Byte* b, Input x, Vec sum) {
    sum = fma(halves(a + 2, b + 2), Vec::load(x->lanes), sum);
    const __m256i q = levels_times(four_bits(a + 4, b + 4), *x);
    return fma(widened(q), halves(a, b) * Vec::set(x->unit), sum);
  }
};
struct BytesQ5_0 : OnBytes {
  static constexpr int64_t bytes = 22;
  static inline Vec step(const Byte* a, const Byte* b, Input x, Vec sum) {
    const Levels q = five_bits(a + 6, b + 6, a + 2, b + 2);
    const __m256i all = _mm256_sub_epi32(levels_times(q, *x), zeros_times<4>(*x));
    return fma(widened(all), halves(a, b) * Vec::set(x->unit), sum);
  }
};
struct BytesQ5_1 : OnBytes {
  static constexpr int64_t bytes = 24;
  static inline Vec step(const Byte* a, const Byte* b, Input x, Vec sum) {
    sum = fma(halves(a + 2, b + 2), Vec::load(x->lanes), sum);
    const __m256i q = levels_times(five_bits(a + 8, b + 8, a + 4, b + 4), *x);
    return fma(widened(q), halves(a, b) * Vec::set(x->unit), sum);
  }
};

// Of 256 features in four pieces; eighth i is half i % 2 of piece i / 2.
struct OfEighths : OnBytes {
  static inline Vec times(int i, __m256i q, Input x) {
    return widened(levels_times(q, x[i / 2], i % 2)) * Vec::set(x[i / 2].unit);
  }
};
struct BytesQ4_K : OfEighths {
  static constexpr int64_t bytes = 144;
  static inline Vec step(const Byte* p, Input x, Vec sum) {
    const Eighths e = eighths(p);
    sum = less(e.minima, Vec::load(x->lanes), sum);
    levels_of_q4_k(p, [&](int i, __m256i q) { sum = fma(times(i, q, x), lane(e.scales, i), sum); });
    return sum;
  }
};
struct BytesQ5_K : OfEighths {
  static constexpr int64_t bytes = 176;
  static inline Vec step(const Byte* p, Input x, Vec sum) {
    const Eighths e = eighths(p);
    sum = less(e.minima, Vec::load(x->lanes), sum);
    levels_of_q5_k(p, [&](int i, __m256i q) { sum = fma(times(i, q, x), lane(e.scales, i), sum); });
    return sum;
  }
};
struct BytesQ6_K : OfEighths {
  static constexpr int64_t bytes = 210;
  static inline Vec step(const Byte* p, Input x, Vec sum) {
    const Vec d = half(p + 208);
    const Vec scales[2] = {signed_bytes_at(p + 192) * d, signed_bytes_at(p + 200) * d};
    levels_of_q6_k(p, [&](int i, __m256i q) {
      const Piece64& part = x[i / 2];
      const __m256i zeros = _mm256_slli_epi32(load_256(part.sums[i % 2]), 5);
      const Vec all = widened(_mm256_sub_epi32(levels_times(q, part, i % 2), zeros));
      sum = fma(all * Vec::set(part.unit), two_lanes(scales[i / 4], i % 4), sum);
    });
    return sum;
  }
};

struct BytesInt4 : OnBytes {
  static constexpr int64_t features = 64, bytes = 32;
  static inline __m256i levels(const Byte* q, Input x) {
    const __m256i raw = load_256(q);
    return levels_times(Levels{lows(raw), highs(raw)}, *x);
  }
  static inline Vec step(const Byte* q, Input x, const Segment&) {
    return widened(_mm256_sub_epi32(levels(q, x), zeros_times<3>(*x))) * Vec::set(x->unit);
  }
  static inline Vec shifted(const Byte* q, Input x, Vec zero) {
    return less(zero, Vec::load(x->lanes), widened(levels(q, x)) * Vec::set(x->unit));
  }
  static inline Vec sums(Input x) { return Vec::load(x->lanes); }
};

const OneRow* bytes_of_row(const Op& op) {
  static const OneRow int4{arrange_bytes, groups<BytesInt4>},
      q4_0{arrange_bytes, pairs_of_blocks<BytesQ4_0>}, q4_1{arrange_bytes, pairs_of_blocks<BytesQ4_1>},
      q5_0{arrange_bytes, pairs_of_blocks<BytesQ5_0>}, q5_1{arrange_bytes, pairs_of_blocks<BytesQ5_1>},
      q4_k{arrange_bytes, large_blocks<BytesQ4_K>}, q5_k{arrange_bytes, large_blocks<BytesQ5_K>},
      q6_k{arrange_bytes, large_blocks<BytesQ6_K>};
  switch (op.weight_type) {
    case INT4: return fits_steps(op, BytesInt4::features) ? &int4 : nullptr;
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
