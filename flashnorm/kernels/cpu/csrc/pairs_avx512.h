// How raw bf16 rows meet bf16 weights, two products per lane. Products are exact in float32; each
// addition rounds once; subnormal numbers count as zero.
#pragma once
#include <immintrin.h>
#include <string.h>
#include "half.h"

namespace {

struct Pairs {
  using Weight = Bf16;
  using Input = Bf16;
  using Sum = __m512;
  static constexpr int lanes = 32, max_rows = 4;
  static inline __m512bh weights(const Bf16* p) { return bits(p); }
  static inline __m512bh inputs(const Bf16* p) { return bits(p); }
  static inline __m512 zero() { return _mm512_setzero_ps(); }
  static inline __m512 step(__m512bh w, __m512bh x, __m512 sum) {
    return _mm512_dpbf16_ps(sum, w, x);
  }
  static inline __m512 join(__m512 a, __m512 b) { return _mm512_add_ps(a, b); }
  static inline float total(__m512 sum) { return _mm512_reduce_add_ps(sum); }

 private:
  static inline __m512bh bits(const Bf16* p) {
    __m512bh v;
    memcpy(&v, p, sizeof v);
    return v;
  }
};

}  // namespace
