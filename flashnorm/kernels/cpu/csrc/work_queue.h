// Who computes which output columns: each thread has a block of its own, from whose front it takes
// piece after piece, so that it reads one stream; who is done takes from the back of the others'.
// Threads do not run equally fast: they start late, share a core, or are far from the memory.
#pragma once
#include <atomic>
#include <stdint.h>

struct Range { int64_t begin, end; };

class WorkQueue {
 public:
  static constexpr int64_t MOST = 64;  // blocks; more threads than that take from those of others

  // Columns 0..total for `threads`, in pieces of `unit`.
  WorkQueue(int64_t total, int64_t unit, int64_t threads)
      : unit_(unit), blocks_(threads < MOST ? threads : MOST) {
    const int64_t units = (total + unit - 1) / unit;
    for (int64_t i = 0; i < blocks_; ++i)
      left_[i].store(pack(least(units * i / blocks_ * unit, total),
                          least(units * (i + 1) / blocks_ * unit, total)),
                     std::memory_order_relaxed);
  }

  // The next piece for thread `part`; false when nothing is left.
  bool take(int64_t part, Range& piece) {
    for (int64_t i = 0; i < blocks_; ++i)
      if (take_from((part + i) % blocks_, i != 0, piece)) return true;
    return false;
  }

 private:
  static int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
  static uint64_t pack(int64_t begin, int64_t end) {
    return static_cast<uint64_t>(begin) << 32 | static_cast<uint64_t>(end);
  }

  bool take_from(int64_t block, bool back, Range& piece) {
    uint64_t seen = left_[block].load(std::memory_order_relaxed);
    for (;;) {
      const int64_t begin = static_cast<int64_t>(seen >> 32);
      const int64_t end = static_cast<int64_t>(seen & 0xffffffffu);
      if (begin >= end) return false;
      // Only whole pieces from the back, so that every piece begins where it would have begun.
      const int64_t cut = back ? begin + (end - begin - 1) / unit_ * unit_ : least(begin + unit_, end);
      const uint64_t rest = back ? pack(begin, cut) : pack(cut, end);
      if (left_[block].compare_exchange_weak(seen, rest, std::memory_order_relaxed)) {
        piece = back ? Range{cut, end} : Range{begin, cut};
        return true;
      }
    }
  }

  int64_t unit_, blocks_;
  std::atomic<uint64_t> left_[MOST];  // what is left of each block: begin << 32 | end
};
