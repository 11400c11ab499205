// The C interface: which instruction set, which threads, and the four operations.
#include <atomic>
#include <stdlib.h>

#include "arena.h"
#include "table.h"

#define EXPORT extern "C" __attribute__((visibility("default")))

#define DECLARE(isa) extern const Table flashnorm_##isa
DECLARE(portable);
DECLARE(avx2);
DECLARE(avx512);
DECLARE(neon);
void flashnorm_pairs(const Product& p);

namespace {

struct Choice {
  const char* name;
  const Table* table;
  void (*pairs)(const Product&);
  bool (*supported)();
};

bool always() { return true; }
#if defined(__x86_64__)
bool has_avx2() {
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
         __builtin_cpu_supports("f16c");
}
bool has_avx512() {
  return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}
bool has_avx512bf16() { return has_avx512() && __builtin_cpu_supports("avx512bf16"); }
#endif

// Best first. The build defines FLASHNORM_HAS_* for what the compiler could make.
const Choice choices[] = {
#ifdef FLASHNORM_HAS_AVX512BF16
    {"avx512bf16", &flashnorm_avx512, flashnorm_pairs, has_avx512bf16},
#endif
#ifdef FLASHNORM_HAS_AVX512
    {"avx512", &flashnorm_avx512, nullptr, has_avx512},
#endif
#ifdef FLASHNORM_HAS_AVX2
    {"avx2", &flashnorm_avx2, nullptr, has_avx2},
#endif
#ifdef FLASHNORM_HAS_NEON
    {"neon", &flashnorm_neon, nullptr, always},
#endif
    {"portable", &flashnorm_portable, nullptr, always},
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

// The OpenMP runtime that torch runs on, so that both share one set of threads.
using Parallel = void (*)(void (*)(void*), void*, unsigned threads, unsigned flags);
using Number = int (*)();
Parallel omp_parallel = nullptr;
Number omp_thread = nullptr, omp_threads = nullptr;

struct Job {
  const Choice& use;
  const void *op, *call;
  int32_t (*part)(const Job&, int64_t part, int64_t parts);
  std::atomic<int32_t> status;
};

void work(void* data) {
  Job& job = *static_cast<Job*>(data);
  const int32_t status = job.part(job, omp_thread(), omp_threads());
  if (status != OK) job.status.store(status, std::memory_order_relaxed);
}

int32_t parallel(Job& job, int64_t threads) {
  if (threads <= 1 || !omp_parallel) return job.part(job, 0, 1);
  omp_parallel(work, &job, static_cast<unsigned>(threads), 0);
  return job.status.load(std::memory_order_relaxed);
}

// Starting a thread costs about as much as reading this much.
constexpr int64_t BYTES_PER_THREAD = 64 * 1024;

int64_t weight_bytes(const Op& op) {
  int64_t rows = 0;
  for (int64_t i = 0; i < op.segments; ++i) rows += op.segment[i].rows;
  return rows * op.n * (op.weight_type == FLOAT32 ? 4 : 2);
}

// How far ahead of reading; the weight rows that are read side by side share the distance.
std::atomic<int64_t> prefetch_bytes{4096};

int32_t run_job(const Job& job, int64_t part, int64_t parts) {
  const How how{prefetch_bytes.load(std::memory_order_relaxed) / COLUMNS, job.use.pairs};
  return job.use.table->run(*static_cast<const Op*>(job.op), *static_cast<const Call*>(job.call),
                            how, part, parts);
}

int32_t normalize_job(const Job& job, int64_t part, int64_t parts) {
  return job.use.table->normalize(*static_cast<const Op*>(job.op), *static_cast<const Call*>(job.call),
                             part, parts);
}

int32_t glu_job(const Job& job, int64_t part, int64_t parts) {
  return job.use.table->glu(*static_cast<const Glu*>(job.call), part, parts);
}

struct Read { const char* data; int64_t bytes; };
float read_sink;  // keeps the reads from being removed

int32_t read_job(const Job& job, int64_t part, int64_t parts) {
  const Read& read = *static_cast<const Read*>(job.call);
  const int64_t ahead = prefetch_bytes.load(std::memory_order_relaxed);
  const float sum = job.use.table->read(read.data, read.bytes, ahead, part, parts);
  if (sum == 0.12345f) read_sink = sum;
  return OK;
}

struct Arena {
  void* memory = nullptr;
  int64_t bytes = 0;
  ~Arena() { free(memory); }
};

}  // namespace

float* flashnorm_arena(int64_t floats) {
  thread_local Arena mine;
  const int64_t bytes = floats * static_cast<int64_t>(sizeof(float));
  if (bytes > mine.bytes) {
    free(mine.memory);
    mine = {nullptr, 0};
    if (posix_memalign(&mine.memory, 64, static_cast<size_t>(bytes))) mine.memory = nullptr;
    else mine.bytes = bytes;
  }
  return static_cast<float*>(mine.memory);
}

EXPORT int32_t flashnorm_abi() { return FLASHNORM_ABI; }

EXPORT void flashnorm_use_openmp(Parallel start, Number thread, Number threads) {
  omp_parallel = start;
  omp_thread = thread;
  omp_threads = threads;
}

// The name of instruction set i, best first; null behind the last one.
EXPORT const char* flashnorm_isa(int32_t i) { return i < count ? choices[i].name : nullptr; }
EXPORT int32_t flashnorm_isa_supported(int32_t i) { return choices[i].supported(); }
EXPORT void flashnorm_choose_isa(int32_t i) { chosen.store(i, std::memory_order_relaxed); }
EXPORT int32_t flashnorm_chosen_isa() {
  choice();
  return chosen.load(std::memory_order_relaxed);
}

EXPORT void flashnorm_set_prefetch(int64_t bytes) { prefetch_bytes.store(bytes); }

EXPORT int32_t flashnorm_run(const Op* op, const Call* call) {
  Job job{choice(), op, call, run_job, {OK}};
  return parallel(job, smaller(call->threads, 1 + weight_bytes(*op) / BYTES_PER_THREAD));
}

EXPORT int32_t flashnorm_normalize(const Op* op, const Call* call) {
  Job job{choice(), op, call, normalize_job, {OK}};
  return parallel(job, call->threads);
}

EXPORT int32_t flashnorm_glu(const Glu* glu) {
  Job job{choice(), nullptr, glu, glu_job, {OK}};
  return parallel(job, glu->threads);
}

EXPORT int32_t flashnorm_read(const char* data, int64_t bytes, int64_t threads) {
  const Read read{data, bytes};
  Job job{choice(), nullptr, &read, read_job, {OK}};
  return parallel(job, threads);
}
