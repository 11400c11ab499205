// One row of x against levels of eight bits or fewer by products of bytes (VNNI), 64 to an instruction;
// x is arranged as whole numbers (whole_numbers.h). Four rows of weights share what is read of x.
#pragma once
#include <type_traits>

#include "whole_numbers.h"

namespace {

// Where rows of weights that go side by side are being read, and how much later what is asked for.
template <int C> struct Beside {
  const Byte* first;
  int64_t stride, skip;

  Beside(const PackedProduct& p, int64_t c)
      : first(static_cast<const Byte*>(p.s.weight) + (p.at + c) * p.s.stride), stride(p.s.stride),
        skip(later(p, c) - reinterpret_cast<const char*>(first)) {}
  inline const Byte* at(int c) const { return first + c * stride; }
  inline void advance(int64_t bytes) {
    for (int c = 0; c < C; ++c) fetch(reinterpret_cast<const char*>(at(c)) + skip, bytes);
    first += bytes;
  }
};

// Their sums, by lanes.
template <int C> struct Totals {
  __m512 of[C];
  Totals() {
    for (int c = 0; c < C; ++c) of[c] = _mm512_setzero_ps();
  }
  inline void store(float* out) const {
    for (int c = 0; c < C; ++c) out[c] = _mm512_reduce_add_ps(of[c]);
  }
};

constexpr int BESIDE = 4;
// Calls with a constant of each number of rows that go side by side: rows<C>(first).
template <class Rows> inline void side_by_side(int64_t count, const Rows& rows) {
  int64_t c = 0;
  for (; c + BESIDE <= count; c += BESIDE) rows(std::integral_constant<int, BESIDE>(), c);
  for (; c < count; ++c) rows(std::integral_constant<int, 1>(), c);
}

inline __m256i load_32(const Byte* p) {
  return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
}
inline __m128i load_16(const Byte* p) { return _mm_loadu_si128(reinterpret_cast<const __m128i*>(p)); }

// ---- Products of levels with X.

inline __m512i bytes_512(int v) { return _mm512_set1_epi8(static_cast<char>(v)); }
inline __m512i dot(__m512i sum, __m512i levels, const signed char* x) {
  return _mm512_dpbusd_epi32(sum, levels, load_512(x));
}

// Σ q X by lanes: of one part, or of two whose lanes have the same units. Sums fit by `Levels::bits`;
// what is beyond on the way comes back, since whole numbers wrap around.
inline __m512i times(__m512i q, const Part* x) {
  const __m512i a = dot(_mm512_setzero_si512(), q, x->bytes[0]);
  const __m512i b = dot(_mm512_slli_epi32(a, 8), q, x->bytes[1]);
  return dot(_mm512_slli_epi32(b, 8), q, x->bytes[2]);
}
struct Halves { __m512i low, high; };
inline __m512i times(Halves q, const Part* x) {
  __m512i sum = dot(dot(_mm512_setzero_si512(), q.low, x[0].bytes[0]), q.high, x[1].bytes[0]);
  sum = dot(dot(_mm512_slli_epi32(sum, 8), q.low, x[0].bytes[1]), q.high, x[1].bytes[1]);
  return dot(dot(_mm512_slli_epi32(sum, 8), q.low, x[0].bytes[2]), q.high, x[1].bytes[2]);
}
inline __m512 scaled(__m512i sum, const Part* x) {
  return _mm512_mul_ps(_mm512_cvtepi32_ps(sum), _mm512_loadu_ps(x->units));
}
// Σ q x, and Σ (q − zero) x.
template <class Q> inline __m512 raw(Q q, const Part* x) { return scaled(times(q, x), x); }
template <class Q> inline __m512 shifted(Q q, const Part* x) {
  return scaled(_mm512_add_epi32(times(q, x), load_512(x->start)), x);
}

inline Halves halves_of(__m512i v) {
  const __m512i low = bytes_512(15);
  return {_mm512_and_si512(v, low), _mm512_and_si512(_mm512_srli_epi16(v, 4), low)};
}

// ---- Blocks of 32 features. B of those that a step may have lie at p, STRIDE bytes each.

template <int STRIDE, int B> constexpr __mmask64 bytes_there() {
  return STRIDE * B >= 64 ? ~0ull : (1ull << STRIDE * B % 64) - 1;
}

// float16 numbers `AT` bytes inside of B of four blocks, each in four lanes; or of two, in eight.
template <int STRIDE, int AT, int EACH, int B> inline __m512 scales(const Byte* p) {
  constexpr int many = 16 / EACH;
  if (STRIDE * (many - 1) + AT + 2 <= 64) {
    const __m512i there = _mm512_maskz_loadu_epi8(bytes_there<STRIDE, B>(), p);
    static_assert(STRIDE % 2 == 0, "words");
    constexpr int w = STRIDE / 2, first = AT / 2;
    const __m256i order = EACH == 4
        ? _mm256_setr_epi16(first, first, first, first, first + w, first + w, first + w, first + w,
                            first + 2 * w, first + 2 * w, first + 2 * w, first + 2 * w,
                            first + 3 * w, first + 3 * w, first + 3 * w, first + 3 * w)
        : _mm256_setr_epi16(first, first, first, first, first, first, first, first, first + w, first + w,
                            first + w, first + w, first + w, first + w, first + w, first + w);
    const __m512i found = _mm512_permutexvar_epi16(_mm512_castsi256_si512(order), there);
    return _mm512_cvtph_ps(_mm512_castsi512_si256(found));
  }
  uint64_t words = 0;
  for (int b = 0; b < B; ++b) {
    uint16_t word;
    memcpy(&word, p + STRIDE * b + AT, 2);
    words |= static_cast<uint64_t>(word) << 16 * b;
  }
  const __m128 four = _mm_cvtph_ps(_mm_cvtsi64_si128(static_cast<long long>(words)));
  const __m512i order = _mm512_setr_epi32(0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3);
  return _mm512_permutexvar_ps(order, _mm512_castps128_ps512(four));
}

// 16 bytes of each of B blocks.
template <int STRIDE, int B> inline __m512i sixteens(const Byte* p) {
  __m512i v = _mm512_zextsi128_si512(load_16(p));
  if (B > 1) v = _mm512_inserti32x4(v, load_16(p + STRIDE), 1);
  if (B > 2) v = _mm512_inserti32x4(v, load_16(p + 2 * STRIDE), 2);
  if (B > 3) v = _mm512_inserti32x4(v, load_16(p + 3 * STRIDE), 3);
  return v;
}

// A fifth bit for each feature, four bytes in each block.
template <int STRIDE, int B> inline Halves with_fifths(Halves q, const Byte* bits) {
  uint64_t low = 0, high = 0;
  for (int b = 0; b < B; ++b) {
    uint32_t of;
    memcpy(&of, bits + STRIDE * b, 4);
    low |= static_cast<uint64_t>(of & 0xffff) << 16 * b;
    high |= static_cast<uint64_t>(of >> 16) << 16 * b;
  }
  const __m512i fifth = bytes_512(16);
  return {_mm512_mask_add_epi8(q.low, low, q.low, fifth), _mm512_mask_add_epi8(q.high, high, q.high, fifth)};
}

struct BytesQ8_0 {
  static constexpr Levels levels{Order::PLAIN, 128, false, 22, false};
  static constexpr int bytes = 34, blocks = 2, parts = 1;
  template <int B> static inline __m512 step(const Byte* p, const Part* x, __m512 sum) {
    __m512i q = _mm512_zextsi256_si512(load_32(p + 2));
    if (B > 1) q = _mm512_inserti64x4(q, load_32(p + 2 + bytes), 1);
    const __m512 d = scales<bytes, 0, 8, B>(p);
    return _mm512_fmadd_ps(shifted(_mm512_xor_si512(q, bytes_512(128)), x), d, sum);
  }
};
struct BytesQ4_0 {
  static constexpr Levels levels{Order::HALVES, 8, true, 23, false};
  static constexpr int bytes = 18, blocks = 4, parts = 2;
  template <int B> static inline __m512 step(const Byte* p, const Part* x, __m512 sum) {
    const Halves q = halves_of(sixteens<bytes, B>(p + 2));
    return _mm512_fmadd_ps(shifted(q, x), scales<bytes, 0, 4, B>(p), sum);
  }
};
struct BytesQ4_1 {
  static constexpr Levels levels{Order::HALVES, 0, true, 23, false};
  static constexpr int bytes = 20, blocks = 4, parts = 2;
  template <int B> static inline __m512 step(const Byte* p, const Part* x, __m512 sum) {
    sum = _mm512_fmadd_ps(scales<bytes, 2, 4, B>(p), _mm512_loadu_ps(x->sums), sum);
    const Halves q = halves_of(sixteens<bytes, B>(p + 4));
    return _mm512_fmadd_ps(raw(q, x), scales<bytes, 0, 4, B>(p), sum);
  }
};
struct BytesQ5_0 {
  static constexpr Levels levels{Order::HALVES, 16, true, 23, false};
  static constexpr int bytes = 22, blocks = 4, parts = 2;
  template <int B> static inline __m512 step(const Byte* p, const Part* x, __m512 sum) {
    const Halves q = with_fifths<bytes, B>(halves_of(sixteens<bytes, B>(p + 6)), p + 2);
    return _mm512_fmadd_ps(shifted(q, x), scales<bytes, 0, 4, B>(p), sum);
  }
};
struct BytesQ5_1 {
  static constexpr Levels levels{Order::HALVES, 0, true, 23, false};
  static constexpr int bytes = 24, blocks = 4, parts = 2;
  template <int B> static inline __m512 step(const Byte* p, const Part* x, __m512 sum) {
    sum = _mm512_fmadd_ps(scales<bytes, 2, 4, B>(p), _mm512_loadu_ps(x->sums), sum);
    const Halves q = with_fifths<bytes, B>(halves_of(sixteens<bytes, B>(p + 8)), p + 4);
    return _mm512_fmadd_ps(raw(q, x), scales<bytes, 0, 4, B>(p), sum);
  }
};

template <class S, int B, int C> inline void step(const Beside<C>& w, const Part* x, Totals<C>& sum) {
  for (int c = 0; c < C; ++c) sum.of[c] = S::template step<B>(w.at(c), x, sum.of[c]);
}

template <class S, int C> inline void rows_of_blocks(const PackedProduct& p, int64_t first) {
  int64_t left = p.op.n / 32;
  const Part* x = reinterpret_cast<const Part*>(p.x);
  Beside<C> w(p, first);
  Totals<C> sum;
  for (; left >= S::blocks; left -= S::blocks, x += S::parts) {
    step<S, S::blocks>(w, x, sum);
    w.advance(S::blocks * S::bytes);
  }
  if (left == 1) step<S, 1>(w, x, sum);
  if (S::blocks > 2 && left == 2) step<S, 2>(w, x, sum);
  if (S::blocks > 2 && left == 3) step<S, 3>(w, x, sum);
  sum.store(p.out + first);
}

// ---- Blocks of 256 features.

// The scales and minima of eight times 32.
struct Eighths { __m512 scales, minima; };
inline __m512 half(const Byte* p) {
  uint16_t bits;
  memcpy(&bits, p, 2);
  return _mm512_broadcastss_ps(_mm_cvtph_ps(_mm_cvtsi32_si128(bits)));
}
inline Eighths eighths(const Byte* p) {
  const SixBits given = six_bits_of_eight(p + 4);
  const auto numbers = [](uint64_t bytes) {
    return _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_cvtsi64_si128(static_cast<long long>(bytes))));
  };
  return {_mm512_mul_ps(numbers(given.scales), half(p)), _mm512_mul_ps(numbers(given.minima), half(p + 2))};
}

