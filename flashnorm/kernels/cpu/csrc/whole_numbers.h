// One row of x in whole numbers, for products of bytes (VNNI) in vectors of 64.
//
// x is taken as X · 2^-e, for each 32 features with an e of their own so that the largest |X| has as
// many bits as sums of products leave room for, and X as three bytes: X = 65536 a + 256 b + c. Sums of
// levels times a, b and c are exact, so that what is rounded is x alone, by 2^-23 of the largest of its
// 32 at most (levels of eight bits: 2^-22): float32's precision for a sum in which that one occurs. Rows
// of which a part is not finite or close to the ends of float32's range are multiplied in float32.
#pragma once
#include "one_row.h"

namespace {

constexpr int PIECES = 3;
constexpr int64_t SIDE = 64;        // bytes of a vector
constexpr int64_t STEP = 2 * SIDE;  // features that are arranged together

// 64 of x in the order of a format's levels; lane l has numbers 4 l .. 4 l + 3. Where low and high halves
// of bytes are added up, the first of two parts has the sums of both.
struct Part {
  signed char bytes[PIECES][SIDE];
  int32_t start[16];           // − zero · Σ X, for the format's own zero
  float units[16], sums[16];   // 2^-e; Σ x, or of blocks of 256 features eight sums of 32
};
static_assert(sizeof(Part) == (SIDE + SIDE / 2) * sizeof(float), "as arranged_floats says");

// How a format's levels lie.
enum class Order { PLAIN, HALVES, NEIGHBOURS, EIGHTHS };
struct Levels {
  Order order;
  int32_t zero;   // what is to be taken off
  bool together;  // whether a lane's sum is over two parts
  int bits;       // of |X|
  bool minima;    // whether `sums` are those of 32 features
};

inline __m512i load_512(const void* p) { return _mm512_loadu_si512(p); }

// Which 16 of 128 features the first and second 64 numbers are made of; of neighbours, halves of which
// are taken, with the 16 after them.
constexpr int sixteens_of[4][8] = {{0, 1, 2, 3, 4, 5, 6, 7},   // PLAIN
                                   {0, 2, 4, 6, 1, 3, 5, 7},   // HALVES
                                   {0, 2, 4, 6, 0, 2, 4, 6},   // NEIGHBOURS
                                   {0, 1, 4, 5, 2, 3, 6, 7}};  // EIGHTHS

// The largest |x| of 32; NaN where one is not finite.
inline float largest(const float* x) {
  const __m512 a = _mm512_loadu_ps(x), b = _mm512_loadu_ps(x + 16);
  const __m512 zero = _mm512_setzero_ps();
  const __m512 odd = _mm512_fmadd_ps(a, zero, _mm512_mul_ps(b, zero));
  const float none = _mm512_reduce_add_ps(odd);
  if (none != none) return none;
  return _mm512_reduce_max_ps(_mm512_max_ps(_mm512_abs_ps(a), _mm512_abs_ps(b)));
}

constexpr float LEAST = 1e-25f, MOST = 1e25f;  // of the largest of 32, where it is not zero

// 2^e so that the largest |X| has so many bits and is not so large that its highest byte is none.
inline bool scale_of(float top, int bits, float& scale, float& unit) {
  scale = unit = 0.0f;
  if (top == 0.0f) return true;
  if (!(top >= LEAST && top <= MOST)) return false;
  const uint32_t exponent = to_bits(top * 1.01f) >> 23, last = static_cast<uint32_t>(bits - 1);
  scale = from_bits((254 + last - exponent) << 23);
  unit = from_bits((exponent - last) << 23);
  return true;
}

// X of 128 features, and the unit of each 32.
inline bool round_off(const float* x, int bits, __m512i (&whole)[8], float (&units)[4]) {
  for (int i = 0; i < 4; ++i) {
    float scale;
    if (!scale_of(largest(x + 32 * i), bits, scale, units[i])) return false;
    for (int j = 2 * i; j < 2 * i + 2; ++j) {
      const __m512 scaled = _mm512_mul_ps(_mm512_loadu_ps(x + 16 * j), _mm512_set1_ps(scale));
      whole[j] = _mm512_cvtps_epi32(scaled);
    }
  }
  return true;
}

// Numbers 16 k .. 16 k + 15 of both parts.
inline __m512i in_order(Order order, const __m512i (&whole)[8], int k) {
  const int from = sixteens_of[static_cast<int>(order)][k];
  if (order != Order::NEIGHBOURS) return whole[from];
  const __m512i even = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
  const __m512i which = _mm512_add_epi32(even, _mm512_set1_epi32(k / 4));
  return _mm512_permutex2var_epi32(whole[from], which, whole[from + 1]);
}

// 64 numbers as bytes, and their sums by lanes.
inline __m512i take_apart(__m512i (&rest)[4], Part& to) {
  __m512i sums = _mm512_setzero_si512();
  for (int i = PIECES - 1; i >= 0; --i) {
    for (int k = 0; k < 4; ++k) {
      const __m512i byte = _mm512_srai_epi32(_mm512_slli_epi32(rest[k], 24), 24);
      rest[k] = _mm512_srai_epi32(_mm512_sub_epi32(rest[k], byte), 8);
      _mm_storeu_si128(reinterpret_cast<__m128i*>(to.bytes[i] + 16 * k), _mm512_cvtepi32_epi8(byte));
    }
    const __m512i ones = _mm512_set1_epi8(1), none = _mm512_setzero_si512();
    const __m512i four = _mm512_dpbusd_epi32(none, ones, load_512(to.bytes[i]));
    sums = _mm512_add_epi32(sums, _mm512_slli_epi32(four, static_cast<unsigned>(8 * (PIECES - 1 - i))));
  }
  return sums;
}

inline void finish_part(const Levels& f, __m512i sums, Part& to) {
  const __m512i start = _mm512_mullo_epi32(sums, _mm512_set1_epi32(-f.zero));
  _mm512_storeu_si512(to.start, start);
  _mm512_storeu_ps(to.sums, _mm512_mul_ps(_mm512_cvtepi32_ps(sums), _mm512_loadu_ps(to.units)));
}

inline void arrange_step(const Levels& f, const __m512i (&whole)[8], const float (&units)[4], Part* to) {
  __m512i sums[2];
  for (int part = 0; part < 2; ++part) {
    __m512i numbers[4];
    for (int k = 0; k < 4; ++k) {
      numbers[k] = in_order(f.order, whole, 4 * part + k);
      const int from = sixteens_of[static_cast<int>(f.order)][4 * part + k];
      _mm_storeu_ps(to[part].units + 4 * k, _mm_set1_ps(units[from / 2]));
    }
    sums[part] = take_apart(numbers, to[part]);
  }
  if (f.together) sums[0] = _mm512_add_epi32(sums[0], sums[1]);
  for (int part = 0; part < 2; ++part) finish_part(f, sums[part], to[part]);
}

// Eight sums of 32 features, in the first of four parts.
inline void add_up_eighths(const float* x, Part* to) {
  for (int i = 0; i < 8; ++i) {
    const __m512 both = _mm512_add_ps(_mm512_loadu_ps(x + 32 * i), _mm512_loadu_ps(x + 32 * i + 16));
    to->sums[i] = _mm512_reduce_add_ps(both);
  }
}

// x with zeros behind it, 128 by 128.
template <class S> inline bool arrange_whole(int64_t n, const float* x, Part* to) {
  constexpr Levels f = S::levels;
  alignas(64) float rest[STEP], units[4];
  __m512i whole[8];
  for (int64_t i = 0; i < n; i += STEP, to += 2) {
    const float* part = x + i;
    if (i + STEP > n) {
      for (int64_t j = 0; j < STEP; ++j) rest[j] = i + j < n ? part[j] : 0.0f;
      part = rest;
    }
    if (!round_off(part, f.bits, whole, units)) return false;
    arrange_step(f, whole, units, to);
    if (f.minima && i % CUT == STEP) add_up_eighths(x + i - STEP, to - 2);
  }
  return true;
}

}  // namespace
