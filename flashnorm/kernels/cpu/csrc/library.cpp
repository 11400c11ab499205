// The C interface: which threads, and the operations.
#include <atomic>
#include <stdlib.h>
#ifdef _WIN32
#include <malloc.h>
#endif

#include "formats.h"
#include "instruction_sets.h"
#include "openmp.h"
#include "pieces.h"
#include "thread_pool.h"
#include "workspace.h"

namespace {

// The OpenMP runtime that torch runs on, so that both share one set of threads.
using Number = int (*)();
OmpParallel omp_parallel = nullptr;
Number omp_thread = nullptr, omp_threads = nullptr;

struct Job {
  const Choice& use;
  const void *op, *call;
  int32_t (*part)(const Job&, int64_t part, int64_t parts);
  std::atomic<int32_t> status;
  WorkQueue* queue;
  bool passing = false;  // weights leave the caches before they are read again
};

void work(void* data, int64_t part, int64_t parts) {
  Job& job = *static_cast<Job*>(data);
  const int32_t status = job.part(job, part, parts);
  if (status != OK) job.status.store(status, std::memory_order_relaxed);
}

// Calls with so many rows or fewer run on threads of our own, which read ahead for the next one. More
// rows come with loops of torch's own that are shared between OpenMP's threads: two sets of threads
// would get in each other's way.
std::atomic<int64_t> thread_pool_rows{1};
std::atomic<int64_t> thread_pool_calls{0};

int32_t parallel(Job& job, int64_t threads, int64_t rows, const Reads* reads = nullptr) {
  if (threads <= 1 || !omp_parallel) return job.part(job, 0, 1);
  const bool few = rows <= thread_pool_rows.load(std::memory_order_relaxed);
  if (!few) flashnorm_thread_pool_skip_next();
  if (few && flashnorm_thread_pool_run({work, &job, threads, reads, &job.passing}))
    thread_pool_calls.fetch_add(1, std::memory_order_relaxed);
  else
    omp_parallel([](void* data) { work(data, omp_thread(), omp_threads()); }, &job,
                 static_cast<unsigned>(threads), 0);
  return job.status.load(std::memory_order_relaxed);
}

// Starting a thread costs about as much as reading this much.
constexpr int64_t BYTES_PER_THREAD = 64 * 1024;

// A piece of a thread's columns: some microseconds of reading.
constexpr int64_t BYTES_PER_PIECE = 64 * 1024;

int64_t all_rows(const Op& op) {
  int64_t rows = 0;
  for (int64_t i = 0; i < op.segments; ++i) rows += op.segment[i].rows;
  return rows;
}

Reads reads_of(const Op& op) {
  Reads reads;
  if (has_columns(op.weight_type)) return reads;
  reads.segments = smaller(op.segments, Reads::MOST);
  reads.together = op.act != ACT_NONE;
  const int64_t bytes = row_bytes(op), size = size_of(op.weight_type);
  for (int64_t i = 0; i < reads.segments; ++i) {
    const Segment& s = op.segment[i];
    reads.segment[i] = {static_cast<const char*>(s.weight), s.rows, bytes, s.stride * size};
    if (turned(op)) reads.segment[i].stride = s.step * size, reads.segment[i].column = size;
  }
  return reads;
}

int64_t columns_of(const Op& op) { return op.act ? op.segment[0].rows : all_rows(op); }

// Output columns in pieces that are multiples of `least`; `whole` gives each thread one piece.
WorkQueue queue_of(const Op& op, int64_t least, bool whole, int64_t threads) {
  const int64_t total = columns_of(op);
  const int64_t bytes = row_bytes(op) * (op.act ? 2 : 1) * least;
  const int64_t pieces = whole ? (total + threads - 1) / threads / least + 1
                               : (BYTES_PER_PIECE + bytes - 1) / bytes;
  return {total, pieces * least, threads};
}

// Of weights held as [in, out], a row's pieces are some KB, and each thread has as many.
constexpr int64_t ROW_BYTES_PER_PIECE = 2048;

WorkQueue turned_queue(const Op& op, int64_t threads) {
  constexpr int64_t least = 32, most = 4096;  // columns; bytes of a row, as in turned.h
  const int64_t total = op.act ? op.segment[0].rows : all_rows(op), size = size_of(op.weight_type);
  const int64_t each = total * size / threads, pieces = 1 + each / ROW_BYTES_PER_PIECE;
  const int64_t unit = (total / (threads * pieces) / least + 1) * least;
  return {total, smaller(unit, most / size), threads};
}

// How far ahead of reading, at least.
std::atomic<int64_t> prefetch_bytes{4096};
std::atomic<int64_t> tile_prefetch{512};  // the same for each of the rows that tiles read

int32_t run_job(const Job& job, int64_t part, int64_t) {
  const Op& op = *static_cast<const Op*>(job.op);
  const bool one = static_cast<const Call*>(job.call)->rows == 1 || has_columns(op.weight_type);
  const Table* table = one ? one_row_table(job.use) : job.use.table;
  // More work lies between the reads of packed weights, and a core gets less far by itself.
  const int64_t ahead = prefetch_bytes.load(std::memory_order_relaxed) * (is_packed(op) ? 2 : 1);
  const Options options{ahead, table == job.use.table ? job.use.pairs : nullptr, job.passing,
                        job.use.bytes};
  return table->run(op, *static_cast<const Call*>(job.call), options, *job.queue, part);
}

int32_t normalize_job(const Job& job, int64_t part, int64_t parts) {
  return job.use.table->normalize(*static_cast<const Op*>(job.op), *static_cast<const Call*>(job.call),
                             part, parts);
}

int32_t glu_job(const Job& job, int64_t part, int64_t parts) {
  return job.use.table->glu(*static_cast<const Glu*>(job.call), part, parts);
}

// Rows that are worth packing into panels, by the dtype of weights and for many features; 0: as the
// table says.
std::atomic<int64_t> panel_rows[3][2];
constexpr int64_t WIDE = 1024;  // features; NARROW of crossovers.py

// What multiplies rows that are packed first; null where they are multiplied as they come.
const PackedTable* packed_table(const Choice& use, const Op& op, int64_t rows) {
  if (turned(op)) return nullptr;
  const bool pairs = op.x_type == BFLOAT16 && op.weight_type == BFLOAT16;
  if (pairs && use.tiles && op.n % 32 == 0) return rows >= use.tiles->least ? use.tiles : nullptr;
  const PackedTable* panels = pairs && use.pair_panels ? use.pair_panels : &use.table->panels;
  if (is_packed(op)) return rows >= panels->least ? panels : nullptr;
  const int64_t asked = panel_rows[op.weight_type][op.n >= WIDE].load(std::memory_order_relaxed);
  return rows >= (asked ? asked : panels->least) ? panels : nullptr;
}

constexpr int64_t FEW_ROWS = 32;  // each thread packs so many by itself: that takes less time

struct PackedWork {
  const PackedTable& table;
  const Op& op;
  const Call& call;
  Packed packed;
};

int32_t pack_job(const Job& job, int64_t part, int64_t parts) {
  const PackedWork& work = *static_cast<const PackedWork*>(job.call);
  return work.table.pack(work.op, work.call, work.packed, part, parts);
}

int32_t packed_job(const Job& job, int64_t part, int64_t) {
  const PackedWork& work = *static_cast<const PackedWork*>(job.call);
  Packed packed = work.packed;
  if (!packed.memory) {
    packed.memory = flashnorm_workspace(PACKED, work.table.bytes(work.op, packed.rows) / 4);
    if (!packed.memory) return NO_MEMORY;
    const int32_t status = work.table.pack(work.op, work.call, packed, 0, 1);
    if (status != OK) return status;
  }
  const int64_t ahead = tile_prefetch.load(std::memory_order_relaxed);
  return work.table.run(work.op, work.call, packed, ahead, *job.queue, part);
}

// Rows first..first + rows of a call.
int32_t run_block(const Choice& use, PackedWork& work, int64_t threads) {
  Packed& packed = work.packed;
  if (packed.rows > FEW_ROWS) {
    packed.memory = flashnorm_workspace(PACKED, work.table.bytes(work.op, packed.rows) / 4);
    if (!packed.memory) return NO_MEMORY;
    Job pack{use, nullptr, &work, pack_job, {OK}, nullptr};
    const int32_t status = parallel(pack, threads, work.call.rows);
    if (status != OK) return status;
  }
  WorkQueue queue = packed.rows > FEW_ROWS
                        ? WorkQueue(columns_of(work.op), work.table.columns, threads)
                        : queue_of(work.op, work.table.columns, false, threads);
  Job run{use, nullptr, &work, packed_job, {OK}, &queue};
  return parallel(run, threads, work.call.rows);
}

// In blocks of rows that are equally large.
int32_t run_packed(const Choice& use, const PackedTable& table, const Op& op, const Call& call,
                   int64_t threads) {
  const int64_t most = table.most(op), blocks = (call.rows + most - 1) / most;
  int32_t status = OK;
  for (int64_t b = 0; b < blocks && status == OK; ++b) {
    const int64_t first = call.rows * b / blocks, end = call.rows * (b + 1) / blocks;
    PackedWork work{table, op, call, {nullptr, first, end - first}};
    status = run_block(use, work, threads);
  }
  return status;
}

struct AttendWork {
  const Attend& attend;
  Pieces& pieces;
};

int32_t attend_job(const Job& job, int64_t, int64_t) {
  const int64_t ahead = prefetch_bytes.load(std::memory_order_relaxed);
  const AttendWork& work = *static_cast<const AttendWork*>(job.call);
  return job.use.table->attend(work.attend, work.pieces, ahead);
}

// A thread for each piece at most, where there is enough to read.
int64_t attend_threads(const Attend& a, const Pieces& p) {
  const int64_t size = a.type == FLOAT32 ? 4 : 2;
  const int64_t bytes = a.batch * a.kv_heads * a.length * (a.width + a.value_width) * size;
  return smaller(smaller(a.threads, p.count), 1 + bytes / BYTES_PER_THREAD);
}

constexpr int64_t MANY_ROWS = INT64_MAX;

struct Read { const char* data; int64_t bytes; };
float read_sink;  // keeps the reads from being removed

int32_t read_job(const Job& job, int64_t part, int64_t parts) {
  const Read& read = *static_cast<const Read*>(job.call);
  const int64_t ahead = prefetch_bytes.load(std::memory_order_relaxed);
  const float sum = job.use.table->read(read.data, read.bytes, ahead, part, parts);
  if (sum == 0.12345f) read_sink = sum;
  return OK;
}

#ifdef _WIN32
void* aligned(int64_t bytes) { return _aligned_malloc(static_cast<size_t>(bytes), 64); }
void aligned_free(void* memory) { _aligned_free(memory); }
#else
void* aligned(int64_t bytes) {
  void* memory;
  return posix_memalign(&memory, 64, static_cast<size_t>(bytes)) ? nullptr : memory;
}
void aligned_free(void* memory) { free(memory); }
#endif

#ifdef __SANITIZE_ADDRESS__
constexpr bool exact_workspace = true;  // so that what lies behind the memory asked for is watched
#else
constexpr bool exact_workspace = false;
#endif

struct Workspace {
  void* memory = nullptr;
  int64_t bytes = 0;
  ~Workspace() { aligned_free(memory); }
};

}  // namespace

