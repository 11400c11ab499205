// NEON of every aarch64: four floats.
#pragma once
#include <arm_neon.h>
#include "half.h"

// Internal to each translation unit: every one is compiled for another instruction set.
namespace {

struct Vec {
  static constexpr int lanes = 4, max_rows = 4, columns = 12;
  float32x4_t v;

  static inline Vec set(float a) { return {vdupq_n_f32(a)}; }
  static inline Vec load(const float* p) { return {vld1q_f32(p)}; }
  static inline Vec load(const Bf16* p) {
    return {vreinterpretq_f32_u32(vshll_n_u16(vld1_u16(&p->bits), 16))};
  }
  static inline Vec load(const Fp16* p) {
    return {vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(&p->bits)))};
  }

  inline void store(float* p) const { vst1q_f32(p, v); }
  inline void store(Bf16* p) const {
    const uint32x4_t raw = vreinterpretq_u32_f32(v);
    const uint32x4_t odd = vandq_u32(vshrq_n_u32(raw, 16), vdupq_n_u32(1));
    const uint32x4_t up = vaddq_u32(vaddq_u32(raw, vdupq_n_u32(0x7fff)), odd);
    const uint32x4_t same = vceqq_f32(v, v);  // false for NaN
    vst1_u16(&p->bits, vshrn_n_u32(vbslq_u32(same, up, vdupq_n_u32(0x7fc00000)), 16));
  }
  inline void store(Fp16* p) const { vst1_u16(&p->bits, vreinterpret_u16_f16(vcvt_f16_f32(v))); }

  friend inline Vec operator+(Vec a, Vec b) { return {vaddq_f32(a.v, b.v)}; }
  friend inline Vec operator-(Vec a, Vec b) { return {vsubq_f32(a.v, b.v)}; }
  friend inline Vec operator*(Vec a, Vec b) { return {vmulq_f32(a.v, b.v)}; }
  friend inline Vec fma(Vec a, Vec b, Vec c) { return {vfmaq_f32(c.v, a.v, b.v)}; }
  inline float sum() const { return vaddvq_f32(v); }
  static inline void sums(const Vec (&v)[4], float* out) {
    vst1q_f32(out, vpaddq_f32(vpaddq_f32(v[0].v, v[1].v), vpaddq_f32(v[2].v, v[3].v)));
  }
};

}  // namespace
