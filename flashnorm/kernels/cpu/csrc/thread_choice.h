// Which threads take the calls of few rows: the pool's, which read ahead, or OpenMP's. Beside torch's
// own loops, whose threads spin, or another program, the pool's have to wait for a core; beside a
// caller that computes alone between two calls, OpenMP's fall asleep. That cannot be told from the
// calls, so it is measured: some calls with each in turns, then those that took less time per byte,
// and after a while again.
#pragma once
#include <stdint.h>
#include <time.h>
#include <algorithm>

inline int64_t now_ns() {
  timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return static_cast<int64_t>(t.tv_sec) * 1000000000 + t.tv_nsec;
}

class ThreadChoice {
 public:
  // Whether the pool takes the call that begins now and reads so many bytes; `longest`: how many calls
  // may pass until both are measured again, if the answer stays the same (negative: LONGEST).
  bool pool(int64_t bytes, int64_t now, int64_t longest) {
    const int64_t period = now - began_;
    began_ = now;
    if (keep_ > 0) return --keep_, kept_;
    if (call_ > SKIPPED) note(period);
    reads_ = bytes + CALL_BYTES;
    if (++call_ <= SKIPPED + CALLS) return tried();
    cost_[block_ % 2][block_ / 2] = bytes_ ? static_cast<double>(ns_) / bytes_ : 0;
    call_ = ns_ = bytes_ = 0;
    if (++block_ == 2 * PAIRS) settle(longest < 0 ? LONGEST : longest);
    return keep_ > 0 ? kept_ : tried();
  }

 private:
  // Calls of a block: those that are not counted, because both kinds of threads need a while to wake
  // and to sleep, and those that are. Blocks of both kinds in turns.
  static constexpr int SKIPPED = 48, CALLS = 144, PAIRS = 5;
  static constexpr int64_t SHORTEST = 4096, LONGEST = 65536;  // calls that the faster threads take
  static constexpr int64_t CALL_BYTES = 64 * 1024;            // what a call takes beside reading
  static constexpr int64_t PAUSE = 8;  // times as long as others: the caller did something else

  // The pool in even blocks, if it is what was kept, and in odd ones otherwise.
  bool tried() const { return kept_ == (block_ % 2 == 0); }

  // The time from one call to the next, unless it is a pause; what is a pause grows with them, because
  // the next model may be a larger one.
  void note(int64_t period) {
    if (typical_ && period > PAUSE * typical_) {
      typical_ += typical_ / 16 + 1;
      return;
    }
    typical_ = typical_ ? typical_ + (period - typical_) / 16 : period;
    ns_ += period;
    bytes_ += reads_;
  }

  void settle(int64_t longest) {
    block_ = 0;
    for (auto& costs : cost_) std::sort(costs, costs + PAIRS);
    const bool other = cost_[1][1] < 0.98 * cost_[0][1];  // the best but one: noise only adds
    length_ = other ? SHORTEST : std::min(2 * length_, LONGEST);
    if (other) kept_ = !kept_;
    keep_ = std::min(length_, longest);
  }

  bool kept_ = true;
  int call_ = 0, block_ = 0;
  int64_t keep_ = 0, length_ = SHORTEST / 2, began_ = 0, reads_ = 0, typical_ = 0, ns_ = 0, bytes_ = 0;
  double cost_[2][PAIRS] = {};
};