// Lane i of v in eight lanes and lane j in the others; or lanes i .. i + 3, in four each.
inline __m512 two_lanes(__m512 v, int i, int j) {
  const __m512i order = _mm512_mask_set1_epi32(_mm512_set1_epi32(i), 0xff00, j);
  return _mm512_permutexvar_ps(order, v);
}
inline __m512 four_lanes(__m512 v, int i) {
  const __m512i order = _mm512_setr_epi32(0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3);
  return _mm512_permutexvar_ps(_mm512_add_epi32(order, _mm512_set1_epi32(i)), v);
}

// Q4_K and Q5_K: 32 bytes have the low halves of an eighth and the high ones of the next.
template <class Use> inline __m512 of_eighths(const Byte* p, const Part* x, __m512 sum, const Use& levels) {
  const Eighths e = eighths(p);
  sum = _mm512_mask3_fnmadd_ps(e.minima, _mm512_loadu_ps(x->sums), sum, 0xff);
  for (int i = 0; i < 2; ++i) {
    const Halves q = levels(i);
    sum = _mm512_fmadd_ps(raw(q.low, x + 2 * i), two_lanes(e.scales, 4 * i, 4 * i + 2), sum);
    sum = _mm512_fmadd_ps(raw(q.high, x + 2 * i + 1), two_lanes(e.scales, 4 * i + 1, 4 * i + 3), sum);
  }
  return sum;
}

