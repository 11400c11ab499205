// Threads of an OpenMP runtime that has LLVM's entry points alone: `test_windows.py` compiles and runs it.
//
//     kmpc [LIBRARY]
//
// With a runtime of its own, or with the one that is named.
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <atomic>
#include <thread>
#include <vector>

#include "guarded.h"
#ifndef _WIN32
#include <dlfcn.h>
#endif

using Task = void (*)(int32_t*, int32_t*, ...);
using Fork = void (*)(void*, int32_t, Task, ...);
using Push = void (*)(void*, int32_t, int32_t);
using Thread = int32_t (*)(void*);
using Number = int (*)();

extern "C" {
void flashnorm_use_kmpc(Fork, Push, Thread, Number, Number);
int32_t flashnorm_glu(const Glu*);
}

namespace {

constexpr int64_t ROWS = 61, WIDTH = 517;
constexpr int THREADS = 3;

// A runtime of a few lines: every fork starts threads, as many as were asked for just before.
int32_t asked = 1;
thread_local int number = 0, team = 1;
void push_threads(void*, int32_t, int32_t threads) { asked = threads; }
int32_t global_thread(void*) { return 0; }
void fork_call(void*, int32_t count, Task task, ...) {
  if (count != 2) abort();
  va_list given;
  va_start(given, task);
  void *first = va_arg(given, void*), *second = va_arg(given, void*);
  va_end(given);
  std::vector<std::thread> threads;
  for (int i = 0; i < asked; ++i)
    threads.emplace_back([=] {
      int32_t global = number = i, bound = 0;
      team = asked;
      task(&global, &bound, first, second);
    });
  for (std::thread& thread : threads) thread.join();
}

struct Runtime {
  Fork fork = fork_call;
  Push push = push_threads;
  Thread thread = global_thread;
  Number number = [] { return ::number; }, threads = [] { return team; };
};

void* symbol(void* library, const char* name) {
#ifdef _WIN32
  void* found = GetProcAddress(library, name);
#else
  void* found = dlsym(library, name);
#endif
  if (!found) fprintf(stderr, "no %s\n", name), exit(2);
  return found;
}

Runtime runtime_of(const char* path) {
#ifdef _WIN32
  void* library = LoadLibraryA(path);
#else
  void* library = dlopen(path, RTLD_NOW);
#endif
  if (!library) fprintf(stderr, "%s does not load\n", path), exit(2);
  Runtime found;
  found.fork = reinterpret_cast<Fork>(symbol(library, "__kmpc_fork_call"));
  found.push = reinterpret_cast<Push>(symbol(library, "__kmpc_push_num_threads"));
  found.thread = reinterpret_cast<Thread>(symbol(library, "__kmpc_global_thread_num"));
  found.number = reinterpret_cast<Number>(symbol(library, "omp_get_thread_num"));
  found.threads = reinterpret_cast<Number>(symbol(library, "omp_get_num_threads"));
  return found;
}

Runtime runtime;
std::atomic<int> seen[THREADS];
int noted() {
  const int found = runtime.number();
  ++seen[found];
  return found;
}

}  // namespace

int main(int count, char** given) {
  if (count > 1) runtime = runtime_of(given[1]);
  flashnorm_use_kmpc(runtime.fork, runtime.push, runtime.thread, noted, runtime.threads);
  std::mt19937 random(1);
  Numbers gate(FLOAT32, ROWS * WIDTH), up(FLOAT32, ROWS * WIDTH);
  Numbers alone(FLOAT32, ROWS * WIDTH), shared(FLOAT32, ROWS * WIDTH);
  gate.fill(random), up.fill(random);
  Glu glu{ACT_SILU, FLOAT32, gate.data, up.data, alone.data, nullptr, ROWS, WIDTH, WIDTH, WIDTH, WIDTH, 0, 1};
  if (flashnorm_glu(&glu) != OK) abort();
  for (const std::atomic<int>& calls : seen)
    if (calls) return fprintf(stderr, "one thread asks nobody\n"), 1;
  for (int round = 0; round < 20; ++round) {
    memset(shared.data, 0xff, ROWS * WIDTH * 4);
    glu.y = shared.data, glu.threads = THREADS;
    if (flashnorm_glu(&glu) != OK) abort();
    if (memcmp(alone.data, shared.data, ROWS * WIDTH * 4)) return fprintf(stderr, "other results\n"), 1;
  }
  for (int i = 0; i < THREADS; ++i)
    if (seen[i] != 20) return fprintf(stderr, "thread %d was called %d times\n", i, seen[i].load()), 1;
  printf("%d threads share every call\n", THREADS);
}
