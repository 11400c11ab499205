// Several rows of x in tiles: first every row is normalized and transposed, then each thread
// multiplies its block of output columns.
#pragma once
#include "rounded.h"
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

// What of x stays in a core's cache beside the weights.
int64_t rows_at_once(const Op& op) {
  constexpr int64_t cache = 1 << 20;
  const int64_t fit = cache / (op.n * 2) / SIDE * SIDE;
  return fit > SIDE ? fit : SIDE;
}

// Groups of rows `part` of `parts`.
int32_t pack_part(const Op& op, const Call& call, const Packed& packed, int64_t part,
                  int64_t parts) {
  const int64_t total = groups(packed.rows), n = op.n;
  float* space = workspace(3 * padded(n) + TILE * n / 2);
  if (!space) return NO_MEMORY;
  const Affine gains = affine(op, space);
  float* row = space + 2 * padded(n);
  Bf16* rows = reinterpret_cast<Bf16*>(row + padded(n));
  for (int64_t g = total * part / parts; g < total * (part + 1) / parts; ++g) {
    for (int64_t i = 0; i < TILE; ++i) {
      const int64_t m = g * TILE + i;
      if (m < packed.rows)
        factors(packed)[m] = rounded_row(op, gains, call, packed.first + m, row, rows + i * n);
      else memset(static_cast<void*>(rows + i * n), 0, static_cast<size_t>(n) * sizeof(Bf16));
    }
    Bf16* to = pairs_of(packed) + g * TILE * n;
    for (int64_t i = 0; i < n; i += DEPTH) transpose(rows + i, n / 2, to + i * TILE, TILE);
  }
  return OK;
}

// What the products of one part work on. `spare` holds two pairs of tiles of weights.
struct Tiled {
  const Op& op;
  const Call& call;
  const Packed& x;
  Bf16* spare;
  int64_t ahead;
};

// Tile column c of rows at.. of a segment as [n / 32][16][32] in `to`; rows that are missing are zero.
inline void copy_tiles(const Segment& s, int64_t at, int64_t rows, int64_t n, Bf16* to) {
  const Bf16* from = static_cast<const Bf16*>(s.weight) + at * s.stride;
  for (int64_t row = 0; row < TILE; ++row)
    for (int64_t i = 0; i < n; i += DEPTH) {
      Bf16* place = to + (i * TILE + row * DEPTH);
      const __m512i line = row < rows ? _mm512_loadu_si512(from + row * s.stride + i)
                                      : _mm512_setzero_si512();
      _mm512_store_si512(static_cast<void*>(place), line);
    }
}

// The tiles of rows at..at + count of a segment, count <= 32, as they lie; a short one in `spare`.
inline Pair weights_of(const Tiled& t, const Segment& s, int64_t at, int64_t count, Bf16* spare) {
  Pair w{};
  for (int c = 0; c * TILE < count; ++c) {
    const int64_t first = at + c * TILE, left = smaller(TILE, count - c * TILE);
    if (left == TILE) {
      w.weight[c] = static_cast<const Bf16*>(s.weight) + first * s.stride;
      w.stride[c] = s.stride;
      w.step[c] = 1;
    } else {
      Bf16* to = spare + c * TILE * t.op.n;
      copy_tiles(s, first, left, t.op.n, to);
      w.weight[c] = to;
      w.stride[c] = DEPTH;
      w.step[c] = TILE;
    }
  }
  return w;
}

// Rows `first`..first + rows of x by columns at..at + count of a segment, at most SIDE of each.
struct Part {
  const Segment& s;
  const Pair& w;
  int64_t at, count, first, rows;
};

inline __mmask16 columns_in(const Part& p, int c) {
  const int64_t left = p.count - c * TILE;
  return static_cast<__mmask16>(left >= TILE ? 0xffff : (1 << left) - 1);
}

