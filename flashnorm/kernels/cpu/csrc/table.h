// What the parts of the library say to each other.
#pragma once
#include "api.h"
#include "pieces.h"
#include "work_queue.h"

constexpr int COLUMNS = 4;    // rows of weights that a tile reads side by side
constexpr int CHUNK = 64;     // output columns between two epilogues
constexpr int MAX_ROWS = 16;  // rows of x at most
constexpr int64_t LINE = 64;  // bytes that come from memory at a time

// out[m][c] = Σ_i x[m][i] weight[c][i], m < rows, c < count <= CHUNK; rows of out are CHUNK apart.
struct Product {
  const void *weight, *x;
  int64_t stride, x_stride, n;
  int64_t ahead;  // bytes at least between reading and prefetching
  int64_t rows, count;
  float* out;
  const void* next;  // the weights that are read after these, or null
  bool passing;      // weights go by all caches but the nearest
};

// out[m][c] = Σ_i x[m][i] W[at + c][i] of a packed weight, rows of out CHUNK apart.
struct PackedProduct {
  const Op& op;
  const Segment& s;
  int64_t at, count;  // which rows of weights
  const float* x;     // [rows][x_stride], or as `OneRow::arrange` left it
  int64_t x_stride, rows;
  float* out;
  int64_t ahead;     // bytes at least between reading and prefetching
  const void* next;  // the weights that are read after these, or null
};

// A way for one row of x, which is arranged first; where it cannot be, the next way takes it. Without
// `arrange` x is read as it is, and there may be several rows.
struct OneRow {
  bool (*arrange)(const Op&, const float* x, float* to);
  void (*products)(const PackedProduct&);
};
using OneRowOf = const OneRow* (*)(const Op&);

struct Options {
  int64_t ahead;                 // bytes at least between reading and prefetching
  void (*pairs)(const Product&);  // products of raw bf16 rows, or null
  bool passing;                  // weights leave the caches before they are read again
  OneRowOf bytes;                // a way for one row that takes x apart into bytes, or null
};

// Rows first..first + rows of x, normalized and transposed for tiles, in `TileTable::bytes` bytes.
struct Packed {
  void* memory;
  int64_t first, rows;
};

// Products of several rows that are packed first: pack, then run on what all parts packed.
struct PackedTable {
  int32_t (*pack)(const Op&, const Call&, const Packed&, int64_t part, int64_t parts);
  int32_t (*run)(const Op&, const Call&, const Packed&, int64_t ahead, WorkQueue&, int64_t part);
  int64_t (*bytes)(const Op&, int64_t rows);
  int64_t (*most)(const Op&);  // rows that are packed at once
  int64_t columns;             // of a block of output; pieces of work are multiples of it
  int64_t least;               // rows that are worth packing
};

// The entry points of one instruction set; `panels` takes everything that `run` takes.
struct Table {
  int32_t (*run)(const Op&, const Call&, const Options&, WorkQueue&, int64_t part);
  int32_t (*normalize)(const Op&, const Call&, int64_t part, int64_t parts);
  int32_t (*glu)(const Glu&, int64_t part, int64_t parts);
  float (*read)(const char*, int64_t bytes, int64_t ahead, int64_t part, int64_t parts);
  int32_t (*attend)(const Attend&, Pieces&, int64_t ahead);
  PackedTable panels;
};

namespace {
inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
}  // namespace
