// One row of x against packed weights with AVX2: what the ways to do it have in common. A way says by
// its steps what a block of weights and the x for it come to; here they are taken along a row.
#pragma once
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
inline Vec less(Vec a, Vec b, Vec sum) { return {_mm256_fnmadd_ps(a.v, b.v, sum.v)}; }

// [a, a, a, a, b, b, b, b] of two float16 numbers, and eight times one.
inline Vec halves(const Byte* a, const Byte* b) {
  uint16_t first, second;
  memcpy(&first, a, 2), memcpy(&second, b, 2);
  const __m128 pair = _mm_cvtph_ps(_mm_cvtsi32_si128(first | second << 16));
  const __m256i order = _mm256_setr_epi32(0, 0, 0, 0, 1, 1, 1, 1);
  return {_mm256_permutevar8x32_ps(_mm256_castps128_ps256(pair), order)};
}
inline Vec half(const Byte* p) {
  uint16_t bits;
  memcpy(&bits, p, 2);
  return {_mm256_broadcastss_ps(_mm_cvtph_ps(_mm_cvtsi32_si128(bits)))};
}
// [a, a, a, a, b, b, b, b]
inline Vec both(float a, float b) { return {_mm256_set_m128(_mm_set1_ps(b), _mm_set1_ps(a))}; }
inline Vec lane(Vec v, int i) {
  return {_mm256_permutevar8x32_ps(v.v, _mm256_set1_epi32(i))};
}
// Lanes 2 i and 2 i + 1, four times each.
inline Vec two_lanes(Vec v, int i) {
  const __m256i first = _mm256_setr_epi32(0, 0, 0, 0, 1, 1, 1, 1);
  return {_mm256_permutevar8x32_ps(v.v, _mm256_add_epi32(first, _mm256_set1_epi32(2 * i)))};
}

// The low and the high halves of bytes.
inline __m256i lows(__m256i v) { return _mm256_and_si256(v, _mm256_set1_epi8(15)); }
inline __m256i highs(__m256i v) { return lows(_mm256_srli_epi16(v, 4)); }

inline Vec signed_bytes_at(const void* p) {
  return widened(_mm256_cvtepi8_epi32(_mm_loadl_epi64(static_cast<const __m128i*>(p))));
}

// ---- What is inside of blocks.

// 16 for each byte whose bit among the four bytes of a block is set, of two blocks; `side` 0 for
// features 0 .. 15 of both, 1 for those after them.
inline __m256i fifths(const Byte* a, const Byte* b, int side) {
  uint16_t first, second;
  memcpy(&first, a + 2 * side, 2), memcpy(&second, b + 2 * side, 2);
  const __m256i pair = _mm256_set_m128i(_mm_set1_epi16(static_cast<short>(second)),
                                        _mm_set1_epi16(static_cast<short>(first)));
  const __m128i order = _mm_setr_epi8(0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1);
  const __m256i spread = _mm256_shuffle_epi8(pair, _mm256_broadcastsi128_si256(order));
  const __m256i bit = _mm256_set1_epi64x(static_cast<long long>(0x8040201008040201ull));
  const __m256i set = _mm256_cmpeq_epi8(_mm256_and_si256(spread, bit), bit);
  return _mm256_and_si256(set, _mm256_set1_epi8(16));
}

// Of two blocks with 16 bytes of halves each: features 0 .. 15 of both, and those after them.
struct Levels { __m256i low, high; };
inline Levels four_bits(const Byte* a, const Byte* b) {
  const __m256i raw = two_of_16(a, b);
  return {lows(raw), highs(raw)};
}
inline Levels five_bits(const Byte* a, const Byte* b, const Byte* bits_a, const Byte* bits_b) {
  const Levels four = four_bits(a, b);
  return {_mm256_or_si256(four.low, fifths(bits_a, bits_b, 0)),
          _mm256_or_si256(four.high, fifths(bits_a, bits_b, 1))};
}

// Scales and minima of eight times 32 features.
struct Eighths { Vec scales, minima; };
inline Eighths eighths(const Byte* p) {
  const SixBits given = six_bits_of_eight(p + 4);
  const auto eight_of = [](uint64_t bytes) {
    return widened(_mm256_cvtepu8_epi32(_mm_cvtsi64_si128(static_cast<long long>(bytes))));
  };
  return {eight_of(given.scales) * half(p), eight_of(given.minima) * half(p + 2)};
}

