// How attention is shared out between threads: by groups of heads, and by rows of k and v.
#pragma once
#include <atomic>
#include <new>

#include "api.h"
#include "workspace.h"

// Attention in pieces: `rows` rows of k and v of one group of heads each, `each` of them per group. They
// are taken in any order and joined in their own, so that no result depends on the threads.
struct Pieces {
  int64_t rows, each, count;  // count: of all groups
  int64_t floats;             // what a piece leaves for its heads: sums, largest score, total
  float* found;               // [count][floats], where `each` is more than one
  std::atomic<int32_t>* left;  // pieces of each group that are not done
  std::atomic<int64_t> next;
};

namespace {

constexpr int64_t PIECE_ROWS = 512;   // of k and v: enough for a stream, few enough to share out
constexpr int64_t MANY_GROUPS = 64;  // which are shared out whole

// Where rows are cut depends on the shape alone. Whether there was memory.
inline bool cut(const Attend& a, Pieces& p) {
  const int64_t groups = a.batch * a.kv_heads, heads = a.heads / a.kv_heads;
  p.rows = groups < MANY_GROUPS ? PIECE_ROWS : a.length;
  p.each = a.length > p.rows ? (a.length + p.rows - 1) / p.rows : 1;
  p.count = groups * p.each;
  p.floats = heads * (a.value_width + 2);
  p.found = nullptr;
  p.left = nullptr;
  p.next.store(0, std::memory_order_relaxed);
  if (p.each == 1) return true;
  p.found = flashnorm_workspace(PIECES, p.count * p.floats + groups);
  if (!p.found) return false;
  p.left = reinterpret_cast<std::atomic<int32_t>*>(p.found + p.count * p.floats);
  for (int64_t g = 0; g < groups; ++g)
    new (p.left + g) std::atomic<int32_t>(static_cast<int32_t>(p.each));
  return true;
}

}  // namespace
