#include "thread_pool.h"

#ifdef _WIN32
// Its threads are POSIX's: there are none of our own here, and OpenMP's take every call.
bool flashnorm_thread_pool_run(const PoolJob&) { return false; }
void flashnorm_thread_pool_skip_next() {}
void flashnorm_thread_pool_use(OmpParallel, OmpPause) {}
void flashnorm_thread_pool_tune(int64_t, int64_t) {}
#else

#include <pthread.h>
#include <sched.h>
#include <time.h>
#include <atomic>
#include <new>

#include "processor.h"
#include "thread_choice.h"

namespace {

constexpr int64_t MOST_THREADS = 64;
constexpr int64_t AWAKE_US = 500;    // longer than what lies between two calls of a layer
constexpr int64_t STAY_US = 3000;    // longer than what lies between two tokens
constexpr int SPINS = 64;           // between two looks at the clock; others may run then

std::atomic<OmpParallel> omp_parallel{nullptr};
std::atomic<OmpPause> omp_pause{nullptr};
std::atomic<int64_t> bytes_ahead{-1}, trial_calls{-1};
std::atomic<bool> others_spin{false};
std::atomic<bool> forked{false};  // OpenMP's threads are gone then: a call that is left to them may hang

// Of what each thread reads ahead: ⅝ of its second cache; on a Zen 4, whose last cache takes what
// falls out of that and gives it back as fast, an eighth of that one.
int64_t prefetch_budget() {
  constexpr int64_t most = 4 << 20;
  const int64_t asked = bytes_ahead.load(std::memory_order_relaxed);
  if (asked >= 0) return asked;
  const int64_t near = second_cache() / 8 * 5, far = is_amd() ? last_cache() / 8 : 0;
  return far > most ? most : far > near ? far : near;
}

int64_t now_us() { return now_ns() / 1000; }

// A point in the time that conditions wait by.
timespec later(int64_t us) {
  timespec t;
  clock_gettime(CLOCK_REALTIME, &t);
  t.tv_nsec += us % 1000000 * 1000;
  t.tv_sec += us / 1000000 + t.tv_nsec / 1000000000;
  t.tv_nsec %= 1000000000;
  return t;
}

// Makes OpenMP see more threads than cores, by a thread with a team of its own: making one takes
// milliseconds where the cores are busy, so that nobody waits for it.
class Oversubscriber {
 public:
  void want(bool more, int64_t threads) {
    pthread_mutex_lock(&lock_);
    wanted_ = more;
    threads_ = threads;
    pthread_t thread;
    if (!started_ && more && !pthread_create(&thread, nullptr, live, this)) {
      pthread_detach(thread);
      started_ = true;
    }
    pthread_cond_signal(&changed_);
    pthread_mutex_unlock(&lock_);
  }

 private:
  static void* live(void* self) {
    constexpr int soft = 1;
    Oversubscriber& me = *static_cast<Oversubscriber*>(self);
    for (;;) {
      const int64_t threads = me.await(true);
      omp_parallel.load()([](void*) {}, nullptr, static_cast<unsigned>(threads), 0);
      me.await(false);
      omp_pause.load()(soft);
    }
  }

  int64_t await(bool wanted) {
    pthread_mutex_lock(&lock_);
    while (wanted_ != wanted) pthread_cond_wait(&changed_, &lock_);
    const int64_t threads = threads_;
    pthread_mutex_unlock(&lock_);
    return threads;
  }

  bool wanted_ = false, started_ = false;
  int64_t threads_ = 2;
  pthread_mutex_t lock_ = PTHREAD_MUTEX_INITIALIZER;
  pthread_cond_t changed_ = PTHREAD_COND_INITIALIZER;
};

// A job as the workers see it.
struct Task {
  const PoolJob& job;
  const PrefetchHistory& history;
  int place;  // in the history, or NONE
};

// One thread of the pool, and the task that it has been offered.
class alignas(128) Worker {
 public:
  // False where the system gives no more threads. One of the workers is given the oversubscriber.
  bool start(int64_t part, Oversubscriber* oversubscriber) {
    part_ = part;
    oversubscriber_ = oversubscriber;
    if (pthread_create(&thread_, nullptr, live, this)) return false;
#ifdef __linux__
    movable_ = !pthread_getaffinity_np(thread_, sizeof allowed_, &allowed_);
#endif
    pthread_detach(thread_);
    return true;
  }

