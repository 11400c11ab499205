// What happens to sums on their way out: scale, bias, activation, gate, residual, one rounding.
#pragma once
#include "prepare.h"

namespace {

inline float activate(int32_t act, float x) {
  switch (act) {
    case ACT_RELU: return x > 0.0f || x != x ? x : 0.0f;
    case ACT_SILU: return silu_(x);
    case ACT_GELU: return gelu_(x);
    case ACT_GELU_TANH: return gelu_tanh_(x);
    default: return x;
  }
}

// gate[c] = act(gate[c]) · up[c]; the loops vectorize because each knows its activation.
template <int32_t ACT> inline void glu_row(float* gate, const float* up, int64_t count) {
  for (int64_t c = 0; c < count; ++c) gate[c] = activate(ACT, gate[c]) * up[c];
}

inline void glu_row(int32_t act, float* gate, const float* up, int64_t count) {
  switch (act) {
    case ACT_RELU: return glu_row<ACT_RELU>(gate, up, count);
    case ACT_SILU: return glu_row<ACT_SILU>(gate, up, count);
    case ACT_GELU: return glu_row<ACT_GELU>(gate, up, count);
    case ACT_GELU_TANH: return glu_row<ACT_GELU_TANH>(gate, up, count);
    default: return glu_row<ACT_IDENTITY>(gate, up, count);
  }
}

// sums[c] = sums[c] · scale + bias[c]
inline void scale_bias(float* sums, float scale, const float* bias, int64_t count) {
  for (int64_t c = 0; c < count; ++c) sums[c] = sums[c] * scale + (bias ? bias[c] : 0.0f);
}

template <class T> inline void store_row(const float* v, T* y, const T* residual, int64_t count) {
  int64_t c = 0;
  for (; c + Vec::lanes <= count; c += Vec::lanes) {
    Vec value = Vec::load(v + c);
    if (residual) value = value + Vec::load(residual + c);
    value.store(y + c);
  }
  for (; c < count; ++c) y[c] = narrow<T>(v[c] + (residual ? widen(residual[c]) : 0.0f));
}

template <class T>
inline void store_typed(const float* v, void* y, int64_t at, const void* residual, int64_t from,
                        int64_t count) {
  const T* add = residual ? static_cast<const T*>(residual) + from : nullptr;
  store_row(v, static_cast<T*>(y) + at, add, count);
}

// y[at..] = v (+ residual[from..]) in `type`.
inline void store(int32_t type, const float* v, void* y, int64_t at, const void* residual,
                  int64_t from, int64_t count) {
  if (type == FLOAT32) store_typed<float>(v, y, at, residual, from, count);
  else if (type == BFLOAT16) store_typed<Bf16>(v, y, at, residual, from, count);
  else store_typed<Fp16>(v, y, at, residual, from, count);
}

}  // namespace
