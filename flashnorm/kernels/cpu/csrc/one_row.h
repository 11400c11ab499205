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

#ifdef FLASHNORM_ONE_ROW
const OneRow* one_row(const Op& op);
#else
inline const OneRow* one_row(const Op&) { return nullptr; }
#endif

}  // namespace
