// Threads of an OpenMP runtime that has LLVM's entry points alone, which is Intel's on Windows.
#pragma once
#include <stdint.h>

// The one that starts them is given a function, which gets the numbers of its thread and all arguments.
struct KmpcPlace {
  int32_t reserved = 0, flags = 2, more = 0, length = 0;  // 2: the arguments come as they are given
  const char* name = ";flashnorm;flashnorm;0;0;;";
};
using KmpcTask = void (*)(int32_t* thread, int32_t* of_team, ...);
struct Kmpc {
  void (*fork)(KmpcPlace*, int32_t count, KmpcTask, ...);
  void (*push_threads)(KmpcPlace*, int32_t thread, int32_t threads);
  int32_t (*thread)(KmpcPlace*);
};

namespace {

Kmpc kmpc{};

void kmpc_task(int32_t*, int32_t*, void (*work)(void*), void* data) { work(data); }

// What GOMP_parallel does.
void kmpc_parallel(void (*work)(void*), void* data, unsigned threads, unsigned) {
  KmpcPlace place;
  kmpc.push_threads(&place, kmpc.thread(&place), static_cast<int32_t>(threads));
  kmpc.fork(&place, 2, reinterpret_cast<KmpcTask>(kmpc_task), work, data);
}

}  // namespace