// sink(c, m, v) gets tile c of row m of the part's products, scaled, with their bias.
template <class Sink> inline void tiled_products(const Tiled& t, const Part& p, const Sink& sink) {
  alignas(64) float bias[SIDE] = {};
  if (p.s.bias)
    for (int64_t c = 0; c < p.count; ++c) bias[c] = number(p.s.bias, t.op.bias_type, p.at + c);
  const float* factor = factors(t.x) + p.first;
  const auto finish = [&](int c, int r, const float* sums) {
    __m512 v[TILE];
    transposed(sums, TILE, v);
    const __m512 add = _mm512_load_ps(bias + c * TILE);
    const int64_t rows = smaller(TILE, p.rows - r * TILE);
    for (int64_t m = 0; m < rows; ++m) {
      const int64_t row = r * TILE + m;
      sink(c, row, _mm512_fmadd_ps(v[m], _mm512_set1_ps(factor[row]), add));
    }
  };
  const Bf16* x = pairs_of(t.x) + p.first * t.op.n;
  const bool streams = p.first == 0 && p.count == SIDE;
  const int64_t ahead = streams ? t.ahead : 0;
  const int64_t next = SIDE * p.s.stride, n = t.op.n;
  const bool wide = p.count > TILE, tall = p.rows > TILE;
  if (wide && tall) tile_block<2, 2>(p.w, x, n, ahead, next, finish);
  else if (wide) tile_block<2, 1>(p.w, x, n, ahead, next, finish);
  else if (tall) tile_block<1, 2>(p.w, x, n, ahead, next, finish);
  else tile_block<1, 1>(p.w, x, n, ahead, next, finish);
}

// y = v (+ residual) in bf16: tile c of row m of a part.
inline void put(const Tiled& t, const Output& out, const Part& p, int c, int64_t m, __m512 v) {
  const int64_t row = t.x.first + p.first + m, at = p.at + c * TILE;
  const __mmask16 which = columns_in(p, c);
  if (t.call.residual) {
    const Bf16* add = static_cast<const Bf16*>(t.call.residual) + row * t.call.residual_stride + at;
    const __m512i wide = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(which, add));
    v = _mm512_add_ps(v, _mm512_castsi512_ps(_mm512_slli_epi32(wide, 16)));
  }
  store_bf16(v, which, static_cast<Bf16*>(out.y) + row * out.stride + at);
}

inline void tiled_linear(const Tiled& t, Range range) {
  int64_t begin = 0;
  for (int64_t i = 0; i < t.op.segments; begin += t.op.segment[i].rows, ++i) {
    const Segment& s = t.op.segment[i];
    const Output& y = t.call.out[i];
    const int64_t end = smaller(range.end - begin, s.rows);
    for (int64_t at = range.begin > begin ? range.begin - begin : 0; at < end; at += SIDE) {
      const int64_t count = smaller(SIDE, end - at);
      const Pair w = weights_of(t, s, at, count, t.spare);
      for (int64_t m = 0; m < t.x.rows; m += SIDE) {
        const Part p{s, w, at, count, m, smaller(SIDE, t.x.rows - m)};
        tiled_products(t, p, [&](int c, int64_t row, __m512 v) { put(t, y, p, c, row, v); });
      }
    }
  }
}

inline void tiled_glu(const Tiled& t, Range range) {
  alignas(64) float gate[SIDE * SIDE], up[SIDE * SIDE];
  const auto keep = [](float* to) {
    return [to](int c, int64_t row, __m512 v) { _mm512_store_ps(to + row * SIDE + c * TILE, v); };
  };
  const Segment* s = t.op.segment;
  for (int64_t at = range.begin; at < range.end; at += SIDE) {
    const int64_t count = smaller(SIDE, range.end - at);
    const Pair a = weights_of(t, s[0], at, count, t.spare);
    const Pair b = weights_of(t, s[1], at, count, t.spare + SIDE * t.op.n);
    for (int64_t m = 0; m < t.x.rows; m += SIDE) {
      const int64_t rows = smaller(SIDE, t.x.rows - m);
      const Part p{s[0], a, at, count, m, rows}, q{s[1], b, at, count, m, rows};
      tiled_products(t, p, keep(gate));
      tiled_products(t, q, keep(up));
      for (int64_t r = 0; r < rows; ++r) {
        glu_row(t.op.act, gate + r * SIDE, up + r * SIDE, count);
        for (int c = 0; c * TILE < count; ++c)
          put(t, t.call.out[0], p, c, r, _mm512_load_ps(gate + r * SIDE + c * TILE));
      }
    }
  }
}

// What is left of the output columns, piece by piece; `packed` is what pack_part made of x.
int32_t tiled_part(const Op& op, const Call& call, const Packed& packed, int64_t ahead,
                   WorkQueue& queue, int64_t part) {
  Range range;
  if (!queue.take(part, range)) return OK;
  float* spare = workspace(SIDE * op.n);  // two pairs of tiles of bf16
  if (!spare) return NO_MEMORY;
  const Tiles on;
  const Tiled t{op, call, packed, reinterpret_cast<Bf16*>(spare),
                smaller(ahead / 2 / DEPTH * DEPTH, op.n)};
  do {
    if (op.act) tiled_glu(t, range);
    else tiled_linear(t, range);
  } while (queue.take(part, range));
  return OK;
}

}  // namespace
