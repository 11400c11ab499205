// One row of x against the blocks of GGUF files.
#pragma once
#include <type_traits>

#include "one_row_avx2.h"

namespace {

// A step takes one or two blocks, x for it, and the sums of x.

struct Step { const float *x, *sums; };

// 32 features a block, two blocks a step.
struct StepQ4_0 {
  static constexpr int64_t bytes = 18;
  static inline Vec step(const Byte* a, const Byte* b, Step s, Vec sum) {
    return fma(eight(SignedNibbles(two_of_16(a + 2, b + 2)), s.x), halves(a, b), sum);
  }
};
struct StepQ4_1 {
  static constexpr int64_t bytes = 20;
  static inline Vec step(const Byte* a, const Byte* b, Step s, Vec sum) {
    sum = fma(halves(a + 2, b + 2), Vec::load(s.sums), sum);
    return fma(eight(Nibbles{two_of_16(a + 4, b + 4)}, s.x), halves(a, b), sum);
  }
};

// 16 for each byte of a vector whose bit among four bytes is set; `side` 0 for features 0 .. 15 of
// both blocks, 1 for those after them.
inline __m256i fifths(const Byte* a, const Byte* b, int side) {
  uint16_t first, second;
  memcpy(&first, a + 2 * side, 2), memcpy(&second, b + 2 * side, 2);
  const __m256i both = _mm256_set_m128i(_mm_set1_epi16(static_cast<short>(second)),
                                        _mm_set1_epi16(static_cast<short>(first)));
  const __m256i spread = _mm256_shuffle_epi8(
      both, _mm256_setr_epi8(0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0, 1, 1,
                             1, 1, 1, 1, 1, 1));
  const __m256i bit = _mm256_set1_epi64x(static_cast<long long>(0x8040201008040201ull));
  const __m256i set = _mm256_cmpeq_epi8(_mm256_and_si256(spread, bit), bit);
  return _mm256_and_si256(set, _mm256_set1_epi8(16));
}

// Features that have b + 4 l in common are side by side in x: 2 b + h as for four bits.
template <bool SIGNED> inline Vec five_bits(const Byte* a, const Byte* b, const Byte* bits_a,
                                            const Byte* bits_b, const float* x) {
  const __m256i raw = two_of_16(a, b), mask = _mm256_set1_epi8(15);
  __m256i low = _mm256_or_si256(_mm256_and_si256(raw, mask), fifths(bits_a, bits_b, 0));
  __m256i high = _mm256_or_si256(_mm256_and_si256(_mm256_srli_epi16(raw, 4), mask),
                                 fifths(bits_a, bits_b, 1));
  if (SIGNED) {
    const __m256i zero = _mm256_set1_epi8(16);
    low = _mm256_sub_epi8(low, zero), high = _mm256_sub_epi8(high, zero);
  }
  using Level = typename std::conditional<SIGNED, SignedBytes, Bytes>::type;
  const Level l{low}, h{high};
  Vec even = l.template get<0>() * at(x, 0), odd = h.template get<0>() * at(x, 1);
  even = fma(l.template get<1>(), at(x, 2), even), odd = fma(h.template get<1>(), at(x, 3), odd);
  even = fma(l.template get<2>(), at(x, 4), even), odd = fma(h.template get<2>(), at(x, 5), odd);
  even = fma(l.template get<3>(), at(x, 6), even), odd = fma(h.template get<3>(), at(x, 7), odd);
  return even + odd;
}

struct StepQ5_0 {
  static constexpr int64_t bytes = 22;
  static inline Vec step(const Byte* a, const Byte* b, Step s, Vec sum) {
    return fma(five_bits<true>(a + 6, b + 6, a + 2, b + 2, s.x), halves(a, b), sum);
  }
};
struct StepQ5_1 {
  static constexpr int64_t bytes = 24;
  static inline Vec step(const Byte* a, const Byte* b, Step s, Vec sum) {
    sum = fma(halves(a + 2, b + 2), Vec::load(s.sums), sum);
    return fma(five_bits<false>(a + 8, b + 8, a + 4, b + 4, s.x), halves(a, b), sum);
  }
};

struct StepQ8_0 {
  static constexpr int64_t bytes = 34;
  static inline Vec step(const Byte* a, const Byte* b, Step s, Vec sum) {
    sum = fma(thirty_two(a + 2, s.x), half(a), sum);
    return fma(thirty_two(b + 2, s.x + 32), half(b), sum);
  }
};

// 256 features a block, one block a step.
struct Eighths { Vec scales, minima; };

inline Eighths eighths(const Byte* p) {
  uint32_t a, b, c;
  memcpy(&a, p + 4, 4), memcpy(&b, p + 8, 4), memcpy(&c, p + 12, 4);
  constexpr uint32_t six = 0x3f3f3f3f, four = 0x0f0f0f0f, two = 0x03030303;
  const uint64_t scales = (a & six) | static_cast<uint64_t>((c & four) | (a >> 6 & two) << 4) << 32;
  const uint64_t minima =
      (b & six) | static_cast<uint64_t>((c >> 4 & four) | (b >> 6 & two) << 4) << 32;
  const auto eight_of = [](uint64_t bytes) {
    return widened(_mm256_cvtepu8_epi32(_mm_cvtsi64_si128(static_cast<long long>(bytes))));
  };
  return {eight_of(scales) * half(p), eight_of(minima) * half(p + 2)};
}

inline Vec less(Vec a, Vec b, Vec sum) { return {_mm256_fnmadd_ps(a.v, b.v, sum.v)}; }

struct StepQ4_K {
  static constexpr int64_t bytes = 144;
  static inline Vec step(const Byte* p, Step s, Vec sum) {
    const Eighths e = eighths(p);
    sum = less(e.minima, Vec::load(s.sums), sum);
    for (int c = 0; c < 4; ++c) {
      const __m256i v = load_256(p + 16 + 32 * c);
      sum = fma(four(EveryOtherNibble<0>{v}, s.x + 64 * c), lane(e.scales, 2 * c), sum);
      sum = fma(four(EveryOtherNibble<4>{v}, s.x + 64 * c + 32), lane(e.scales, 2 * c + 1), sum);
    }
    return sum;
  }
};

struct StepQ5_K {
  static constexpr int64_t bytes = 176;
  static inline Vec step(const Byte* p, Step s, Vec sum) {
    const Eighths e = eighths(p);
    sum = less(e.minima, Vec::load(s.sums), sum);
    const __m256i mask = _mm256_set1_epi8(15), bit = _mm256_set1_epi8(1);
    __m256i high = load_256(p + 16);
    for (int c = 0; c < 4; ++c) {
      const __m256i raw = load_256(p + 48 + 32 * c);
      for (int h = 0; h < 2; ++h) {
        const __m256i low = _mm256_and_si256(h ? _mm256_srli_epi16(raw, 4) : raw, mask);
        const __m256i fifth = _mm256_slli_epi16(_mm256_and_si256(high, bit), 4);
        high = _mm256_srli_epi16(high, 1);
        const Bytes q{_mm256_or_si256(low, fifth)};
        sum = fma(four(q, s.x + 64 * c + 32 * h), lane(e.scales, 2 * c + h), sum);
      }
    }
    return sum;
  }
};

struct StepQ6_K {
  static constexpr int64_t bytes = 210;
  static inline Vec step(const Byte* p, Step s, Vec sum) {
    const Vec d = half(p + 208);
    const __m256i mask = _mm256_set1_epi8(15), two = _mm256_set1_epi8(3), zero = _mm256_set1_epi8(32);
    for (int side = 0; side < 2; ++side) {
      const Vec scales = bytes_to_floats(p + 192 + 8 * side) * d;
      const __m256i lows[2] = {load_256(p + 64 * side), load_256(p + 64 * side + 32)};
      __m256i high = load_256(p + 128 + 32 * side);
      for (int j = 0; j < 4; ++j) {
        const __m256i raw = lows[j % 2];
        const __m256i low = _mm256_and_si256(j > 1 ? _mm256_srli_epi16(raw, 4) : raw, mask);
        const __m256i top = _mm256_slli_epi16(_mm256_and_si256(high, two), 4);
        high = _mm256_srli_epi16(high, 2);
        const SignedBytes q{_mm256_sub_epi8(_mm256_or_si256(low, top), zero)};
        // A scale for each 16 features: two in a vector of them.
        const __m256i which = _mm256_add_epi32(_mm256_setr_epi32(0, 0, 0, 0, 1, 1, 1, 1),
                                               _mm256_set1_epi32(2 * j));
        const Vec scale{_mm256_permutevar8x32_ps(scales.v, which)};
        sum = fma(four(q, s.x + 128 * side + 32 * j), scale, sum);
      }
    }
    return sum;
  }
};

const Byte nothing[64] = {};  // a block whose scale is zero

template <class S> void pairs_of_blocks(const PackedProduct& p) {
  const int64_t blocks = p.op.n / 32;
  const float* sums = sums_of(p.x, p.op.n);
  for (int64_t c = 0; c < p.count; ++c) {
    const Byte* w = static_cast<const Byte*>(p.s.weight) + (p.at + c) * p.s.stride;
    const char* ahead = later(p, c);
    Vec sum = Vec::set(0);
    int64_t b = 0;
    for (; b + 2 <= blocks; b += 2, w += 2 * S::bytes, ahead += 2 * S::bytes) {
      fetch(ahead, 2 * S::bytes);
      sum = S::step(w, w + S::bytes, {p.x + b * 32, sums + b * 4}, sum);
    }
    if (b < blocks) sum = S::step(w, nothing, {p.x + b * 32, sums + b * 4}, sum);
    p.out[c] = sum.sum();
  }
}

template <class S> void large_blocks(const PackedProduct& p) {
  const int64_t blocks = p.op.n / 256;
  const float* sums = sums_of(p.x, p.op.n);
  for (int64_t c = 0; c < p.count; ++c) {
    const Byte* w = static_cast<const Byte*>(p.s.weight) + (p.at + c) * p.s.stride;
    const char* ahead = later(p, c);
    Vec sum = Vec::set(0);
    for (int64_t b = 0; b < blocks; ++b, w += S::bytes, ahead += S::bytes) {
      fetch(ahead, S::bytes);
      sum = S::step(w, {p.x + b * 256, sums + b * 8}, sum);
    }
    p.out[c] = sum.sum();
  }
}

}  // namespace
