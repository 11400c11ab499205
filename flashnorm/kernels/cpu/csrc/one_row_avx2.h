// One row of x against packed weights with AVX2: numbers come apart in registers, in the order in
// which x has been arranged, so that none of them has to be shuffled.
//
// A row of four bits takes a shift, a mask, a conversion and a product for eight features; it is read
// at the speed of memory as long as that is below some 15 GB/s for a core. Products of bytes (VNNI)
// would need x in three pieces of 8 bits to keep float32's precision, which costs as much.
#pragma once
#define FLASHNORM_ONE_ROW
#include "one_row.h"

namespace {

constexpr int64_t EACH = 64;  // features whose halves of bytes are read together

inline __m256i load_256(const void* p) { return _mm256_loadu_si256(static_cast<const __m256i*>(p)); }
inline __m128i load_128(const void* p) { return _mm_loadu_si128(static_cast<const __m128i*>(p)); }
inline __m256i two_of_16(const Byte* a, const Byte* b) {
  return _mm256_inserti128_si256(_mm256_castsi128_si256(load_128(a)), load_128(b), 1);
}
inline Vec widened(__m256i q) { return {_mm256_cvtepi32_ps(q)}; }
inline Vec at(const float* x, int k) { return Vec::load(x + k * Vec::lanes); }

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
template <int SHIFT> struct EveryOtherNibble {  // bits 8K + SHIFT on
  __m256i v;
  template <int K> inline Vec get() const { return nibble<2 * K + SHIFT / 4>(v); }
};
struct Bytes {
  __m256i v;
  template <int K> inline Vec get() const { return byte<K>(v); }
};
struct SignedBytes {
  __m256i v;
  template <int K> inline Vec get() const { return signed_byte<K>(v); }
};

// 32 numbers of 8 bits, and x as it lies.
inline Vec bytes_to_floats(const void* p) {
  return widened(_mm256_cvtepi8_epi32(_mm_loadl_epi64(static_cast<const __m128i*>(p))));
}
inline Vec thirty_two(const Byte* q, const float* x) {
  const Vec even = fma(bytes_to_floats(q + 16), at(x, 2), bytes_to_floats(q) * at(x, 0));
  const Vec odd = fma(bytes_to_floats(q + 24), at(x, 3), bytes_to_floats(q + 8) * at(x, 1));
  return even + odd;
}

// [a, a, a, a, b, b, b, b] of two float16 numbers, and eight times one.
inline Vec halves(const Byte* a, const Byte* b) {
  uint16_t first, second;
  memcpy(&first, a, 2), memcpy(&second, b, 2);
  const __m128 both = _mm_cvtph_ps(_mm_cvtsi32_si128(first | second << 16));
  const __m256i order = _mm256_setr_epi32(0, 0, 0, 0, 1, 1, 1, 1);
  return {_mm256_permutevar8x32_ps(_mm256_castps128_ps256(both), order)};
}
inline Vec half(const Byte* p) {
  uint16_t bits;
  memcpy(&bits, p, 2);
  return {_mm256_broadcastss_ps(_mm_cvtph_ps(_mm_cvtsi32_si128(bits)))};
}
inline Vec lane(Vec v, int i) {
  return {_mm256_permutevar8x32_ps(v.v, _mm256_set1_epi32(i))};
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

inline int64_t whole(int64_t n, int64_t each) { return (n + each - 1) / each * each; }
inline float* sums_of(const float* x, int64_t n) { return const_cast<float*>(x) + whole(n, CUT); }

// x and zeros behind it, arranged 64 by 64, and the sums behind that: a vector for each 64, or where
// blocks have 256 features one number for each 32.
inline void arrange_row(const Op& op, const float* x, float* to) {
  const int32_t type = op.weight_type;
  const bool eighths = type >= Q4_K;
  float* sums = sums_of(to, op.n);
  alignas(32) float rest[EACH];
  for (int64_t i = 0; i < whole(op.n, CUT); i += EACH) {
    const float* from = x + i;
    if (i + EACH > op.n) {
      for (int64_t j = 0; j < EACH; ++j) rest[j] = i + j < op.n ? x[i + j] : 0.0f;
      from = rest;
    }
    float* place = to + i;
    if (eighths) {
      by_eighths(from, place);
      for (int h = 0; h < 2; ++h) {
        const float* part = place + 32 * h;
        sums[i / 32 + h] = ((at(part, 0) + at(part, 1)) + (at(part, 2) + at(part, 3))).sum();
      }
      continue;
    }
    if (type >= Q4_0) by_blocks(from, place);
    else if (type == INT4 || type == CODEBOOK4) by_pairs(from, place, type == CODEBOOK4);
    else memcpy(place, from, EACH * sizeof(float));
    lane_sums(place).store(sums + i / 8);
  }
}

// Where the weights lie that are read `ahead` bytes later than row `c` of a product.
inline const char* later(const PackedProduct& p, int64_t c) {
  const char* first = static_cast<const char*>(p.s.weight) + (p.at + c) * p.s.stride;
  const int64_t left = (p.count - c) * p.s.stride - p.ahead;
  return left > 0 || !p.next ? first + p.ahead : static_cast<const char*>(p.next) - left;
}

inline void fetch(const char* p, int64_t bytes) {
  for (int64_t b = 0; b < bytes; b += LINE) prefetch(p + b);
}

}  // namespace
