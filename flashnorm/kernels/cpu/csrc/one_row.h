// One row of x against packed rows of weights, where an instruction set has a way of its own: the row
// is arranged in the order in which the bits of a format come apart, once, and then read as it lies.
#pragma once
#include "packed_rows.h"

namespace {

// What an arranged row takes at most: whole cuts, a number for each two features, and some room.
inline int64_t arranged_floats(int64_t n) { return (n + CUT - 1) / CUT * (CUT + CUT / 2) + 64; }

// Where the weights lie that are read `ahead` bytes later than row `c` of a product.
inline const char* later(const PackedProduct& p, int64_t c) {
  const char* first = static_cast<const char*>(p.s.weight) + (p.at + c) * p.s.stride;
  const int64_t left = (p.count - c) * p.s.stride - p.ahead;
  return left > 0 || !p.next ? first + p.ahead : static_cast<const char*>(p.next) - left;
}

inline void fetch(const char* p, int64_t bytes) {
  for (int64_t b = 0; b < bytes; b += LINE) prefetch(p + b);
}

// The scales and minima of eight times 32 features, six bits each in 12 bytes, as a byte each.
struct SixBits { uint64_t scales, minima; };
inline SixBits six_bits_of_eight(const Byte* p) {
  uint32_t a, b, c;
  memcpy(&a, p, 4), memcpy(&b, p + 4, 4), memcpy(&c, p + 8, 4);
  constexpr uint32_t six = 0x3f3f3f3f, four = 0x0f0f0f0f, two = 0x03030303;
  return {(a & six) | static_cast<uint64_t>((c & four) | (a >> 6 & two) << 4) << 32,
          (b & six) | static_cast<uint64_t>((c >> 4 & four) | (b >> 6 & two) << 4) << 32};
}

#ifdef FLASHNORM_ONE_ROW
const OneRow* one_row(const Op& op);
#else
inline const OneRow* one_row(const Op&) { return nullptr; }
#endif

}  // namespace
