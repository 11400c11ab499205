// Rows of x, normalized but for a scale that may wait: row_out = f(x), to be multiplied by `scale`.
// Statistics of ordinary rows are in float32; rows whose squares would leave its range are done
// again in float64, so that no magnitude is special.
#pragma once
#include "api.h"
#include "elementary.h"
#include "table.h"

namespace {

constexpr int64_t PAD = 32;  // rows are padded with zeros to a multiple of this

inline int64_t padded(int64_t n) { return (n + PAD - 1) / PAD * PAD; }

inline float number(const void* p, int32_t type, int64_t i) {
  if (type == FLOAT32) return static_cast<const float*>(p)[i];
  if (type == BFLOAT16) return widen(static_cast<const Bf16*>(p)[i]);
  return widen(static_cast<const Fp16*>(p)[i]);
}

template <class T> inline void copy_dense(const T* x, int64_t n, float* out) {
  int64_t i = 0;
  for (; i + Vec::lanes <= n; i += Vec::lanes) Vec::load(x + i).store(out + i);
  for (; i < n; ++i) out[i] = widen(x[i]);
}

// The same, padded.
template <class T> inline void copy_row(const T* x, int64_t n, float* out) {
  copy_dense(x, n, out);
  for (int64_t i = n; i < padded(n); ++i) out[i] = 0.0f;
}

// [n] of any dtype as float32, padded.
inline void copy_numbers(const void* x, int32_t type, int64_t n, float* out) {
  if (type == FLOAT32) copy_row(static_cast<const float*>(x), n, out);
  else if (type == BFLOAT16) copy_row(static_cast<const Bf16*>(x), n, out);
  else copy_row(static_cast<const Fp16*>(x), n, out);
}

struct Sums { float sum, squares; };

// Over a padded row: zeros add nothing.
inline Sums sums(const float* x, int64_t n) {
  Vec a = Vec::set(0), b = a, c = a, d = a;
  for (int64_t i = 0; i < n; i += 2 * Vec::lanes) {
    const Vec p = Vec::load(x + i), q = Vec::load(x + i + Vec::lanes);
    a = a + p; b = b + q;
    c = fma(p, p, c); d = fma(q, q, d);
  }
  return {(a + b).sum(), (c + d).sum()};
}

// x −= by over n entries; the padding behind them becomes zero again.
inline void subtract(float* x, int64_t n, float by) {
  const Vec shift = Vec::set(by);
  for (int64_t i = 0; i < n; i += Vec::lanes) (Vec::load(x + i) - shift).store(x + i);
  for (int64_t i = n; i < padded(n); ++i) x[i] = 0.0f;
}

constexpr float LARGE = 1e36f, SMALL = 1e-20f;  // mean squares between them keep float32's precision
inline bool ordinary(float mean_square) { return mean_square < LARGE && mean_square > SMALL; }

// What a row still has to be multiplied by, and whether it has been normalized in float64 instead.
struct Scale { float factor; bool wide; };

// The same in float64, scale included.
inline Scale normalize_wide(const Op& op, float* x) {
  const double n = static_cast<double>(op.n);
  double mean = 0, squares = 0;
  if (op.norm == NORM_LAYER) {
    for (int64_t i = 0; i < op.n; ++i) mean += x[i];
    mean /= n;
  }
  for (int64_t i = 0; i < op.n; ++i) squares += (x[i] - mean) * (x[i] - mean);
  const double scale = 1.0 / sqrt(squares / n + op.eps);
  for (int64_t i = 0; i < op.n; ++i) x[i] = static_cast<float>((x[i] - mean) * scale);
  return {1.0f, true};
}

// Leaves an ordinary x as it is.
inline Scale rms_scale(const Op& op, float* x) {
  const float mean_square = sums(x, op.n).squares / static_cast<float>(op.n);
  if (!ordinary(mean_square)) return normalize_wide(op, x);
  return {static_cast<float>(1.0 / sqrt(mean_square + op.eps)), false};
}

// Leaves x − μ. A mean far larger than the deviation leaves an error in x − μ of the size of its own
// rounding: a second mean, of what is left, takes it out.
template <class T> inline Scale layer_scale(const Op& op, const T* raw, float* x) {
  const float n = static_cast<float>(op.n);
  subtract(x, op.n, sums(x, op.n).sum / n);
  subtract(x, op.n, sums(x, op.n).sum / n);
  const float variance = sums(x, op.n).squares / n;
  if (ordinary(variance)) return {static_cast<float>(1.0 / sqrt(variance + op.eps)), false};
  copy_row(raw, op.n, x);
  return normalize_wide(op, x);
}

inline void apply_tanh(const Op& op, float* x) {
  const float alpha = op.alpha ? number(op.alpha, op.alpha_type, 0) : 1.0f;
  for (int64_t i = 0; i < op.n; ++i) x[i] = tanh_(alpha * x[i]);
}

// offset + gain and shift as float32, padded; null where the operation has none.
struct Affine { const float *gain, *shift; };

// `space` holds two padded rows.
inline Affine affine(const Op& op, float* space) {
  const int64_t n = op.n, width = padded(n);
  if (op.gain) {
    copy_numbers(op.gain, op.gain_type, n, space);
    for (int64_t i = 0; i < n; ++i) space[i] += static_cast<float>(op.offset);
  }
  if (op.shift) copy_numbers(op.shift, op.shift_type, n, space + width);
  return {op.gain ? space : nullptr, op.shift ? space + width : nullptr};
}

// x = x · scale · gain + shift, as far as there are any. The padding stays zero.
inline void apply(const Affine& affine, int64_t n, float scale, float* x) {
  const Vec s = Vec::set(scale);
  for (int64_t i = 0; i < n; i += Vec::lanes) {
    Vec v = Vec::load(x + i);
    if (scale != 1.0f) v = v * s;
    if (affine.gain) v = v * Vec::load(affine.gain + i);
    if (affine.shift) v = v + Vec::load(affine.shift + i);
    v.store(x + i);
  }
}

// One row into `out` [padded n]. Only a shift cannot wait for the scale.
template <class T>
inline Scale prepare_row(const Op& op, const Affine& affine, const T* x, float* out) {
  copy_row(x, op.n, out);
  Scale scale{1.0f, false};
  if (op.norm == NORM_RMS) scale = rms_scale(op, out);
  else if (op.norm == NORM_LAYER) scale = layer_scale(op, x, out);
  else if (op.norm == NORM_DYT) apply_tanh(op, out);
  if (!affine.gain && !affine.shift) return scale;
  apply(affine, op.n, affine.shift ? scale.factor : 1.0f, out);
  if (affine.shift) scale.factor = 1.0f;
  return scale;
}

inline Scale prepare_row(const Op& op, const Affine& affine, const void* x, int64_t at, float* out) {
  if (op.x_type == FLOAT32) return prepare_row(op, affine, static_cast<const float*>(x) + at, out);
  if (op.x_type == BFLOAT16) return prepare_row(op, affine, static_cast<const Bf16*>(x) + at, out);
  return prepare_row(op, affine, static_cast<const Fp16*>(x) + at, out);
}

}  // namespace
