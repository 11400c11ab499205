// One thread's share of y = act(s ⊙ (f(x) Wᵀ) + c) [+ residual]: a block of output columns.
#pragma once
#include "finish.h"
#include "one_row.h"
#include "packed_rows.h"
#include "skinny.h"
#include "table.h"
#include "turned.h"
#include "workspace.h"

namespace {

// Up to MAX_ROWS rows of x on their way, as the products read them.
struct Block {
  const Op& op;
  const Call& call;
  const Options& options;
  int64_t first, rows;        // which rows of x
  const float* x;             // [rows][padded n]
  const Bf16* pairs;          // the raw rows, where they are exact enough as they are; or null
  const OneRow* one;          // what multiplies this one row, which it has arranged; or null
  float scale[MAX_ROWS];      // what each row still has to be multiplied by
  float* sums;                // of a band of turned weights, or of two; or null
};

inline const char* offset(const void* p, int32_t type, int64_t elements) {
  return static_cast<const char*>(p) + elements * size_of(type);
}

// Row `at` of the weights of a segment, or null behind them.
inline const void* weights_at(const Op& op, const Segment& s, int64_t at) {
  return at < s.rows ? offset(s.weight, op.weight_type, at * s.stride) : nullptr;
}

inline void multiply_packed(const Block& b, const Segment& s, int64_t at, int64_t count, float* out,
                            const void* next) {
  const PackedProduct p{b.op, s, at, count, b.x, padded(b.op.n), b.rows, out, b.options.ahead, next};
  if (b.one) b.one->products(p);
  else packed_products(p);
}

inline void multiply(const Block& b, const Segment& s, int64_t at, int64_t count, float* out,
                     const void* next) {
  const int32_t type = b.op.weight_type;
  if (is_packed(type)) return multiply_packed(b, s, at, count, out, next);
  const int64_t n = b.op.n;
  const void* x = b.pairs ? static_cast<const void*>(b.pairs) : b.x;
  const void* weight = weights_at(b.op, s, at);
  const Product p{weight, x, s.stride, padded(n), n, b.options.ahead, b.rows, count, out, next,
                  b.options.passing};
  if (b.pairs) b.options.pairs(p);
  else if (type == FLOAT32) products<Plain<float>>(p);
  else if (type == BFLOAT16) products<Plain<Bf16>>(p);
  else products<Plain<Fp16>>(p);
}

// `count` columns of one segment, scaled and with their bias: out[rows][CHUNK]. `next` is read then.
inline void linear_chunk(const Block& b, const Segment& s, int64_t at, int64_t count, float* out,
                         const void* next) {
  multiply(b, s, at, count, out, next);
  float bias[CHUNK];
  if (s.bias)
    for (int64_t c = 0; c < count; ++c) bias[c] = number(s.bias, b.op.bias_type, at + c);
  for (int64_t m = 0; m < b.rows; ++m)
    scale_bias(out + m * CHUNK, b.scale[m], s.bias ? bias : nullptr, count);
}

inline void store_chunk(const Block& b, const Output& out, const float* v, int64_t at,
                        int64_t count) {
  for (int64_t m = 0; m < b.rows; ++m) {
    const int64_t row = b.first + m;
    store(b.op.x_type, v + m * CHUNK, out.y, row * out.stride + at, b.call.residual,
          row * b.call.residual_stride + at, count);
  }
}

inline void run_linear(const Block& b, Range range) {
  alignas(64) float out[MAX_ROWS * CHUNK];
  int64_t first = 0;
  for (int64_t i = 0; i < b.op.segments; first += b.op.segment[i].rows, ++i) {
    const Segment& s = b.op.segment[i];
    const int64_t end = smaller(range.end - first, s.rows);
    for (int64_t at = range.begin > first ? range.begin - first : 0; at < end; at += CHUNK) {
      const int64_t count = smaller(CHUNK, end - at);
      linear_chunk(b, s, at, count, out, weights_at(b.op, s, at + count));
      store_chunk(b, b.call.out[i], out, at, count);
    }
  }
}

inline void run_glu(const Block& b, Range range) {
  alignas(64) float gate[MAX_ROWS * CHUNK], up[MAX_ROWS * CHUNK];
  for (int64_t at = range.begin; at < range.end; at += CHUNK) {
    const int64_t count = smaller(CHUNK, range.end - at);
    const Segment *a = b.op.segment, *c = a + 1;
    linear_chunk(b, *a, at, count, gate, weights_at(b.op, *c, at));
    linear_chunk(b, *c, at, count, up, weights_at(b.op, *a, at + count));
    for (int64_t m = 0; m < b.rows; ++m)
      glu_row(b.op.act, gate + m * CHUNK, up + m * CHUNK, count);
    store_chunk(b, b.call.out[0], gate, at, count);
  }
}

// The columns of a band that one piece has at most, and the sums of all rows of x with them.
inline int64_t band_columns(const Op& op) { return BAND_BYTES / size_of(op.weight_type); }
inline int64_t band_sums(const Op& op, int64_t rows) { return rows * band_columns(op); }

template <class W>
inline void turned_band(const Block& b, const Segment& s, int64_t at, int64_t count, float* sums) {
  const W* weight = static_cast<const W*>(s.weight) + at;
  turned_products(Band<W>{weight, s.step, count, b.op.n, b.x, padded(b.op.n), b.rows, sums,
                          band_columns(b.op)});
}

// The same as `linear_chunk` for a weight held as [in, out]: sums[rows][band_columns].
inline void turned_chunk(const Block& b, const Segment& s, int64_t at, int64_t count, float* sums) {
  if (b.op.weight_type == FLOAT32) turned_band<float>(b, s, at, count, sums);
  else if (b.op.weight_type == BFLOAT16) turned_band<Bf16>(b, s, at, count, sums);
  else turned_band<Fp16>(b, s, at, count, sums);
  float bias[CHUNK];
  for (int64_t c = 0; c < count; c += CHUNK) {
    const int64_t some = smaller(CHUNK, count - c);
    if (s.bias)
      for (int64_t i = 0; i < some; ++i) bias[i] = number(s.bias, b.op.bias_type, at + c + i);
    for (int64_t m = 0; m < b.rows; ++m)
      scale_bias(sums + m * band_columns(b.op) + c, b.scale[m], s.bias ? bias : nullptr, some);
  }
}

inline void store_band(const Block& b, const Output& out, const float* sums, int64_t at,
                       int64_t count) {
  for (int64_t m = 0; m < b.rows; ++m) {
    const int64_t row = b.first + m;
    store(b.op.x_type, sums + m * band_columns(b.op), out.y, row * out.stride + at, b.call.residual,
          row * b.call.residual_stride + at, count);
  }
}

inline void run_turned_linear(const Block& b, Range range) {
  int64_t first = 0;
  for (int64_t i = 0; i < b.op.segments; first += b.op.segment[i].rows, ++i) {
    const Segment& s = b.op.segment[i];
    const int64_t end = smaller(range.end - first, s.rows);
    int64_t at = range.begin > first ? range.begin - first : 0;
    for (int64_t count; at < end; at += count) {
      count = smaller(band_columns(b.op), end - at);
      turned_chunk(b, s, at, count, b.sums);
      store_band(b, b.call.out[i], b.sums, at, count);
    }
  }
}

inline void run_turned_glu(const Block& b, Range range) {
  float* up = b.sums + band_sums(b.op, b.rows);
  int64_t at = range.begin;
  for (int64_t count; at < range.end; at += count) {
    count = smaller(band_columns(b.op), range.end - at);
    turned_chunk(b, b.op.segment[0], at, count, b.sums);
    turned_chunk(b, b.op.segment[1], at, count, up);
    for (int64_t m = 0; m < b.rows; ++m)
      glu_row(b.op.act, b.sums + m * band_columns(b.op), up + m * band_columns(b.op), count);
    store_band(b, b.call.out[0], b.sums, at, count);
  }
}

// Products of bf16 pairs treat subnormal numbers as zero and are exact otherwise: safe for rows that
// are far from subnormal and have not been touched.
inline bool pairs_allowed(const Op& op, const Options& options) {
  return options.pairs && op.x_type == BFLOAT16 && op.weight_type == BFLOAT16 && !op.gain &&
         !op.shift && (op.norm == NORM_NONE || op.norm == NORM_RMS);
}

inline void copy_pairs(const Bf16* x, int64_t n, Bf16* out) {
  memcpy(static_cast<void*>(out), x, static_cast<size_t>(n) * sizeof(Bf16));
  memset(static_cast<void*>(out + n), 0, static_cast<size_t>(padded(n) - n) * sizeof(Bf16));
}

inline int64_t space_for(const Op& op, int64_t rows) {
  const int64_t arranged = is_packed(op) ? arranged_floats(op.n) : 0;
  return padded(op.n) * (2 + rows) + padded(op.n) / 2 * rows + arranged;
}

// Has the only row of a block arranged for packed weights, behind everything else in `space`.
inline void arrange(Block& b, float* space) {
  b.one = nullptr;
  if (!is_packed(b.op)) return;
  float* to = space + padded(b.op.n) + padded(b.op.n) / 2;
  const OneRowOf ways[] = {b.options.bytes, one_row};
  for (const OneRowOf of : ways) {
    const OneRow* way = of ? of(b.op) : nullptr;
    if (!way || (way->arrange && (b.rows != 1 || !way->arrange(b.op, b.x, to)))) continue;
    b.one = way;
    if (way->arrange) b.x = to;
    return;
  }
}

inline float* band_memory(const Op& op, int64_t rows) {
  return flashnorm_workspace(SUMS, band_sums(op, rows) * (op.act ? 2 : 1));
}

// Each thread prepares all rows for itself: that takes less time than waiting for another one.
inline void prepare(Block& b, const Affine& affine, float* space) {
  const int64_t n = b.op.n, width = padded(n);
  Bf16* pairs = reinterpret_cast<Bf16*>(space + b.rows * width);
  bool exact = pairs_allowed(b.op, b.options);
  for (int64_t m = 0; m < b.rows; ++m) {
    const int64_t at = (b.first + m) * b.call.x_stride;
    float* row = space + m * width;
    const Scale scale = prepare_row(b.op, affine, b.call.x, at, row);
    b.scale[m] = scale.factor;
    if (exact) copy_pairs(static_cast<const Bf16*>(b.call.x) + at, n, pairs + m * width);
    if (b.op.norm == NORM_NONE)
      exact = exact && ordinary(sums(row, n).squares / static_cast<float>(n));
    exact = exact && !scale.wide;
  }
  b.x = space;
  b.pairs = exact ? pairs : nullptr;
  arrange(b, space);
}

inline void fetch_turned(const Op& op, Range range) {
  const Segment& s = op.segment[0];
  const int64_t size = size_of(op.weight_type), end = smaller(range.end, s.rows);
  const int64_t width = smaller(end - range.begin, band_columns(op)) * size;
  if (width > 0)
    Lines<char>(offset(s.weight, op.weight_type, range.begin), width, s.step * size)
        .fetch_rows(smaller(GROUP, op.n));
}

// Brings in what is read first while the statistics are computed.
inline void fetch_first(const Op& op, Range range, int64_t ahead) {
  if (turned(op)) return fetch_turned(op, range);
  if (has_columns(op.weight_type)) return;
  int64_t at = range.begin;
  const Segment* s = op.segment;
  if (!op.act)
    for (; at >= s->rows; ++s) at -= s->rows;
  const char* first = static_cast<const char*>(weights_at(op, *s, at));
  const int64_t row = row_bytes(op), rows = smaller(s->rows - at, ahead / row + 1);
  for (int64_t byte = 0; byte < rows * row; byte += LINE) prefetch(first + byte);
}

inline void run_columns(const Block& b, Range range) {
  if (turned(b.op)) return b.op.act ? run_turned_glu(b, range) : run_turned_linear(b, range);
  if (b.op.act) run_glu(b, range);
  else run_linear(b, range);
}

// What is left of the columns, piece by piece, for part `part`.
inline int32_t run_part(const Op& op, const Call& call, const Options& options, WorkQueue& queue,
                        int64_t part) {
  Range range;
  if (!queue.take(part, range)) return OK;
  fetch_first(op, range, options.ahead);
  float* space = workspace(space_for(op, smaller(call.rows, MAX_ROWS)));
  float* sums = turned(op) ? band_memory(op, smaller(call.rows, MAX_ROWS)) : nullptr;
  if (!space || (turned(op) && !sums)) return NO_MEMORY;
  const Affine gains = affine(op, space);
  Block block{op, call, options, 0, 0, nullptr, nullptr, nullptr, {}, sums};
  bool ready = false;
  do {
    for (int64_t first = 0; first < call.rows; first += MAX_ROWS) {
      if (!ready) {
        block.first = first;
        block.rows = smaller(call.rows - first, MAX_ROWS);
        prepare(block, gains, space + 2 * padded(op.n));
      }
      ready = call.rows <= MAX_ROWS;  // one block stays prepared for the next piece
      run_columns(block, range);
    }
  } while (queue.take(part, range));
  return OK;
}

}  // namespace
