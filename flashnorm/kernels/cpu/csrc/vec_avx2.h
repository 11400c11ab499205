// AVX2, FMA and F16C: eight floats.
#pragma once
#include <immintrin.h>
#include "half.h"

// Internal to each translation unit: every one is compiled for another instruction set.
namespace {

struct Vec {
  static constexpr int lanes = 8, max_rows = 2, columns = 6;
  __m256 v;

  static inline Vec set(float a) { return {_mm256_set1_ps(a)}; }
  static inline Vec load(const float* p) { return {_mm256_loadu_ps(p)}; }
  static inline Vec load(const Bf16* p) {
    const __m256i wide = _mm256_cvtepu16_epi32(bits(p));
    return {_mm256_castsi256_ps(_mm256_slli_epi32(wide, 16))};
  }
  static inline Vec load(const Fp16* p) { return {_mm256_cvtph_ps(bits(p))}; }

  inline void store(float* p) const { _mm256_storeu_ps(p, v); }
  inline void store(Bf16* p) const {
    const __m256i raw = _mm256_castps_si256(v), one = _mm256_set1_epi32(1);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(raw, 16), one);
    const __m256i up = _mm256_add_epi32(_mm256_add_epi32(raw, _mm256_set1_epi32(0x7fff)), odd);
    const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(v, v, _CMP_UNORD_Q));
    const __m256i rounded =
        _mm256_blendv_epi8(_mm256_srli_epi32(up, 16), _mm256_set1_epi32(0x7fc0), nan);
    const __m128i low = _mm256_castsi256_si128(rounded), high = _mm256_extracti128_si256(rounded, 1);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm_packus_epi32(low, high));
  }
  inline void store(Fp16* p) const {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
  }

  friend inline Vec operator+(Vec a, Vec b) { return {_mm256_add_ps(a.v, b.v)}; }
  friend inline Vec operator-(Vec a, Vec b) { return {_mm256_sub_ps(a.v, b.v)}; }
  friend inline Vec operator*(Vec a, Vec b) { return {_mm256_mul_ps(a.v, b.v)}; }
  friend inline Vec fma(Vec a, Vec b, Vec c) { return {_mm256_fmadd_ps(a.v, b.v, c.v)}; }
  inline float sum() const {
    __m128 s = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    s = _mm_add_ps(s, _mm_movehl_ps(s, s));
    return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
  }
  static inline void sums(const Vec (&v)[4], float* out) {
    const __m256 low = _mm256_hadd_ps(v[0].v, v[1].v), high = _mm256_hadd_ps(v[2].v, v[3].v);
    const __m256 s = _mm256_hadd_ps(low, high);
    _mm_storeu_ps(out, _mm_add_ps(_mm256_castps256_ps128(s), _mm256_extractf128_ps(s, 1)));
  }

 private:
  static inline __m128i bits(const void* p) {
    return _mm_loadu_si128(static_cast<const __m128i*>(p));
  }
};

}  // namespace