  void offer(const Task& task) {
    done_.store(false, std::memory_order_relaxed);
    offered_.store(&task);
    if (!asleep_.load()) return;
    steer();
    pthread_mutex_lock(&lock_);
    pthread_cond_signal(&wake_);
    pthread_mutex_unlock(&lock_);
  }

  // Whether the offer could be taken back: the thread had not begun.
  bool withdraw() { return offered_.exchange(nullptr) != nullptr; }

  void wait_done() const {
    while (!done_.load(std::memory_order_acquire))
      for (int i = 0; i < SPINS && !done_.load(std::memory_order_relaxed); ++i) relax();
  }

 private:
  static void* live(void* self) {
    Worker& me = *static_cast<Worker*>(self);
    for (;;) {
      if (!me.await_call()) me.sleep();
      if (const Task* task = me.offered_.exchange(nullptr)) me.serve(*task);
    }
  }

  void serve(const Task& task) {
    const int64_t parts = task.job.parts;
    task.job.part(task.job.data, part_, parts);
    ahead_.count = 0;
    if (task.place != PrefetchHistory::NONE)
      task.history.after(task.place, part_, parts, prefetch_budget(), ahead_);
    parts_ = parts;
    done_.store(true, std::memory_order_release);  // the task is gone from here on
    fetch();
    if (++served_ == SEVERAL) oversubscribe(true);
  }

  // Where cores are virtual, Linux takes an idle one for a busy one and wakes a thread on the core of
  // whoever wakes it, behind that thread.
  void steer() {
#ifdef __linux__
    const int here = sched_getcpu();
    if (!movable_ || here < 0 || !CPU_ISSET(here, &allowed_) || CPU_COUNT(&allowed_) < 2) return;
    cpu_set_t others = allowed_;
    CPU_CLR(here, &others);
    pthread_setaffinity_np(thread_, sizeof others, &others);
#endif
  }

  bool called() const { return offered_.load(std::memory_order_relaxed) != nullptr; }

  void fetch() const {
    int64_t lines = 0;
    for (int i = 0; i < ahead_.count; ++i) {
      const Stream& s = ahead_.streams[i];
      for (int64_t row = 0; row < s.rows; ++row) {
        if (called()) return;
        const char* bytes = s.first + row * s.stride;
        for (int64_t at = 0; at < s.row_bytes; at += 64) {
          __builtin_prefetch(bytes + at, 0, 3);
          if (++lines % AT_ONCE == 0) relax();
        }
      }
    }
  }

  // Waits for an offer, ready; false when none came for a while. Other threads may have the core.
  bool await_call() {
    for (const int64_t end = now_us() + AWAKE_US; now_us() < end;) {
      for (int i = 0; i < SPINS; ++i) {
        if (called()) return true;
        relax();
      }
      sched_yield();
    }
    return called();
  }

  void sleep() {
    if (doze(STAY_US)) return;
    if (served_ >= SEVERAL) oversubscribe(false);
    served_ = 0;
    doze(FOREVER);
  }

  // Sleeps until there is an offer; false when none came in time.
  bool doze(int64_t us) {
    const timespec end = later(us == FOREVER ? 0 : us);
    int late = 0;
    pthread_mutex_lock(&lock_);
    asleep_.store(true);
    while (!offered_.load() && !late)
      late = us == FOREVER ? pthread_cond_wait(&wake_, &lock_)
                           : pthread_cond_timedwait(&wake_, &lock_, &end);
    asleep_.store(false);
    pthread_mutex_unlock(&lock_);
    return !late;
  }

  void oversubscribe(bool more) {
    if (oversubscriber_) oversubscriber_->want(more, parts_);
  }

