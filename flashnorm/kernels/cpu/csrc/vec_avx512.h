// AVX-512 (F, BW, DQ, VL): sixteen floats.
#pragma once
#include <immintrin.h>
#include "half.h"

// Internal to each translation unit: every one is compiled for another instruction set.
namespace {

struct Vec {
  static constexpr int lanes = 16, max_rows = 4, columns = 12;
  __m512 v;

  static inline Vec set(float a) { return {_mm512_set1_ps(a)}; }
  static inline Vec load(const float* p) { return {_mm512_loadu_ps(p)}; }
  static inline Vec load(const Bf16* p) {
    const __m512i wide = _mm512_cvtepu16_epi32(bits(p));
    return {_mm512_castsi512_ps(_mm512_slli_epi32(wide, 16))};
  }
  static inline Vec load(const Fp16* p) { return {_mm512_cvtph_ps(bits(p))}; }

  inline void store(float* p) const { _mm512_storeu_ps(p, v); }
  inline void store(Bf16* p) const {
    const __m512i raw = _mm512_castps_si512(v), one = _mm512_set1_epi32(1);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(raw, 16), one);
    const __m512i up = _mm512_add_epi32(_mm512_add_epi32(raw, _mm512_set1_epi32(0x7fff)), odd);
    const __mmask16 nan = _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q);
    const __m512i rounded =
        _mm512_mask_mov_epi32(_mm512_srli_epi32(up, 16), nan, _mm512_set1_epi32(0x7fc0));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtepi32_epi16(rounded));
  }
  inline void store(Fp16* p) const {
    const __m256i half = _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), half);
  }

  friend inline Vec operator+(Vec a, Vec b) { return {_mm512_add_ps(a.v, b.v)}; }
  friend inline Vec operator-(Vec a, Vec b) { return {_mm512_sub_ps(a.v, b.v)}; }
  friend inline Vec operator*(Vec a, Vec b) { return {_mm512_mul_ps(a.v, b.v)}; }
  friend inline Vec fma(Vec a, Vec b, Vec c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
  inline float sum() const { return _mm512_reduce_add_ps(v); }
  static inline void sums(const Vec (&v)[4], float* out) {
    const __m256 low = _mm256_hadd_ps(half_sum(v[0]), half_sum(v[1]));
    const __m256 high = _mm256_hadd_ps(half_sum(v[2]), half_sum(v[3]));
    const __m256 s = _mm256_hadd_ps(low, high);
    _mm_storeu_ps(out, _mm_add_ps(_mm256_castps256_ps128(s), _mm256_extractf128_ps(s, 1)));
  }

 private:
  static inline __m256 half_sum(Vec a) {
    return _mm256_add_ps(_mm512_castps512_ps256(a.v), _mm512_extractf32x8_ps(a.v, 1));
  }
  static inline __m256i bits(const void* p) {
    return _mm256_loadu_si256(static_cast<const __m256i*>(p));
  }
};

}  // namespace
