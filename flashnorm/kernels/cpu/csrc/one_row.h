// One row of x against packed rows of weights, where an instruction set has a way of its own: the row
// is arranged in the order in which the bits of a format come apart, once, and then read as it lies.
#pragma once
#include "packed_rows.h"

namespace {

// What an arranged row takes at most: whole cuts, a number for each four features, and some room.
inline int64_t arranged_floats(int64_t n) { return (n + CUT - 1) / CUT * (CUT + CUT / 4) + 64; }

#ifdef FLASHNORM_ONE_ROW
const OneRow* one_row(const Op& op);
#else
inline const OneRow* one_row(const Op&) { return nullptr; }
#endif

}  // namespace