// Calls with levels(i) for each eighth i of a block of Q4_K, Q5_K or Q6_K: 32 bytes.
template <class Use> inline void levels_of_q4_k(const Byte* p, const Use& use) {
  for (int c = 0; c < 4; ++c) {
    const __m256i raw = load_256(p + 16 + 32 * c);
    use(2 * c, lows(raw));
    use(2 * c + 1, highs(raw));
  }
}
template <class Use> inline void levels_of_q5_k(const Byte* p, const Use& use) {
  __m256i fifth = load_256(p + 16);
  for (int c = 0; c < 4; ++c) {
    const __m256i raw = load_256(p + 48 + 32 * c);
    for (int h = 0; h < 2; ++h) {
      const __m256i bit = _mm256_and_si256(fifth, _mm256_set1_epi8(1));
      use(2 * c + h, _mm256_or_si256(h ? highs(raw) : lows(raw), _mm256_slli_epi16(bit, 4)));
      fifth = _mm256_srli_epi16(fifth, 1);
    }
  }
}
template <class Use> inline void levels_of_q6_k(const Byte* p, const Use& use) {
  for (int side = 0; side < 2; ++side) {
    const __m256i raw[2] = {load_256(p + 64 * side), load_256(p + 64 * side + 32)};
    __m256i top = load_256(p + 128 + 32 * side);
    for (int j = 0; j < 4; ++j) {
      const __m256i bits = _mm256_and_si256(top, _mm256_set1_epi8(3));
      use(4 * side + j, _mm256_or_si256(j > 1 ? highs(raw[j % 2]) : lows(raw[j % 2]),
                                        _mm256_slli_epi16(bits, 4)));
      top = _mm256_srli_epi16(top, 2);
    }
  }
}

// ---- Along a row.

inline int64_t whole(int64_t n, int64_t each) { return (n + each - 1) / each * each; }

// Features i..i + 64 of x, in `rest` with zeros behind them where there are fewer.
inline const float* padded_part(const float* x, int64_t i, int64_t n, float* rest) {
  if (i + EACH <= n) return x + i;
  for (int64_t j = 0; j < EACH; ++j) rest[j] = i + j < n ? x[i + j] : 0.0f;
  return rest;
}

const Byte nothing[64] = {};  // a block whose scale is zero

// C rows of weights side by side share what is read of x.
constexpr int64_t BESIDE = 2;

template <int C> struct Beside {
  const Byte* at[C];
  const char* ahead[C];
  Vec sum[C];

  Beside(const PackedProduct& p, int64_t first) {
    for (int c = 0; c < C; ++c) {
      at[c] = static_cast<const Byte*>(p.s.weight) + (p.at + first + c) * p.s.stride;
      ahead[c] = later(p, first + c);
      sum[c] = Vec::set(0);
    }
  }
  inline void advance(int64_t bytes) {
    for (int c = 0; c < C; ++c) {
      fetch(ahead[c], bytes);
      at[c] += bytes, ahead[c] += bytes;
    }
  }
  inline void store(float* out) const {
    for (int c = 0; c < C; ++c) out[c] = sum[c].sum();
  }
};

// Blocks of 32 features, two to a step.
template <class S, int C> inline void pairs_of_rows(const PackedProduct& p, int64_t first) {
  const int64_t blocks = p.op.n / 32;
  Beside<C> r(p, first);
  int64_t b = 0;
  for (; b + 2 <= blocks; b += 2) {
    const auto x = S::input(p, b * 32);
    for (int c = 0; c < C; ++c) r.sum[c] = S::step(r.at[c], r.at[c] + S::bytes, x, r.sum[c]);
    r.advance(2 * S::bytes);
  }
  if (b < blocks)
    for (int c = 0; c < C; ++c) r.sum[c] = S::step(r.at[c], nothing, S::input(p, b * 32), r.sum[c]);
  r.store(p.out + first);
}

// Blocks of 256 features.
template <class S, int C> inline void large_rows(const PackedProduct& p, int64_t first) {
  const int64_t blocks = p.op.n / 256;
  Beside<C> r(p, first);
  for (int64_t b = 0; b < blocks; ++b) {
    for (int c = 0; c < C; ++c) r.sum[c] = S::step(r.at[c], S::input(p, b * 256), r.sum[c]);
    r.advance(S::bytes);
  }
  r.store(p.out + first);
}

template <class S> void pairs_of_blocks(const PackedProduct& p) {
  int64_t c = 0;
  for (; c + BESIDE <= p.count; c += BESIDE) pairs_of_rows<S, BESIDE>(p, c);
  for (; c < p.count; ++c) pairs_of_rows<S, 1>(p, c);
}

template <class S> void large_blocks(const PackedProduct& p) {
  int64_t c = 0;
  for (; c + BESIDE <= p.count; c += BESIDE) large_rows<S, BESIDE>(p, c);
  for (; c < p.count; ++c) large_rows<S, 1>(p, c);
}

}  // namespace
