// Which instruction set: what the build has, what the processor knows, and what was chosen.
#pragma once
#include <atomic>
#if defined(__x86_64__)
#include <cpuid.h>
#endif
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include "table.h"

#define DECLARE(isa) extern const Table flashnorm_##isa
DECLARE(portable);
DECLARE(avx2);
DECLARE(avx512);
DECLARE(neon);
void flashnorm_pairs(const Product& p);
const OneRow* flashnorm_bytes_of_row(const Op& op);
extern const PackedTable flashnorm_pair_panels, flashnorm_tiles;

namespace {

struct Choice {
  const char* name;
  const Table* table;
  void (*pairs)(const Product&);
  const PackedTable *pair_panels, *tiles;  // of bf16, or null
  OneRowOf bytes;                          // one row as bytes, or null
  bool (*supported)();
};

bool always() { return true; }
#if defined(__x86_64__) && defined(_WIN32)
// What __builtin_cpu_supports asks lies in a library of compilers that is not linked on Windows.
struct Processor {
  unsigned first = 0, ebx = 0, ecx = 0, more = 0, states = 0;  // of leaf 1, of leaf 7 in parts, of the system

  Processor() {
    unsigned a, b, c, d;
    if (!__get_cpuid(1, &a, &b, &first, &d) || !(first >> 27 & 1)) return;  // the system keeps no AVX
    asm volatile("xgetbv" : "=a"(states), "=d"(d) : "c"(0));
    if (!__get_cpuid_count(7, 0, &a, &ebx, &ecx, &d)) return;
    if (a) __get_cpuid_count(7, 1, &more, &b, &c, &d);
  }
  bool keeps(unsigned which) const { return (states & which) == which; }
};
const Processor& processor() {
  static const Processor found;
  return found;
}
bool has_avx2() {  // and FMA, AVX, F16C
  const Processor& p = processor();
  constexpr unsigned needed = 1u << 12 | 1u << 28 | 1u << 29;
  return p.keeps(0x6) && (p.first & needed) == needed && (p.ebx >> 5 & 1);
}
bool has_avx512() {  // F, DQ, BW, VL
  constexpr unsigned needed = 1u << 16 | 1u << 17 | 1u << 30 | 1u << 31;
  return has_avx2() && processor().keeps(0xe6) && (processor().ebx & needed) == needed;
}
bool has_avx512vnni() { return has_avx512() && (processor().ecx >> 11 & 1); }
bool has_avx512bf16() { return has_avx512vnni() && (processor().more >> 5 & 1); }
#elif defined(__x86_64__)
bool has_avx2() {
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
         __builtin_cpu_supports("f16c");
}
bool has_avx512() {
  return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}
bool has_avx512vnni() { return has_avx512() && __builtin_cpu_supports("avx512vnni"); }
bool has_avx512bf16() { return has_avx512vnni() && __builtin_cpu_supports("avx512bf16"); }

// The tiles' registers have to be asked for, once for the process.
bool has_amx() {
#if defined(__linux__)
  constexpr unsigned tile = 1u << 24, bf16 = 1u << 22;
  constexpr long ask = 0x1023, tile_data = 18;
  unsigned a, b, c, d;
  if (!has_avx512bf16() || !__get_cpuid_count(7, 0, &a, &b, &c, &d)) return false;
  return (d & tile) && (d & bf16) && !syscall(SYS_arch_prctl, ask, tile_data);
#else
  return false;
#endif
}
#endif

// Best first. The build defines FLASHNORM_HAS_* for what the compiler could make.
const Choice choices[] = {
#ifdef FLASHNORM_HAS_AMX
    {"amx", &flashnorm_avx512, flashnorm_pairs, &flashnorm_pair_panels, &flashnorm_tiles,
     flashnorm_bytes_of_row, has_amx},
#endif
#ifdef FLASHNORM_HAS_AVX512BF16
    {"avx512bf16", &flashnorm_avx512, flashnorm_pairs, &flashnorm_pair_panels, nullptr,
     flashnorm_bytes_of_row, has_avx512bf16},
#endif
#ifdef FLASHNORM_HAS_AVX512VNNI
    {"avx512vnni", &flashnorm_avx512, nullptr, nullptr, nullptr, flashnorm_bytes_of_row,
     has_avx512vnni},
#endif
#ifdef FLASHNORM_HAS_AVX512
    {"avx512", &flashnorm_avx512, nullptr, nullptr, nullptr, nullptr, has_avx512},
#endif
#ifdef FLASHNORM_HAS_AVX2
    {"avx2", &flashnorm_avx2, nullptr, nullptr, nullptr, nullptr, has_avx2},
#endif
#ifdef FLASHNORM_HAS_NEON
    {"neon", &flashnorm_neon, nullptr, nullptr, nullptr, nullptr, always},
#endif
    {"portable", &flashnorm_portable, nullptr, nullptr, nullptr, nullptr, always},
};
constexpr int count = sizeof choices / sizeof *choices;

int best() {
  for (int i = 0; i < count; ++i)
    if (choices[i].supported()) return i;
  return count - 1;
}

std::atomic<int> chosen{-1};

const Choice& choice() {
  int i = chosen.load(std::memory_order_relaxed);
  if (i < 0) chosen.store(i = best(), std::memory_order_relaxed);
  return choices[i];
}

// One row waits for memory alone, and gets the most of it with shorter vectors: on a Zen 4 AVX2 code
// reads at 0.90 of the bandwidth in bf16, AVX-512 code, whose lines are asked for in bursts, at 0.75.
const Table* one_row_table(const Choice& use) {
#if defined(FLASHNORM_HAS_AVX512) && defined(FLASHNORM_HAS_AVX2)
  if (use.table == &flashnorm_avx512) return &flashnorm_avx2;
#endif
  return use.table;
}

}  // namespace
