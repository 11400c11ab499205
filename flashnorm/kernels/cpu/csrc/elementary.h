// Elementary functions in single precision, without branches, so that loops over them vectorize.
// Errors against float64, over every exponent (tests/kernels/test_extremes.py holds them):
// a few units in the last place.
#pragma once
#include <math.h>
#include "half.h"

// Internal to each translation unit: every one is compiled for another instruction set.
namespace {

// 2^k · e^r with |r| <= ln(2)/2; the ends are far enough out to give infinity and zero.
inline float exp_(float x) {
  x = x > 89.0f ? 89.0f : x;
  x = x < -105.0f ? -105.0f : x;
  const float magic = 12582912.0f;  // 1.5 · 2^23: adding it rounds to an integer
  const float shifted = x * 1.44269504f + magic, k = shifted - magic;
  float r = x - k * 0.693359375f;
  r = r - k * -2.12194440e-4f;
  float p = 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  // 2^k in two factors, since k runs from −151 to 128.
  const int32_t whole = static_cast<int32_t>(to_bits(shifted) - to_bits(magic)), half = whole >> 1;
  const float low = from_bits(static_cast<uint32_t>(half + 127) << 23);
  const float high = from_bits(static_cast<uint32_t>(whole - half + 127) << 23);
  return p * low * high;
}

// x + x³ P(x²) near zero, 1 − 2 / (e^2x + 1) elsewhere.
inline float tanh_(float x) {
  const float a = fabsf(x), s = x * x;
  float p = 2.142961632e-03f;
  p = p * s - 8.177398009e-03f;
  p = p * s + 2.170070313e-02f;
  p = p * s - 5.394676305e-02f;
  p = p * s + 1.333320601e-01f;
  p = p * s - 3.333333080e-01f;
  const float near = x + x * (s * p);
  const float far = copysignf(1.0f - 2.0f / (exp_(2.0f * a) + 1.0f), x);
  return a < 0.625f ? near : (x != x ? x : far);
}

// After N. Juffa: x + x Q(x²) near zero, 1 − e^R(|x|) elsewhere.
inline float erf_(float x) {
  const float a = fabsf(x), s = x * x;
  float q = -5.96761703e-4f;
  q = q * s + 4.99119423e-3f;
  q = q * s - 2.67681349e-2f;
  q = q * s + 1.12819925e-1f;
  q = q * s - 3.76125336e-1f;
  q = q * s + 1.28379166e-1f;
  const float t = a > 4.0f ? 4.0f : a, t2 = t * t;
  float r = -1.72853470e-5f * t + 3.83197126e-4f;
  const float u = -3.88396438e-3f * t + 2.42546219e-2f;
  r = r * t2 + u;
  r = r * t - 1.06777877e-1f;
  r = r * t - 6.34846687e-1f;
  r = r * t - 1.28717512e-1f;
  r = r * t - t;
  const float far = copysignf(1.0f - exp_(r), x);
  return a > 0.927734375f ? far : x * q + x;
}

// 1 / (1 + e^−x), from e^−|x|, which cannot overflow.
inline float sigmoid_(float x) {
  const float e = exp_(-fabsf(x));
  return (x < 0.0f ? e : 1.0f) / (1.0f + e);
}

inline float silu_(float x) { return x * sigmoid_(x); }
inline float gelu_(float x) { return 0.5f * x * (1.0f + erf_(x * 0.707106781f)); }
// 0.5 (1 + tanh z) = 1 / (1 + e^−2z), which loses nothing where tanh z is near −1.
inline float gelu_tanh_(float x) {
  return x * sigmoid_(1.59576912f * x * (1.0f + 0.044715f * x * x));
}

}  // namespace