float* flashnorm_workspace(WorkspaceUse use, int64_t floats) {
  thread_local Workspace workspaces[WORKSPACE_USES];
  Workspace& mine = workspaces[use];
  const int64_t bytes = floats * static_cast<int64_t>(sizeof(float));
  if (bytes > mine.bytes || exact_workspace) {
    aligned_free(mine.memory);
    mine.memory = aligned(bytes);
    mine.bytes = mine.memory ? bytes : 0;
  }
  return static_cast<float*>(mine.memory);
}

EXPORT int32_t flashnorm_abi() { return FLASHNORM_ABI; }

EXPORT void flashnorm_use_openmp(OmpParallel start, Number thread, Number threads, OmpPause pause) {
  flashnorm_thread_pool_use(start, pause);
  omp_parallel = start;
  omp_thread = thread;
  omp_threads = threads;
}

// The same of a runtime that has LLVM's entry points alone.
EXPORT void flashnorm_use_kmpc(decltype(Kmpc::fork) fork, decltype(Kmpc::push_threads) push_threads,
                               decltype(Kmpc::thread) kmpc_thread, Number thread, Number threads) {
  kmpc = {fork, push_threads, kmpc_thread};
  flashnorm_use_openmp(kmpc_parallel, thread, threads, nullptr);
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
EXPORT void flashnorm_set_panel_rows(int32_t dtype, int32_t wide, int64_t rows) {
  panel_rows[dtype][wide].store(rows);
}

const PackedTable* table_for(int32_t dtype, int64_t rows, int64_t n) {
  Op op{};
  op.x_type = op.weight_type = dtype;
  op.n = n;
  return packed_table(choice(), op, rows);
}

// Whether rows [rows, n] of a dtype are packed before they are multiplied by weights of that dtype.
EXPORT int32_t flashnorm_packs(int32_t dtype, int64_t rows, int64_t n) {
  return table_for(dtype, rows, n) != nullptr;
}

// Whether bf16 rows [rows, n] are multiplied as bf16, for which they are rounded after their norm.
EXPORT int32_t flashnorm_rounds_first(int64_t rows, int64_t n) {
  const PackedTable* table = table_for(BFLOAT16, rows, n);
  return table && table != &choice().table->panels;
}
EXPORT void flashnorm_set_tile_prefetch(int64_t bytes) { tile_prefetch.store(bytes); }

// Up to how many rows the pool is asked, and how (thread_pool.h).
EXPORT void flashnorm_tune_thread_pool(int64_t rows, int64_t bytes_ahead, int64_t trials) {
  thread_pool_rows.store(rows);
  flashnorm_thread_pool_tune(bytes_ahead, trials);
}
EXPORT int64_t flashnorm_thread_pool_calls() { return thread_pool_calls.load(); }

// Few rows are normalized before a second thread has begun.
int32_t normalize(const Op& op, const Call& call, void* z) {
  const Call alone{call.x, nullptr, nullptr, call.rows, call.x_stride, 0, call.threads, {{z, op.n}}};
  Job job{choice(), &op, &alone, normalize_job, {OK}, nullptr};
  const int64_t threads = smaller(call.threads, 1 + call.rows * op.n * 4 / BYTES_PER_THREAD);
  return parallel(job, threads, call.rows);
}

EXPORT int32_t flashnorm_run(const Op* op, const Call* call) {
  const Choice& use = choice();
  if (call->z) {
    const int32_t status = normalize(*op, *call, call->z);
    if (status != OK) return status;
  }
  const int64_t bytes = all_rows(*op) * row_bytes(*op);
  const int64_t threads = smaller(call->threads, 1 + bytes / BYTES_PER_THREAD);
  if (const PackedTable* table = packed_table(use, *op, call->rows))
    return run_packed(use, *table, *op, *call, threads);
  WorkQueue queue = turned(*op) ? turned_queue(*op, threads)
                                : queue_of(*op, COLUMNS, call->rows > MAX_ROWS, threads);
  const Reads reads = reads_of(*op);
  Job job{use, op, call, run_job, {OK}, &queue};
  return parallel(job, threads, call->rows, &reads);
}

EXPORT int32_t flashnorm_normalize(const Op* op, const Call* call) {
  return normalize(*op, *call, call->z);
}

EXPORT int32_t flashnorm_glu(const Glu* glu) {
  Job job{choice(), nullptr, glu, glu_job, {OK}, nullptr};
  return parallel(job, glu->threads, glu->rows);
}

EXPORT int32_t flashnorm_attend(const Attend* attend) {
  Pieces pieces;
  if (!cut(*attend, pieces)) return NO_MEMORY;
  const AttendWork work{*attend, pieces};
  Job job{choice(), nullptr, &work, attend_job, {OK}, nullptr};
  return parallel(job, attend_threads(*attend, pieces), attend->batch);
}

EXPORT int32_t flashnorm_read(const char* data, int64_t bytes, int64_t threads) {
  const Read read{data, bytes};
  Job job{choice(), nullptr, &read, read_job, {OK}, nullptr};
  return parallel(job, threads, MANY_ROWS);
}
