// Working memory that each thread keeps between calls.
#pragma once
#include <stdint.h>

// At least `floats` floats, 64-byte aligned; null where there is no memory. The next call of the same
// thread may give the same memory again.
float* flashnorm_arena(int64_t floats);

namespace {
inline float* arena(int64_t floats) { return flashnorm_arena(floats); }
}  // namespace
