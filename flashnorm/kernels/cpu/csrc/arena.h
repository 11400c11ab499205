// Working memory that each thread keeps between calls.
#pragma once
#include <stdint.h>

enum ArenaUse { SCRATCH, PACKED, ARENA_USES };

// At least `floats` floats, 64-byte aligned; null where there is no memory. The next call of the same
// thread for the same use may give the same memory again.
float* flashnorm_arena(ArenaUse use, int64_t floats);

namespace {
inline float* arena(int64_t floats) { return flashnorm_arena(SCRATCH, floats); }
}  // namespace
