// Few rows of x against many rows of weights: every weight is read once, as a stream.
#pragma once
#include "table.h"

namespace {

inline void prefetch(const void* p) { __builtin_prefetch(p, 0, 3); }

// How a row of x meets a row of weights: float32 sums of products with widened weights.
template <class W> struct Plain {
  using Weight = W;
  using Input = float;
  using Sum = Vec;
  static constexpr int lanes = Vec::lanes, max_rows = Vec::max_rows;
  static inline Vec weights(const W* p) { return Vec::load(p); }
  static inline Vec inputs(const float* p) { return Vec::load(p); }
  static inline Vec zero() { return Vec::set(0); }
  static inline Vec step(Vec w, Vec x, Vec sum) { return fma(w, x, sum); }
  static inline Vec join(Vec a, Vec b) { return a + b; }
  static inline float total(Vec sum) { return sum.sum(); }
};

// What a tile works on: rows of weights `stride` apart, and where the stream goes after them.
template <class D> struct Tile {
  const typename D::Weight* weight;
  int64_t stride;
  const typename D::Input* x;
  int64_t x_stride, n;
  int64_t ahead;  // elements of each row between reading and prefetching, at most n
  float* out;     // [rows of x][CHUNK]
};

// The last n % lanes elements, with zeros behind them.
template <class D> inline auto tail(const typename D::Weight* p, int64_t count) {
  alignas(64) typename D::Weight rest[D::lanes] = {};
  for (int64_t i = 0; i < count; ++i) rest[i] = p[i];
  return D::weights(rest);
}

// out[m][c] = Σ_i x[m][i] w[c][i] for C rows of weights and R rows of x, in U interleaved sums.
template <class D, int C, int R, int U, bool PREFETCH> inline void tile(const Tile<D>& t) {
  using W = typename D::Weight;
  constexpr int64_t step = D::lanes * U;
  typename D::Sum sum[C][R][U];
  for (int c = 0; c < C; ++c)
    for (int r = 0; r < R; ++r)
      for (int u = 0; u < U; ++u) sum[c][r][u] = D::zero();

  int64_t i = 0;
  const auto advance = [&](int64_t end, int64_t ahead) {
    for (; i + step <= end; i += step) {
      if (PREFETCH) {
        for (int c = 0; c < C; ++c)
          for (int64_t b = 0; b < step; b += 64 / static_cast<int64_t>(sizeof(W)))
            prefetch(t.weight + c * t.stride + i + ahead + b);
      }
      for (int u = 0; u < U; ++u) {
        decltype(D::inputs(t.x)) x[R];
        for (int r = 0; r < R; ++r) x[r] = D::inputs(t.x + r * t.x_stride + i + u * D::lanes);
        for (int c = 0; c < C; ++c) {
          const auto w = D::weights(t.weight + c * t.stride + i + u * D::lanes);
          for (int r = 0; r < R; ++r) sum[c][r][u] = D::step(w, x[r], sum[c][r][u]);
        }
      }
    }
  };
  advance(t.n - t.ahead, t.ahead);                           // within the same rows,
  advance(t.n, t.ahead - t.n + C * t.stride);                // then the next C rows
  for (; i < t.n; i += D::lanes) {
    const int64_t left = t.n - i;
    for (int c = 0; c < C; ++c) {
      const W* p = t.weight + c * t.stride + i;
      const auto w = left >= D::lanes ? D::weights(p) : tail<D>(p, left);
      for (int r = 0; r < R; ++r)
        sum[c][r][0] = D::step(w, D::inputs(t.x + r * t.x_stride + i), sum[c][r][0]);
    }
  }
  for (int c = 0; c < C; ++c)
    for (int r = 0; r < R; ++r) {
      auto all = sum[c][r][0];
      for (int u = 1; u < U; ++u) all = D::join(all, sum[c][r][u]);
      t.out[r * CHUNK + c] = D::total(all);
    }
}

// `rows` rows of x against C rows of weights, as many at a time as the registers hold. The first tile
// fetches; the others find the weights in the cache.
template <class D, int C, bool PREFETCH> inline int64_t some_rows(const Tile<D>& t, int64_t rows) {
  if constexpr (D::max_rows >= 4) {
    if (rows >= 4) return tile<D, C, 4, 1, PREFETCH>(t), 4;
    if (rows == 3) return tile<D, C, 3, 1, PREFETCH>(t), 3;
  }
  if (rows >= 2) return tile<D, C, 2, 1, PREFETCH>(t), 2;
  return tile<D, C, 1, 2, PREFETCH>(t), 1;
}

template <class D, int C> inline void columns(Tile<D> t, int64_t rows) {
  constexpr bool again = C == 1;  // a few columns at the end are not worth code of their own
  for (bool first = true; rows > 0; first = false) {
    const int64_t done = first ? some_rows<D, C, true>(t, rows) : some_rows<D, C, again>(t, rows);
    rows -= done;
    t.x += done * t.x_stride;
    t.out += done * CHUNK;
  }
}

template <class D> __attribute__((noinline)) void products(const Product& p) {
  using W = typename D::Weight;
  using X = typename D::Input;
  Tile<D> t{static_cast<const W*>(p.weight), p.stride, static_cast<const X*>(p.x), p.x_stride, p.n,
            p.ahead, p.out};
  int64_t count = p.count;
  for (; count >= COLUMNS; count -= COLUMNS) {
    columns<D, COLUMNS>(t, p.rows);
    t.weight += COLUMNS * t.stride;
    t.out += COLUMNS;
  }
  for (; count > 0; --count) {
    columns<D, 1>(t, p.rows);
    t.weight += t.stride;
    t.out += 1;
  }
}

}  // namespace