struct BytesQ4_K {
  static constexpr Levels levels{Order::EIGHTHS, 0, false, 23, true};
  static constexpr int bytes = 144;
  static inline __m512 step(const Byte* p, const Part* x, __m512 sum) {
    return of_eighths(p, x, sum, [p](int i) { return halves_of(load_512(p + 16 + 64 * i)); });
  }
};
struct BytesQ5_K {
  static constexpr Levels levels{Order::EIGHTHS, 0, false, 23, true};
  static constexpr int bytes = 176;
  static inline __m512 step(const Byte* p, const Part* x, __m512 sum) {
    const __m512i fifths = _mm512_broadcast_i64x4(load_32(p + 16)), set = bytes_512(16);
    // Bit j of 32 bytes is that of eighth j: j in the lower half of a vector, j + 2 in the upper one.
    const auto there = [fifths](int j) {
      const __m512i bit = _mm512_inserti64x4(bytes_512(1 << j), _mm256_set1_epi8(static_cast<char>(4 << j)), 1);
      return _mm512_test_epi8_mask(fifths, bit);
    };
    return of_eighths(p, x, sum, [&](int i) {
      const Halves q = halves_of(load_512(p + 48 + 64 * i));
      return Halves{_mm512_mask_add_epi8(q.low, there(4 * i), q.low, set),
                    _mm512_mask_add_epi8(q.high, there(4 * i + 1), q.high, set)};
    });
  }
};
struct BytesQ6_K {
  static constexpr Levels levels{Order::PLAIN, 32, false, 23, false};
  static constexpr int bytes = 210;
  static inline __m512 step(const Byte* p, const Part* x, __m512 sum) {
    const __m512i given = _mm512_cvtepi8_epi32(load_16(p + 192));
    const __m512 d = _mm512_mul_ps(_mm512_cvtepi32_ps(given), half(p + 208));
    const __m512i top = bytes_512(0x30);
    for (int i = 0; i < 2; ++i) {
      const Halves q = halves_of(load_512(p + 64 * i));
      const __m512i bits = _mm512_broadcast_i64x4(load_32(p + 128 + 32 * i));
      const __m512i four = _mm512_slli_epi32(bits, 4), two = _mm512_slli_epi32(bits, 2);
      const __m512i low = _mm512_mask_mov_epi64(four, 0xf0, two);
      const __m512i high = _mm512_mask_srli_epi64(bits, 0xf0, bits, 2);
      sum = _mm512_fmadd_ps(shifted(_mm512_or_si512(q.low, _mm512_and_si512(low, top)), x + 2 * i),
                            four_lanes(d, 8 * i), sum);
      sum = _mm512_fmadd_ps(shifted(_mm512_or_si512(q.high, _mm512_and_si512(high, top)), x + 2 * i + 1),
                            four_lanes(d, 8 * i + 4), sum);
    }
    return sum;
  }
};

template <class S, int C> inline void rows_of_large_blocks(const PackedProduct& p, int64_t first) {
  const Part* x = reinterpret_cast<const Part*>(p.x);
  Beside<C> w(p, first);
  Totals<C> sum;
  for (int64_t left = p.op.n / 256; left > 0; --left, x += 4) {
    for (int c = 0; c < C; ++c) sum.of[c] = S::step(w.at(c), x, sum.of[c]);
    w.advance(S::bytes);
  }
  sum.store(p.out + first);
}

}  // namespace
