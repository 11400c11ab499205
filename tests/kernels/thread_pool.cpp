// What the thread pool promises, in C++: `tests/kernels/test_thread_pool.py` compiles and runs it.
#include "thread_pool.h"

#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <time.h>

#include <atomic>

namespace {

#define CHECK(holds)                                                 \
  do {                                                               \
    if (holds) break;                                                \
    fprintf(stderr, "%s:%d: not so: %s\n", __FILE__, __LINE__, #holds); \
    abort();                                                         \
  } while (0)

// Segments of `rows` rows of 8 bytes each, 10 apart, from address `at` on.
Reads reads(int64_t at, int64_t segments, int64_t rows, bool together = false) {
  Reads made;
  made.segments = segments;
  made.together = together;
  for (int64_t i = 0; i < segments; ++i)
    made.segment[i] = {reinterpret_cast<const char*>(at + i * 1000), rows, 8, 10};
  return made;
}

int64_t place(const Stream& s) { return static_cast<int64_t>(reinterpret_cast<intptr_t>(s.first)); }

void each_part_reads_its_own_rows() {
  PrefetchList ahead;
  int64_t budget = 1000;
  ahead.add(reads(5000, 2, 10), 8, 16, budget);  // one after another: 8, 9 of one, 0..5 of the next
  CHECK(ahead.count == 2 && budget == 1000 - 8 * 8);
  CHECK(place(ahead.streams[0]) == 5080 && ahead.streams[0].rows == 2);
  CHECK(place(ahead.streams[1]) == 6000 && ahead.streams[1].rows == 6);
  ahead.add(reads(7000, 2, 10, true), 5, 10, budget);  // side by side
  CHECK(ahead.count == 4 && place(ahead.streams[3]) == 8050 && ahead.streams[3].rows == 5);
}

void no_more_is_read_than_there_is_room_for() {
  PrefetchList ahead;
  int64_t budget = 40;
  ahead.add(reads(5000, 2, 10), 0, 20, budget);
  int64_t rows = 0;
  for (int i = 0; i < ahead.count; ++i) rows += ahead.streams[i].rows;
  CHECK(rows * 8 <= 40 && rows > 0 && budget == 40 - rows * 8);
  PrefetchList pair;
  budget = 100;
  pair.add(reads(5000, 2, 10, true), 0, 10, budget);
  CHECK(pair.streams[0].rows == pair.streams[1].rows && budget >= 0 && budget < 100);
}

// 20 columns of 4 bytes in 12 rows, 90 bytes apart: a part takes its columns of as many rows as fit.
void columns_lie_across_the_rows() {
  Reads made = reads(5000, 1, 20);
  made.segment[0].row_bytes = 48, made.segment[0].stride = 90, made.segment[0].column = 4;
  PrefetchList ahead;
  int64_t budget = 1000;
  ahead.add(made, 5, 15, budget);
  CHECK(ahead.count == 1 && place(ahead.streams[0]) == 5020 && budget == 1000 - 12 * 40);
  CHECK(ahead.streams[0].rows == 12 && ahead.streams[0].row_bytes == 40);
  CHECK(ahead.streams[0].stride == 90 && ahead.streams[0].column == 0);
  PrefetchList less;
  budget = 100;
  less.add(made, 0, 10, budget);
  CHECK(less.streams[0].rows == 2 && budget == 20);
}

void what_followed_last_time_is_what_comes_next() {
  static PrefetchHistory history;
  PrefetchList ahead;
  const int first = history.note(reads(1 << 20, 1, 10));
  history.after(first, 0, 1, 1000, ahead);
  CHECK(ahead.count == 0);  // nothing has followed yet
  history.note(reads(2 << 20, 1, 10));
  history.note(reads(3 << 20, 1, 10));
  history.after(history.note(reads(1 << 20, 1, 10)), 1, 2, 1000, ahead);
  CHECK(ahead.count >= 2);
  CHECK(place(ahead.streams[0]) == (2 << 20) + 50 && place(ahead.streams[1]) == (3 << 20) + 50);
  history.note(reads(3 << 20, 1, 10));  // another order from now on
  history.after(first, 0, 1, 1000, ahead);
  CHECK(place(ahead.streams[0]) == 3 << 20);
}

void what_was_read_in_between_is_known() {
  static PrefetchHistory history;
  history.note(reads(1 << 20, 1, 10));
  CHECK(history.since() == 0);  // it is the first one
  history.note(reads(2 << 20, 2, 10));
  history.note(reads(3 << 20, 1, 7, true));
  CHECK(history.since() == 0);
  history.note(reads(1 << 20, 1, 10));
  CHECK(history.since() == 8 * (2 * 10 + 7));
  history.note(reads(1 << 20, 1, 10));
  CHECK(history.since() == 0);
}

struct Counts { std::atomic<int> of[8]; };

void count(void* data, int64_t part, int64_t) {
  static_cast<Counts*>(data)->of[part].fetch_add(1, std::memory_order_relaxed);
}

std::atomic<int> done_by_the_pool{0};

// Thousands of jobs, some with pauses in which the workers fall asleep.
void* caller(void*) {
  static char memory[4096];
  Reads read;
  read.segments = 1;
  read.segment[0] = {memory, 64, 64, 64};
  for (int i = 0; i < 3000; ++i) {
    Counts counts{};
    const int64_t parts = 2 + i % 7;
    if (flashnorm_thread_pool_run({count, &counts, parts, i % 3 ? &read : nullptr})) {
      for (int64_t part = 0; part < 8; ++part) CHECK(counts.of[part] == (part < parts));
      done_by_the_pool.fetch_add(1, std::memory_order_relaxed);
    } else {
      for (int64_t part = 0; part < 8; ++part) CHECK(counts.of[part] == 0);
    }
    const timespec nap{0, 7000000};
    if (i % 500 == 0) nanosleep(&nap, nullptr);
  }
  return nullptr;
}

void no_parallel(void (*)(void*), void*, unsigned, unsigned) {}
int no_pause(int) { return 0; }

void every_part_runs_once() {
  Counts counts{};
  CHECK(!flashnorm_thread_pool_run({count, &counts, 2, nullptr}));  // no pool before OpenMP is known
  flashnorm_thread_pool_use(no_parallel, no_pause);
  flashnorm_thread_pool_tune(4096, 0);
  pthread_t other;
  CHECK(!pthread_create(&other, nullptr, caller, nullptr));
  caller(nullptr);
  pthread_join(other, nullptr);
  CHECK(done_by_the_pool.load() > 1000);
}

// The first part waits for the second one, which therefore has to be another thread's.
void wait_for_the_other(void* data, int64_t part, int64_t) {
  std::atomic<bool>& seen = *static_cast<std::atomic<bool>*>(data);
  if (part == 1) seen.store(true);
  const timespec moment{0, 1000000};
  for (int i = 0; part == 0 && i < 5000 && !seen.load(); ++i) nanosleep(&moment, nullptr);
  if (part == 0) CHECK(seen.load());
}

void a_sleeping_member_is_woken() {
  for (int i = 0; i < 3; ++i) {
    const timespec longer{0, 50000000};
    nanosleep(&longer, nullptr);
    std::atomic<bool> seen{false};
    CHECK(flashnorm_thread_pool_run({wait_for_the_other, &seen, 2, nullptr}));
  }
}

void after_many_rows_one_call_is_left_to_others() {
  Counts counts{};
  flashnorm_thread_pool_skip_next();
  CHECK(!flashnorm_thread_pool_run({count, &counts, 2, nullptr}));
  CHECK(counts.of[0] == 0 && counts.of[1] == 0);
  CHECK(flashnorm_thread_pool_run({count, &counts, 2, nullptr}));
  CHECK(counts.of[0] == 1 && counts.of[1] == 1);
}

}  // namespace

int main() {
  each_part_reads_its_own_rows();
  no_more_is_read_than_there_is_room_for();
  columns_lie_across_the_rows();
  what_followed_last_time_is_what_comes_next();
  what_was_read_in_between_is_known();
  every_part_runs_once();
  a_sleeping_member_is_woken();
  after_many_rows_one_call_is_left_to_others();
  return 0;
}