  static constexpr int64_t FOREVER = -1;
  // Lines that are asked for between two pauses. A Zen 4 drops what it is asked for faster than memory
  // answers: of 4 MB without pauses a quarter came.
  static constexpr int64_t AT_ONCE = 16;
  // Not worth it for one call alone, such as the one that ends the pass over a prompt.
  static constexpr int64_t SEVERAL = 2;

  int64_t part_ = 0, parts_ = 2, served_ = 0;
  pthread_t thread_{};
#ifdef __linux__
  cpu_set_t allowed_;
  bool movable_ = false;
#endif
  Oversubscriber* oversubscriber_ = nullptr;
  PrefetchList ahead_;
  std::atomic<const Task*> offered_{nullptr};
  std::atomic<bool> done_{true}, asleep_{false};
  pthread_mutex_t lock_ = PTHREAD_MUTEX_INITIALIZER;
  pthread_cond_t wake_ = PTHREAD_COND_INITIALIZER;
};

class ThreadPool {
 public:
  bool run(const PoolJob& job) {
    if (job.parts > MOST_THREADS || busy_.exchange(true, std::memory_order_acquire)) return false;
    const int64_t trials = forked ? 0 : trial_calls.load(std::memory_order_relaxed);
    const int64_t bytes = job.reads ? job.reads->bytes() : 0;
    const bool wanted = !trials || choice_.pool(bytes, now_ns(), trials);
    const bool ours = wanted && grow(job.parts - 1);
    if (ours) share(job);
    busy_.store(false, std::memory_order_release);
    return ours;
  }

 private:
  bool grow(int64_t workers) {
    while (started_ < workers &&
           workers_[started_].start(started_ + 1, started_ ? nullptr : &oversubscriber_))
      ++started_;
    return started_ >= workers;
  }

  void share(const PoolJob& job) {
    const Task task{job, history_, job.reads ? history_.note(*job.reads) : PrefetchHistory::NONE};
    if (job.passing) *job.passing = is_amd() && history_.since() > last_cache();
    for (int64_t i = 1; i < job.parts; ++i) workers_[i - 1].offer(task);
    job.part(job.data, 0, job.parts);
    for (int64_t i = 1; i < job.parts; ++i) {
      if (workers_[i - 1].withdraw()) job.part(job.data, i, job.parts);
      else workers_[i - 1].wait_done();
    }
  }

  std::atomic<bool> busy_{false};
  int64_t started_ = 0;
  ThreadChoice choice_;
  Oversubscriber oversubscriber_;
  PrefetchHistory history_;
  Worker workers_[MOST_THREADS - 1];
};

// Never freed: its threads may outlive everything else. A forked process has none of them, and makes
// a pool of its own.
std::atomic<ThreadPool*> the_pool{nullptr};

ThreadPool* thread_pool() {
  static const int unwatched = pthread_atfork(nullptr, nullptr, [] {
    the_pool.store(nullptr);
    others_spin.store(false);
    forked.store(true);
  });
  if (unwatched || !omp_pause.load(std::memory_order_relaxed)) return nullptr;
  ThreadPool* found = the_pool.load(std::memory_order_acquire);
  if (found) return found;
  ThreadPool* made = new (std::nothrow) ThreadPool;
  if (!made || the_pool.compare_exchange_strong(found, made)) return made;
  delete made;
  return found;
}

}  // namespace

bool flashnorm_thread_pool_run(const PoolJob& job) {
  ThreadPool* mine = thread_pool();
  return mine && !others_spin.exchange(false, std::memory_order_relaxed) && mine->run(job);
}

void flashnorm_thread_pool_skip_next() { others_spin.store(true, std::memory_order_relaxed); }

void flashnorm_thread_pool_use(OmpParallel parallel, OmpPause pause) {
  omp_parallel.store(parallel);
  omp_pause.store(pause);
}

void flashnorm_thread_pool_tune(int64_t ahead, int64_t trials) {
  bytes_ahead.store(ahead);
  trial_calls.store(trials);
}
#endif
