// Numbers of the three types for drivers in C++: decoded, rounded and placed without csrc's own code.
#pragma once
#include "api.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#ifdef _WIN32
// windows.h has names of api.h.
extern "C" {
__declspec(dllimport) void* VirtualAlloc(void*, size_t, unsigned long kind, unsigned long access);
__declspec(dllimport) int VirtualProtect(void*, size_t, unsigned long access, unsigned long* before);
__declspec(dllimport) int VirtualFree(void*, size_t, unsigned long kind);
__declspec(dllimport) void* LoadLibraryA(const char*);
__declspec(dllimport) void* GetProcAddress(void*, const char*);
}
#else
#include <sys/mman.h>
#include <unistd.h>
#endif

#include <random>

namespace {

struct Format { int exponent, mantissa, bytes; };
constexpr Format FORMATS[] = {{8, 23, 4}, {8, 7, 2}, {5, 10, 2}};  // by the numbers of api.h

inline double unit_roundoff(int32_t type) { return ldexp(1.0, -FORMATS[type].mantissa - 1); }
inline int bias_of(Format f) { return (1 << (f.exponent - 1)) - 1; }
inline double smallest_normal(int32_t type) { return ldexp(1.0, 1 - bias_of(FORMATS[type])); }
inline double largest(int32_t type) {
  return ldexp(2.0 - 2 * unit_roundoff(type), bias_of(FORMATS[type]));
}

inline double decode(int32_t type, uint32_t bits) {
  const Format f = FORMATS[type];
  const uint32_t mantissa = bits & ((1u << f.mantissa) - 1);
  const int exponent = static_cast<int>(bits >> f.mantissa) & ((1 << f.exponent) - 1);
  const double sign = bits >> (f.exponent + f.mantissa) & 1 ? -1.0 : 1.0;
  if (exponent == (1 << f.exponent) - 1) return mantissa ? NAN : sign * INFINITY;
  const int lowest = 1 - bias_of(f) - f.mantissa;
  if (!exponent) return sign * ldexp(mantissa, lowest);
  return sign * ldexp(mantissa + (1u << f.mantissa), lowest + exponent - 1);
}

// v to the nearest number of `type`, ties to even.
inline double rounded(int32_t type, double v) {
  if (!isfinite(v) || v == 0.0) return v;
  const int least = 1 - bias_of(FORMATS[type]);
  const int exponent = ilogb(v) < least ? least : ilogb(v);
  const double step = ldexp(1.0, exponent - FORMATS[type].mantissa);
  const double near = nearbyint(v / step) * step;
  return fabs(near) > largest(type) ? copysign(INFINITY, v) : near;
}

// Memory in pages, of which the last one may not be touched.
constexpr int64_t PAGE = 65536;  // a multiple of what systems have
#ifdef _WIN32
inline char* guarded(int64_t bytes) {
  constexpr unsigned long reserve_and_commit = 0x3000, read_and_write = 4, nothing = 1;
  char* memory = static_cast<char*>(VirtualAlloc(nullptr, bytes, reserve_and_commit, read_and_write));
  unsigned long before;
  if (!memory || !VirtualProtect(memory + bytes - PAGE, PAGE, nothing, &before)) abort();
  return memory;
}
inline void release(char* memory, int64_t) {
  constexpr unsigned long release = 0x8000;
  VirtualFree(memory, 0, release);
}
#else
inline char* guarded(int64_t bytes) {
  void* memory = mmap(nullptr, static_cast<size_t>(bytes), PROT_READ | PROT_WRITE,
                      MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (memory == MAP_FAILED || mprotect(static_cast<char*>(memory) + bytes - PAGE, PAGE, PROT_NONE))
    abort();
  return static_cast<char*>(memory);
}
inline void release(char* memory, int64_t bytes) { munmap(memory, static_cast<size_t>(bytes)); }
#endif

// `count` numbers that end where the page that may not be touched begins.
class Numbers {
 public:
  Numbers(int32_t type, int64_t count) : type(type), count(count) {
    const int64_t bytes = count * FORMATS[type].bytes;
    whole_ = (bytes + PAGE - 1) / PAGE * PAGE + PAGE;
    memory_ = guarded(whole_);
    data = memory_ + whole_ - PAGE - bytes;
    memset(data, 0xff, static_cast<size_t>(bytes));  // NaN in every type: what is not written is seen
  }
  ~Numbers() { release(memory_, whole_); }
  Numbers(const Numbers&) = delete;
  Numbers& operator=(const Numbers&) = delete;

  double operator[](int64_t i) const {
    uint32_t bits = 0;  // both machines that are asked for put the low byte first
    memcpy(&bits, data + i * FORMATS[type].bytes, static_cast<size_t>(FORMATS[type].bytes));
    return decode(type, bits);
  }
  void put(int64_t i, uint32_t bits) {
    memcpy(data + i * FORMATS[type].bytes, &bits, static_cast<size_t>(FORMATS[type].bytes));
  }

  // Numbers of 2^low up to 2^(high + 1), of either sign.
  Numbers& fill(std::mt19937& random, int low = -3, int high = 0) {
    const Format f = FORMATS[type];
    for (int64_t i = 0; i < count; ++i) {
      const uint32_t sign = random() & 1, mantissa = random() & ((1u << f.mantissa) - 1);
      const uint32_t power = random() % static_cast<uint32_t>(high - low + 1);
      const uint32_t exponent = static_cast<uint32_t>(bias_of(f) + low) + power;
      put(i, sign << (f.exponent + f.mantissa) | exponent << f.mantissa | mantissa);
    }
    return *this;
  }

  const int32_t type;
  const int64_t count;
  char* data;

 private:
  char* memory_;
  int64_t whole_;
};

}  // namespace
