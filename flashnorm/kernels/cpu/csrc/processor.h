// What depends on the processor beside its instruction set.
#pragma once
#include <stdint.h>
#if !defined(_WIN32)
#include <unistd.h>
#endif

inline void relax() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

inline bool is_amd() {
#if defined(__x86_64__) && !defined(_WIN32)
  static const bool amd = (__builtin_cpu_init(), __builtin_cpu_is("amd"));
  return amd;
#else
  return false;
#endif
}

// Bytes of a core's second cache, and of the last one that it shares with a few others: where there
// are several of those, systems tell their sum.
inline int64_t second_cache() {
#ifdef _SC_LEVEL2_CACHE_SIZE
  static const int64_t bytes = sysconf(_SC_LEVEL2_CACHE_SIZE);
  if (bytes > 0) return bytes;
#endif
  return 1 << 20;
}
inline int64_t last_cache() {
  constexpr int64_t most = 32 << 20;
#ifdef _SC_LEVEL3_CACHE_SIZE
  static const int64_t bytes = sysconf(_SC_LEVEL3_CACHE_SIZE);
  if (bytes > 0 && bytes < most) return bytes;
#endif
  return most;
}
