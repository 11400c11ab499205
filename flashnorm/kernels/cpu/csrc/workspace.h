// Working memory that each thread keeps between calls.
#pragma once
#include <stdint.h>

enum WorkspaceUse { SCRATCH, PACKED, SUMS, PIECES, WORKSPACE_USES };

// At least `floats` floats, 64-byte aligned; null where there is no memory. The next call of the same
// thread for the same use may give the same memory again.
float* flashnorm_workspace(WorkspaceUse use, int64_t floats);

namespace {
inline float* workspace(int64_t floats) { return flashnorm_workspace(SCRATCH, floats); }
}  // namespace
