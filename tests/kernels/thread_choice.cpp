// Which threads are chosen, by a clock that the test moves.
#include "thread_choice.h"

#include <cstdio>
#include <cstdlib>
#include <functional>

namespace {

constexpr int64_t BYTES = 1 << 20;
// One measurement, and the shortest and the longest time between two: more calls than these take.
constexpr int MEASURED = 2500, SHORT = 4096, LONG = 70000;

#define EXPECT(what)                                                  \
  do {                                                                \
    if (!(what)) {                                                    \
      fprintf(stderr, "%s:%d: not so: %s\n", __FILE__, __LINE__, #what); \
      exit(1);                                                        \
    }                                                                 \
  } while (0)

// A program whose calls take so many ns with the pool, and so many with OpenMP's threads.
struct Program {
  ThreadChoice choice;
  int64_t now = 1000000, calls = 0, pool = 0;
  int64_t longest = -1;

  // How many of so many calls the pool takes.
  int64_t run(int count, const std::function<int64_t(bool, int64_t)>& ns) {
    int64_t taken = 0;
    for (int i = 0; i < count; ++i, ++calls) {
      const bool with_pool = choice.pool(BYTES, now, longest);
      taken += with_pool;
      now += ns(with_pool, calls);
    }
    return taken;
  }
};

int64_t pool_is_faster(bool pool, int64_t) { return pool ? 80000 : 100000; }
int64_t pool_is_slower(bool pool, int64_t) { return pool ? 100000 : 80000; }

void the_faster_ones_are_kept() {
  Program first, second;
  first.run(MEASURED, pool_is_faster);
  EXPECT(first.run(1000, pool_is_faster) == 1000);
  second.run(MEASURED, pool_is_slower);
  EXPECT(second.run(1000, pool_is_slower) == 0);
}

void what_is_as_fast_but_for_noise_stays() {
  Program program;
  const auto same = [](bool pool, int64_t) { return pool ? 100000 : 99000; };
  program.run(MEASURED, same);
  EXPECT(program.run(1000, same) == 1000);
}

void a_program_that_changes_is_measured_again() {
  Program program;
  program.run(MEASURED, pool_is_slower);
  program.run(SHORT + MEASURED, pool_is_faster);
  EXPECT(program.run(1000, pool_is_faster) == 1000);
}

void measurements_get_rare() {
  Program program;
  program.run(20 * LONG, pool_is_faster);
  const int64_t others = 10 * LONG - program.run(10 * LONG, pool_is_faster);
  EXPECT(others > 0 && others < 10 * LONG / 50);
}

void pauses_and_bursts_do_not_decide() {
  Program paused, disturbed;
  // The caller waits for a second, always after a call of the pool.
  const auto pause = [](bool pool, int64_t call) {
    return pool_is_faster(pool, call) + (pool && call % 40 == 0 ? 1000000000 : 0);
  };
  paused.run(MEASURED, pause);
  EXPECT(paused.run(1000, pause) == 1000);
  // Another program takes a core during the first calls.
  const auto burst = [](bool pool, int64_t call) {
    return pool_is_faster(pool, call) * (call < 150 ? 5 : 1);
  };
  disturbed.run(MEASURED, burst);
  EXPECT(disturbed.run(1000, burst) == 1000);
}

void a_larger_model_is_measured_too() {
  Program program;
  program.run(MEASURED, pool_is_faster);
  const auto larger = [](bool pool, int64_t call) { return 500 * pool_is_slower(pool, call); };
  program.run(2 * SHORT + 3 * MEASURED, larger);
  EXPECT(program.run(1000, larger) == 0);
}

void trials_may_be_had_sooner() {
  Program program;
  program.longest = 10;
  const int64_t others = 20000 - program.run(20000, pool_is_faster);
  EXPECT(others > 8000 && others < 12000);
}

}  // namespace

int main() {
  the_faster_ones_are_kept();
  what_is_as_fast_but_for_noise_stays();
  a_program_that_changes_is_measured_again();
  measurements_get_rare();
  pauses_and_bursts_do_not_decide();
  a_larger_model_is_measured_too();
  trials_may_be_had_sooner();
}
