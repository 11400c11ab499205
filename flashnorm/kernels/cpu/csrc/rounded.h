// Rows of x as bf16, for what multiplies bf16 only. What is not exact as it came (a gain, a bias, a
// mean) is rounded once, as it is in a model that computes its norm by itself.
#pragma once
#include "run.h"

namespace {

// A power of two that brings a row away from the ends of the range, where products would be lost.
inline float toward_one(const float* x, int64_t n) {
  float most = 0;
  for (int64_t i = 0; i < n; ++i) most = fabsf(x[i]) > most ? fabsf(x[i]) : most;
  if (most == 0 || !(most < INFINITY)) return 1.0f;
  return most > 0x1p60f ? 0x1p-100f : most < 0x1p-60f ? 0x1p100f : 1.0f;
}

// Row m as bf16 into `out` [n]; returns what its products have to be multiplied by.
inline float rounded_row(const Op& op, const Affine& gains, const Call& call, int64_t m,
                         float* space, Bf16* out) {
  const int64_t at = m * call.x_stride;
  const Scale scale = prepare_row(op, gains, call.x, at, space);
  const bool touched = gains.gain || gains.shift || scale.wide || op.norm == NORM_LAYER ||
                       op.norm == NORM_DYT;
  const bool plain = op.norm == NORM_NONE;
  if (!touched && (!plain || ordinary(sums(space, op.n).squares / static_cast<float>(op.n)))) {
    const Bf16* x = static_cast<const Bf16*>(call.x) + at;
    memcpy(static_cast<void*>(out), x, static_cast<size_t>(op.n) * sizeof(Bf16));
    return scale.factor;
  }
  if (touched) scale_bias(space, scale.factor, nullptr, op.n);
  const float factor = plain || scale.wide ? toward_one(space, op.n) : 1.0f;
  scale_bias(space, factor, nullptr, op.n);
  store_row(space, out, static_cast<const Bf16*>(nullptr), op.n);
  return 1.0f / factor;
}

}  // namespace
