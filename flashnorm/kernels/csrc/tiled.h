// Several rows of x in tiles: first every row is normalized and turned, then each thread multiplies
// its block of output columns. What is not exact as it came (a gain, a bias, a mean) is rounded to
// bf16 once, as it is in a model that computes its norm by itself.
#pragma once
#include "run.h"
#include "tiles_amx.h"

namespace {

constexpr int64_t SIDE = 2 * TILE;  // rows of x, and of weights, in a block of tiles

inline int64_t groups(int64_t rows) { return (rows + TILE - 1) / TILE; }

// Packed rows: a factor per row, padded to whole groups, then [groups][n / 2][16] pairs.
inline float* factors(const Packed& p) { return static_cast<float*>(p.memory); }
inline Bf16* pairs_of(const Packed& p) {
  return reinterpret_cast<Bf16*>(factors(p) + groups(p.rows) * TILE);
}

int64_t packed_bytes(const Op& op, int64_t rows) {
  return groups(rows) * TILE * (static_cast<int64_t>(sizeof(float)) + op.n * 2);
}

// A power of two that brings a row away from the ends of the range, where products would be lost.
inline float toward_one(const float* x, int64_t n) {
  float most = 0;
  for (int64_t i = 0; i < n; ++i) most = fabsf(x[i]) > most ? fabsf(x[i]) : most;
  if (most == 0 || !(most < INFINITY)) return 1.0f;
  return most > 0x1p60f ? 0x1p-100f : most < 0x1p-60f ? 0x1p100f : 1.0f;
}

// Row m as bf16 into `out` [n]; returns what its products have to be multiplied by.
inline float pack_row(const Op& op, const Affine& gains, const Call& call, int64_t m, float* space,
                      Bf16* out) {
  const int64_t at = m * call.x_stride;
  const Scale scale = prepare_row(op, gains, call.x, at, space);
  const bool touched = gains.gain || gains.shift || scale.wide || op.norm == NORM_LAYER ||
                       op.norm == NORM_DYT;
  const bool plain = op.norm == NORM_NONE;
  if (!touched && (!plain || ordinary(sums(space, op.n).squares / static_cast<float>(op.n)))) {
    const Bf16* x = static_cast<const Bf16*>(call.x) + at;
    memcpy(static_cast<void*>(out), x, static_cast<size_t>(op.n) * sizeof(Bf16));
    return scale.factor;
  }
  if (touched) scale_bias(space, scale.factor, nullptr, op.n);
  const float factor = plain || scale.wide ? toward_one(space, op.n) : 1.0f;
  scale_bias(space, factor, nullptr, op.n);
  store_row(space, out, static_cast<const Bf16*>(nullptr), op.n);
  return 1.0f / factor;
}

// Groups of rows `part` of `parts`.
int32_t pack_part(const Op& op, const Call& call, const Packed& packed, int64_t part,
                  int64_t parts) {
  const int64_t total = groups(packed.rows), n = op.n;
  float* space = arena(3 * padded(n) + TILE * n / 2);
  if (!space) return NO_MEMORY;
  const Affine gains = affine(op, space);
  float* row = space + 2 * padded(n);
  Bf16* rows = reinterpret_cast<Bf16*>(row + padded(n));
  for (int64_t g = total * part / parts; g < total * (part + 1) / parts; ++g) {
    for (int64_t i = 0; i < TILE; ++i) {
      const int64_t m = g * TILE + i;
      if (m < packed.rows)
        factors(packed)[m] = pack_row(op, gains, call, packed.first + m, row, rows + i * n);
      else memset(static_cast<void*>(rows + i * n), 0, static_cast<size_t>(n) * sizeof(Bf16));
    }
    Bf16* to = pairs_of(packed) + g * TILE * n;
    for (int64_t i = 0; i < n; i += DEPTH) turn(rows + i, n / 2, to + i * TILE, TILE);
  }
  return OK;
}

// What the products of one part work on. `spare` holds a tile of weights, for the last rows.
struct Tiled {
  const Op& op;
  const Call& call;
  const Packed& x;
  Bf16* spare;
  int64_t ahead;
};

// Fewer than 16 rows of weights, with zeros behind them.
inline const Bf16* whole_tile(const Tiled& t, const Bf16* weight, int64_t stride, int64_t rows) {
  for (int64_t row = 0; row < TILE; ++row) {
    Bf16* to = t.spare + row * t.op.n;
    const size_t bytes = static_cast<size_t>(t.op.n) * sizeof(Bf16);
    if (row < rows) memcpy(static_cast<void*>(to), weight + row * stride, bytes);
    else memset(static_cast<void*>(to), 0, bytes);
  }
  return t.spare;
}

// The tiles of rows at..at + count of a segment, count <= 32; a short one is copied.
inline Pair weights_of(const Tiled& t, const Segment& s, int64_t at, int64_t count) {
  Pair w{};
  for (int c = 0; c * TILE < count; ++c) {
    const int64_t left = count - c * TILE;
    w.weight[c] = static_cast<const Bf16*>(s.weight) + (at + c * TILE) * s.stride;
    w.stride[c] = s.stride;
    if (left < TILE) {
      w.weight[c] = whole_tile(t, w.weight[c], s.stride, left);
      w.stride[c] = t.op.n;
    }
  }
  return w;
}

// out[rows][CHUNK] for `count` columns and the rows of x from `first` on, scaled, with their bias.
inline void tiled_chunk(const Tiled& t, const Segment& s, const Pair& w, int64_t at, int64_t count,
                        int64_t first, int64_t rows, float* out) {
  const Bf16* x = pairs_of(t.x) + first * t.op.n;
  const int64_t ahead = first == 0 && count == SIDE ? t.ahead : 0;
  const int64_t next = SIDE * s.stride, n = t.op.n;
  const bool wide = count > TILE, tall = rows > TILE;
  if (wide && tall) tile_block<2, 2>(w, x, n, ahead, next, out);
  else if (wide) tile_block<2, 1>(w, x, n, ahead, next, out);
  else if (tall) tile_block<1, 2>(w, x, n, ahead, next, out);
  else tile_block<1, 1>(w, x, n, ahead, next, out);
  float bias[SIDE];
  if (s.bias)
    for (int64_t c = 0; c < count; ++c) bias[c] = number(s.bias, t.op.bias_type, at + c);
  for (int64_t m = 0; m < rows; ++m)
    scale_bias(out + m * CHUNK, factors(t.x)[first + m], s.bias ? bias : nullptr, count);
}

inline void tiled_store(const Tiled& t, const Output& y, const float* out, int64_t at, int64_t count,
                        int64_t first, int64_t rows) {
  for (int64_t m = 0; m < rows; ++m) {
    const int64_t row = t.x.first + first + m;
    store(t.op.x_type, out + m * CHUNK, y.y, row * y.stride + at, t.call.residual,
          row * t.call.residual_stride + at, count);
  }
}

inline void tiled_linear(const Tiled& t, Range range) {
  alignas(64) float out[SIDE * CHUNK];
  int64_t begin = 0;
  for (int64_t i = 0; i < t.op.segments; begin += t.op.segment[i].rows, ++i) {
    const Segment& s = t.op.segment[i];
    const int64_t end = smaller(range.end - begin, s.rows);
    for (int64_t at = range.begin > begin ? range.begin - begin : 0; at < end; at += SIDE) {
      const int64_t count = smaller(SIDE, end - at);
      const Pair w = weights_of(t, s, at, count);
      for (int64_t m = 0; m < t.x.rows; m += SIDE) {
        const int64_t rows = smaller(SIDE, t.x.rows - m);
        tiled_chunk(t, s, w, at, count, m, rows, out);
        tiled_store(t, t.call.out[i], out, at, count, m, rows);
      }
    }
  }
}

inline void tiled_glu(Tiled t, Range range) {
  alignas(64) float gate[SIDE * CHUNK], up[SIDE * CHUNK];
  const Segment &first = t.op.segment[0], &second = t.op.segment[1];
  Tiled other = t;
  other.spare += TILE * t.op.n;
  for (int64_t at = range.begin; at < range.end; at += SIDE) {
    const int64_t count = smaller(SIDE, range.end - at);
    const Pair a = weights_of(t, first, at, count), b = weights_of(other, second, at, count);
    for (int64_t m = 0; m < t.x.rows; m += SIDE) {
      const int64_t rows = smaller(SIDE, t.x.rows - m);
      tiled_chunk(t, first, a, at, count, m, rows, gate);
      tiled_chunk(t, second, b, at, count, m, rows, up);
      for (int64_t r = 0; r < rows; ++r)
        glu_row(t.op.act, gate + r * CHUNK, up + r * CHUNK, count);
      tiled_store(t, t.call.out[0], gate, at, count, m, rows);
    }
  }
}

// Part `part` of `parts` of the output columns; `packed` is what pack_part made of x.
int32_t tiled_part(const Op& op, const Call& call, const Packed& packed, int64_t ahead,
                   int64_t part, int64_t parts) {
  int64_t total = 0;
  for (int64_t i = 0; i < (op.act ? 1 : op.segments); ++i) total += op.segment[i].rows;
  const Range range = share(total, TILE, part, parts);
  if (range.begin == range.end) return OK;
  float* spare = arena(TILE * op.n);  // two tiles of bf16
  if (!spare) return NO_MEMORY;
  const Tiles on;
  const Tiled t{op, call, packed, reinterpret_cast<Bf16*>(spare),
                smaller(ahead / 2 / DEPTH * DEPTH, op.n)};
  if (op.act) tiled_glu(t, range);
  else tiled_linear(t, range);
  return OK;
}

}  // namespace
