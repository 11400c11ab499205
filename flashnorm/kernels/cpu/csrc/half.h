// The two 16-bit formats in plain C++, rounding to nearest even. NaN stays NaN.
#pragma once
#include <stdint.h>
#include <string.h>

// Internal to each translation unit: every one is compiled for another instruction set.
namespace {

struct Bf16 { uint16_t bits; };
struct Fp16 { uint16_t bits; };

inline float from_bits(uint32_t bits) { float f; memcpy(&f, &bits, 4); return f; }
inline uint32_t to_bits(float f) { uint32_t bits; memcpy(&bits, &f, 4); return bits; }

inline float widen(float a) { return a; }
inline float widen(Bf16 a) { return from_bits(static_cast<uint32_t>(a.bits) << 16); }
inline float widen(Fp16 a) {
  const uint32_t sign = static_cast<uint32_t>(a.bits & 0x8000u) << 16, rest = a.bits & 0x7fffu;
  if (rest >= 0x7c00u) return from_bits(sign | 0x7f800000u | (rest & 0x3ffu) << 13);  // inf, NaN
  // The exponent is read 112 too small, subnormals included, and put right by an exact product.
  return from_bits(sign | to_bits(from_bits(rest << 13) * from_bits(0x77800000u)));  // 2^112
}

template <class T> inline T narrow(float a);
template <> inline float narrow<float>(float a) { return a; }
template <> inline Bf16 narrow<Bf16>(float a) {
  const uint32_t bits = to_bits(a);
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  return {static_cast<uint16_t>(a != a ? 0x7fc0u : rounded)};
}
template <> inline Fp16 narrow<Fp16>(float a) {
  const uint32_t bits = to_bits(a), sign = (bits >> 16) & 0x8000u, rest = bits & 0x7fffffffu;
  uint32_t half;
  if (rest > 0x7f800000u) half = 0x7e00u;
  else if (rest >= 0x477ff000u) half = 0x7c00u;  // 65520 and more round to infinity
  else if (rest < 0x38800000u)  // subnormal: the unit in the last place of 0.5 is that of fp16
    half = to_bits(from_bits(rest) + 0.5f) - 0x3f000000u;
  else half = (rest - 0x38000000u + 0xfffu + ((rest >> 13) & 1u)) >> 13;
  return {static_cast<uint16_t>(sign | half)};
}

}  // namespace
