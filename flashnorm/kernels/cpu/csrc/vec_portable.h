// Vectors in plain C++: what every machine runs, and the meaning of the others.
#pragma once
#include "half.h"

// Internal to each translation unit: every one is compiled for another instruction set.
namespace {

struct Vec {
  static constexpr int lanes = 8, columns = 4;
  static constexpr int max_rows = 2;  // rows of x whose sums fit the registers beside 4 columns
  float v[lanes];

#define EACH for (int i = 0; i < lanes; ++i)
  static inline Vec set(float a) { Vec r; EACH r.v[i] = a; return r; }
  template <class T> static inline Vec load(const T* p) { Vec r; EACH r.v[i] = widen(p[i]); return r; }
  template <class T> inline void store(T* p) const { EACH p[i] = narrow<T>(v[i]); }
  friend inline Vec operator+(Vec a, Vec b) { EACH a.v[i] += b.v[i]; return a; }
  friend inline Vec operator-(Vec a, Vec b) { EACH a.v[i] -= b.v[i]; return a; }
  friend inline Vec operator*(Vec a, Vec b) { EACH a.v[i] *= b.v[i]; return a; }
  friend inline Vec fma(Vec a, Vec b, Vec c) { EACH c.v[i] += a.v[i] * b.v[i]; return c; }
#undef EACH
  // out[i] = the sum over v[i]
  static inline void sums(const Vec (&v)[4], float* out) {
    for (int i = 0; i < 4; ++i) out[i] = v[i].sum();
  }
  inline float sum() const {
    return ((v[0] + v[4]) + (v[2] + v[6])) + ((v[1] + v[5]) + (v[3] + v[7]));
  }
};

}  // namespace
