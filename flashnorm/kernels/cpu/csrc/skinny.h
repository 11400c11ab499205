// Few rows of x against many rows of weights: every weight is read once, as a stream.
//
// What limits it is the order in which lines come from memory. Rows that are read side by side are
// several streams, for which prefetchers of processors do not run far enough ahead: a core of a Zen 4
// got 11 GB/s of 31. So rows that lie one behind the other are fetched one behind the other, line by
// line, while those before them, which have arrived, are multiplied side by side.
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

// What a tile works on: rows of weights `stride` apart, and rows of x.
template <class D> struct Tile {
  const typename D::Weight* weight;
  int64_t stride;
  const typename D::Input* x;
  int64_t x_stride, n;
  float* out;         // [rows of x][CHUNK]
  const char* fetch;  // where as many rows lie as the tile has, which will be read later
};

// Whether what a tile fetches goes to the nearest cache, to that alone, to the second one, or is not
// fetched.
enum class Fetch { NO, NEAR, PASSING, FAR };
template <Fetch F> inline void fetch_line(const char* p) {
  __builtin_prefetch(p, 0, F == Fetch::NEAR ? 3 : F == Fetch::FAR ? 2 : 0);
}

// The last n % lanes elements, with zeros behind them.
template <class D> inline auto tail(const typename D::Weight* p, int64_t count) {
  alignas(64) typename D::Weight rest[D::lanes] = {};
  for (int64_t i = 0; i < count; ++i) rest[i] = p[i];
  return D::weights(rest);
}

// out[m][c] = Σ_i x[m][i] w[c][i] for C rows of weights and R rows of x, in U interleaved sums.
template <class D, int C, int R, int U, Fetch F> inline void tile(const Tile<D>& t) {
  using W = typename D::Weight;
  constexpr int64_t step = D::lanes * U, bytes = C * step * static_cast<int64_t>(sizeof(W));
  typename D::Sum sum[C][R][U];
  for (int c = 0; c < C; ++c)
    for (int r = 0; r < R; ++r)
      for (int u = 0; u < U; ++u) sum[c][r][u] = D::zero();

  const char* fetch = t.fetch;
  int64_t i = 0;
  for (; i + step <= t.n; i += step) {
    if (F != Fetch::NO) {
      for (int64_t b = 0; b < bytes; b += LINE) fetch_line<F>(fetch + b);
      fetch += bytes;
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
  if (F != Fetch::NO)
    for (const char* end = t.fetch + C * t.n * static_cast<int64_t>(sizeof(W)); fetch < end; fetch += LINE)
      fetch_line<F>(fetch);
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

template <class D, int C, Fetch F> inline int64_t one_row(const Tile<D>& t) {
  return tile<D, C, 1, C < COLUMNS ? 4 : 2, F>(t), 1;
}

// `rows` rows of x against C rows of weights, as many at a time as the registers hold.
template <class D, int C, Fetch F> inline int64_t some_rows(const Tile<D>& t, int64_t rows) {
  if constexpr (D::max_rows >= 4) {
    if (rows >= 4) return tile<D, C, 4, 1, F>(t), 4;
    if (rows == 3) return tile<D, C, 3, 1, F>(t), 3;
  }
  if (rows >= 2) return tile<D, C, 2, 1, F>(t), 2;
  return one_row<D, C, F>(t);
}

// The first tile fetches; the others find the weights in the cache.
template <class D, int C> inline void columns(Tile<D> t, Fetch fetch, int64_t rows) {
  for (; rows > 0; fetch = Fetch::NO) {
    const int64_t done = fetch == Fetch::NEAR      ? some_rows<D, C, Fetch::NEAR>(t, rows)
                         : fetch == Fetch::FAR     ? some_rows<D, C, Fetch::FAR>(t, rows)
                         : fetch == Fetch::PASSING ? one_row<D, C, Fetch::PASSING>(t)
                                                   : some_rows<D, C, Fetch::NO>(t, rows);
    rows -= done;
    t.x += done * t.x_stride;
    t.out += done * CHUNK;
  }
}

// Columns C at a time while there are so many; what is fetched is `ahead` rows further, or as much
// behind `next` where that is in the next chunk. Returns how many columns are left.
template <class D, int C>
inline int64_t tiles(Tile<D>& t, const Product& p, Fetch fetch, int64_t ahead, int64_t left) {
  using W = typename D::Weight;
  for (; left >= C; left -= C) {
    const bool inside = left > ahead;
    const W* from = inside ? t.weight + ahead * t.stride
                           : static_cast<const W*>(p.next) + (ahead - left) * t.stride;
    t.fetch = reinterpret_cast<const char*>(from);
    columns<D, C>(t, inside || p.next ? fetch : Fetch::NO, p.rows);
    t.weight += C * t.stride;
    t.out += C;
  }
  return left;
}

// What one of the first caches holds at least, of which a part is left for what else is read.
constexpr int64_t NEAREST_CACHE = 32 * 1024;

template <class D> __attribute__((noinline)) void products(const Product& p) {
  constexpr int64_t size = sizeof(typename D::Weight);
  const int64_t row = p.n * size;
  const int64_t ahead = (p.ahead / row / COLUMNS + 1) * COLUMNS;
  const bool fits = 2 * ahead * row + p.rows * p.n * 4 <= NEAREST_CACHE;
  const Fetch near = p.passing && p.rows == 1 ? Fetch::PASSING : Fetch::NEAR;
  const Fetch fetch = p.stride != p.n ? Fetch::NO : fits ? near : Fetch::FAR;
  Tile<D> t{static_cast<const typename D::Weight*>(p.weight), p.stride,
            static_cast<const typename D::Input*>(p.x), p.x_stride, p.n, p.out, nullptr};
  // Of one short row two columns at a time are nearest to the order of the stream; of a long one x is
  // read from the second cache as well, and more columns share it.
  const int64_t left = p.rows == 1 && fits ? tiles<D, 2>(t, p, fetch, ahead, p.count)
                                           : tiles<D, COLUMNS>(t, p, fetch, ahead, p.count);
  tiles<D, 1>(t, p, fetch, ahead, left);
}

}  // namespace
