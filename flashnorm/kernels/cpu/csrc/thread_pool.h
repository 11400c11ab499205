// Threads of the library's own, for calls with so few rows that reading weights is all they do.
//
// Between two calls they read ahead: the weights of the calls that followed this one the last time
// go into a core's caches while the caller does something else. Then they wait a while, ready, and sleep. A thread that has not begun when the work is done is not waited for.
#pragma once
#include "prefetch_history.h"

struct PoolJob {
  void (*part)(void* data, int64_t part, int64_t parts);
  void* data;
  int64_t parts;
  const Reads* reads;  // what the job reads, all parts together; or null
  // Set before the parts run, or null: whether none of it stays in the caches until it is read again,
  // so that it had better leave there what others have.
  bool* passing;
};

// Runs all parts, the first one on this thread. False, with nothing done, where the pool serves
// another thread, or there is none.
bool flashnorm_thread_pool_run(const PoolJob& job);

// OpenMP's threads have just had a call with more rows, and spin by now: the next one, which ends the
// pass over a prompt, say, is theirs as well.
void flashnorm_thread_pool_skip_next();

// OpenMP's threads spin on the pool's cores after each of torch's own loops, unless the runtime knows
// of more threads than cores: while the pool is awake, there are OpenMP threads more, which do nothing.
// `pause` gives them back. Without these two there is no pool.
using OmpParallel = void (*)(void (*)(void*), void*, unsigned threads, unsigned flags);
using OmpPause = int (*)(int kind);
void flashnorm_thread_pool_use(OmpParallel parallel, OmpPause pause);

// For tests and measurements: how many bytes each thread reads ahead, and after how many calls the
// slower threads are tried again (0: the pool takes all). Negative: what is used otherwise.
void flashnorm_thread_pool_tune(int64_t bytes_ahead, int64_t trials);
