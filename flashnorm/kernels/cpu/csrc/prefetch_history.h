// Which call comes after which: models make the same ones in the same order, token after token.
#pragma once
#include <stdint.h>

// Rows of bytes in memory: `rows` times `row_bytes`, `stride` apart. Or, where `column` is not 0, what
// lies across them: `rows` columns of so many bytes each, in rows that are `stride` apart.
struct Stream {
  const char* first = nullptr;
  int64_t rows = 0, row_bytes = 0, stride = 0, column = 0;

  // As much of its rows or columns begin..end as fits into `budget` bytes.
  Stream part(int64_t begin, int64_t end, int64_t budget) const {
    const int64_t fit = least(end - begin, budget / (row_bytes + 1));
    if (!column) return {first + begin * stride, fit, row_bytes, stride};
    const int64_t width = (end - begin) * column;
    return {first + begin * column, least(row_bytes / column, budget / (width + 1)), width, stride};
  }

 private:
  static int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
};

// What all parts of a call read: segments one after another, or side by side (gate and up), which
// are then equally long.
struct Reads {
  static constexpr int MOST = 8;
  int64_t segments = 0;
  bool together = false;
  Stream segment[MOST];

  int64_t rows() const {
    int64_t all = 0;
    for (int64_t i = 0; i < segments; ++i) all += segment[i].rows;
    return together ? segment[0].rows : all;
  }

  int64_t bytes() const {
    int64_t all = 0;
    for (int64_t i = 0; i < segments; ++i) all += segment[i].rows * segment[i].row_bytes;
    return all;
  }
};

// What one thread will read next. Nothing depends on it, and fetching it can do no harm: it may even
// name memory that is gone.
struct PrefetchList {
  static constexpr int MOST = 64;
  int count = 0;
  Stream streams[MOST];

  // Of rows begin..end of what a call reads, as much as fits into `budget` bytes, which it takes.
  void add(const Reads& reads, int64_t begin, int64_t end, int64_t& budget) {
    const int64_t share = reads.together ? budget / reads.segments : budget;
    int64_t used = 0, first = 0;
    for (int64_t i = 0; i < reads.segments && count < MOST; ++i) {
      const Stream& s = reads.segment[i];
      const int64_t from = begin > first ? begin - first : 0;
      const int64_t to = end - first < s.rows ? end - first : s.rows;
      if (to > from) {
        const Stream part = s.part(from, to, reads.together ? share : budget - used);
        if (part.rows > 0) {
          streams[count++] = part;
          used += part.rows * part.row_bytes;
        }
      }
      if (!reads.together) first += s.rows;
    }
    budget -= used;
  }
};

class PrefetchHistory {
 public:
  static constexpr int NONE = -1;

  // Remembers that this call came after the one before it. Returns the place of this call.
  int note(const Reads& reads) {
    const int place = place_of(reads.segment[0].first);
    Entry& entry = entries_[place];
    const bool known = entry.reads.segment[0].first == reads.segment[0].first;
    if (!known) entry.next = NONE;
    entry.reads = reads;
    if (last_ != NONE) entries_[last_].next = place;
    since_ = known ? bytes_ - entry.read : 0;
    entry.read = bytes_ += reads.bytes();
    return last_ = place;
  }

  // How many bytes other calls have read since one read the same as the call that was noted last; 0
  // where none did.
  int64_t since() const { return since_; }

  // What part `part` of `parts` will read in the calls after that one, `budget` bytes at most.
  void after(int place, int64_t part, int64_t parts, int64_t budget, PrefetchList& ahead) const {
    ahead.count = 0;
    for (int calls = 0; calls < CALLS; ++calls) {
      place = entries_[place].next;
      if (place == NONE || budget <= 0) return;
      const Reads& reads = entries_[place].reads;
      const int64_t rows = reads.rows();
      ahead.add(reads, rows * part / parts, rows * (part + 1) / parts, budget);
    }
  }

 private:
  static constexpr int BITS = 11, CALLS = 8;
  struct Entry {
    int next = NONE;
    int64_t read = 0;  // bytes of all calls up to this one
    Reads reads;
  };

  // By the address of the first weight; of two calls with the same place the later one has it.
  static int place_of(const void* key) {
    const uint64_t mixed = reinterpret_cast<uintptr_t>(key) * UINT64_C(0x9E3779B97F4A7C15);
    return static_cast<int>(mixed >> (64 - BITS));
  }

  Entry entries_[1 << BITS];
  int last_ = NONE;
  int64_t bytes_ = 0, since_ = 0;
};
