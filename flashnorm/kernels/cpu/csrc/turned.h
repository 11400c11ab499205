// Few rows of x against a weight held as [in, out]: its rows are read one after another, as they lie,
// and every output column has one sum, in the order of the rows, whoever computes it.
#pragma once
#include "skinny.h"

namespace {

constexpr int GROUP = 8;             // rows of the weight that are added up before they meet the sums
constexpr int64_t BAND_BYTES = 4096;  // of a row, at most, that are read before the next row's

// Columns of a weight whose rows are `stride` apart: sums[r][c] = Σ_i x[r][i] weight[i][c].
template <class W> struct Band {
  const W* weight;
  int64_t stride, width, n;
  const float* x;
  int64_t x_stride, rows;
  float* sums;
  int64_t pitch;  // of rows of sums, a multiple of Vec::lanes
};

// Brings rows of a band into the second cache, line by line in the order of memory.
template <class W> class Lines {
 public:
  Lines(const W* first, int64_t width, int64_t stride)
      : at_(first), all_((width + line - 1) / line), left_(all_), jump_(stride - all_ * line) {}

  void fetch(int64_t count) {
    for (int64_t i = 0; i < count; ++i) {
      __builtin_prefetch(at_, 0, 2);
      at_ += line;
      if (--left_ == 0) left_ = all_, at_ += jump_;
    }
  }
  void fetch_rows(int64_t rows) { fetch(rows * all_); }

  static constexpr int64_t line = 64 / static_cast<int64_t>(sizeof(W));

 private:
  const W* at_;
  int64_t all_, left_, jump_;
};

// sums[r][column..] += Σ_g x[r][i + g] w[g], for one vector of columns of G rows.
template <class W, int G>
inline void add_rows(const Band<W>& b, const W* w, int64_t stride, int64_t i, int64_t column) {
  Vec weights[G];
  for (int g = 0; g < G; ++g) weights[g] = Vec::load(w + g * stride);
  for (int64_t r = 0; r < b.rows; ++r) {
    const float* x = b.x + r * b.x_stride + i;
    float* sums = b.sums + r * b.pitch + column;
    const Vec before = Vec::load(sums);
    if constexpr (G == 1) {
      fma(Vec::set(x[0]), weights[0], before).store(sums);
    } else {
      Vec sum = Vec::set(x[0]) * weights[0];
      for (int g = 1; g < G; ++g) sum = fma(Vec::set(x[g]), weights[g], sum);
      (before + sum).store(sums);
    }
  }
}

// G rows from row i on; where `fetch` says so, the G rows behind them are brought in meanwhile.
template <class W, int G> inline void add_group(const Band<W>& b, int64_t i, bool fetch) {
  const W* first = b.weight + i * b.stride;
  Lines<W> next(first + G * b.stride, b.width, b.stride);
  int64_t column = 0;
  for (; column + Lines<W>::line <= b.width; column += Lines<W>::line) {
    if (fetch) next.fetch(G);
    for (int64_t v = 0; v < Lines<W>::line; v += Vec::lanes)
      add_rows<W, G>(b, first + column + v, b.stride, i, column + v);
  }
  for (; column < b.width; column += Vec::lanes) {  // zeros behind the last column
    alignas(64) W rest[G * Vec::lanes] = {};
    const int64_t count = smaller(Vec::lanes, b.width - column);
    for (int g = 0; g < G; ++g)
      for (int64_t c = 0; c < count; ++c)
        rest[g * Vec::lanes + c] = first[g * b.stride + column + c];
    add_rows<W, G>(b, rest, Vec::lanes, i, column);
  }
}

template <class W> __attribute__((noinline)) void turned_products(const Band<W>& b) {
  for (int64_t r = 0; r < b.rows; ++r)
    memset(b.sums + r * b.pitch, 0, static_cast<size_t>(b.pitch) * sizeof(float));
  int64_t i = 0;
  for (; i + GROUP <= b.n; i += GROUP) add_group<W, GROUP>(b, i, i + 2 * GROUP <= b.n);
  for (; i < b.n; ++i) add_group<W, 1>(b, i, false);
}

}  // namespace
