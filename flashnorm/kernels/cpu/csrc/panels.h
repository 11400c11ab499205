// Many rows of x without matrix units: a packed product in the style of BLIS.
//
// Rows of x are normalized as they are packed, into panels whose lanes are rows, so that weights need
// no transposing: a block of them is copied as it lies into the second cache, once for all panels,
// and its units are broadcast. A unit is one feature in float32, or what an arithmetic A has else in
// as many bytes. Each sum has an order that n alone decides. Scale, bias, gate and residual are
// applied on the way out.
#pragma once
#include "run.h"

namespace {

constexpr int64_t VECTORS_HIGH = 2, HEIGHT = VECTORS_HIGH * Vec::lanes;  // rows of x in a panel
constexpr int64_t ACROSS = Vec::columns;  // rows of weights whose sums fit the registers
constexpr int64_t WIDTH = 48;             // output columns of a block
constexpr int64_t DEPTH = 256;  // units of a block: 16 to 32 KB of a panel
constexpr int64_t ROW = DEPTH + 16;  // units from one row of a block to the next: no power of two
static_assert(WIDTH % ACROSS == 0 && WIDTH <= CHUNK, "a block is made of tiles, and fits a chunk");

inline int64_t panels(int64_t rows) { return (rows + HEIGHT - 1) / HEIGHT; }

// Everything in float32: a unit is one feature.
struct Float32 {
  static constexpr int64_t features = 1;
  static inline Vec step(Vec x, Vec w, Vec sum) { return fma(x, w, sum); }

  // Row m of x into `out`; returns what its products have to be multiplied by.
  static inline float row(const Op& op, const Affine& gains, const Call& call, int64_t m, float*,
                          float* out) {
    return prepare_row(op, gains, call.x, m * call.x_stride, out).factor;
  }
  template <class W> static inline void weights(const W* from, int64_t n, float* to) {
    copy_dense(from, n, to);
  }
};

template <class A> inline int64_t units(int64_t n) { return (n + A::features - 1) / A::features; }

// Packed rows: a factor per row, then [panels][units][HEIGHT].
inline float* row_factors(const Packed& p) { return static_cast<float*>(p.memory); }
template <class A> inline float* panel(const Packed& p, int64_t n, int64_t which) {
  return row_factors(p) + panels(p.rows) * HEIGHT + which * units<A>(n) * HEIGHT;
}

template <class A> int64_t panel_bytes(const Op& op, int64_t rows) {
  return panels(rows) * HEIGHT * (units<A>(op.n) + 1) * static_cast<int64_t>(sizeof(float));
}

// to[c][r] = from[r][c] for `rows` rows of `columns` numbers, whole vectors of them at a time.
inline void turn(const float* from, int64_t stride, int64_t rows, int64_t columns, float* to,
                 int64_t to_stride) {
  constexpr int64_t lanes = Vec::lanes;
  const int64_t whole_rows = rows / lanes * lanes, whole = columns / lanes * lanes;
  for (int64_t c = 0; c < whole; c += lanes)
    for (int64_t r = 0; r < whole_rows; r += lanes)
      Vec::transpose(from + r * stride + c, stride, to + c * to_stride + r, to_stride);
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t c = r < whole_rows ? whole : 0; c < columns; ++c)
      to[c * to_stride + r] = from[r * stride + c];
}

// Panels `part` of `parts`; rows that are missing are zero.
template <class A>
int32_t pack_panels(const Op& op, const Call& call, const Packed& packed, int64_t part,
                    int64_t parts) {
  const int64_t total = panels(packed.rows), width = padded(op.n), used = units<A>(op.n);
  float* space = workspace((3 + HEIGHT) * width);
  if (!space) return NO_MEMORY;
  const Affine gains = affine(op, space);
  float *spare = space + 2 * width, *rows = spare + width;
  for (int64_t g = total * part / parts; g < total * (part + 1) / parts; ++g) {
    for (int64_t i = 0; i < HEIGHT; ++i) {
      const int64_t m = g * HEIGHT + i;
      float* row = rows + i * width;
      if (m < packed.rows)
        row_factors(packed)[m] = A::row(op, gains, call, packed.first + m, spare, row);
      else memset(row, 0, static_cast<size_t>(used) * sizeof(float));
    }
    turn(rows, width, HEIGHT, used, panel<A>(packed, op.n, g), HEIGHT);
  }
  return OK;
}

// out[c][m] (+)= Σ_i w[c][i] x[i][m], a sum of its own for each block: that rounds less than one long
// one. For ACROSS rows of weights and V vectors of rows of x.
template <class A, int V>
inline void micro_tile(const float* x, const float* w, int64_t depth, bool add, float* out) {
  Vec sum[ACROSS][V];
  for (int c = 0; c < ACROSS; ++c)
    for (int v = 0; v < V; ++v) sum[c][v] = Vec::set(0);
  for (int64_t i = 0; i < depth; ++i) {
    Vec a[V];
    for (int v = 0; v < V; ++v) a[v] = Vec::load(x + i * HEIGHT + v * Vec::lanes);
    for (int c = 0; c < ACROSS; ++c) {
      const Vec b = Vec::set(w[c * ROW + i]);
      for (int v = 0; v < V; ++v) sum[c][v] = A::step(a[v], b, sum[c][v]);
    }
  }
  for (int c = 0; c < ACROSS; ++c)
    for (int v = 0; v < V; ++v) {
      float* to = out + c * HEIGHT + v * Vec::lanes;
      (add ? Vec::load(to) + sum[c][v] : sum[c][v]).store(to);
    }
}

// What the products of one part work on. block: [WIDTH][ROW] units of weights.
struct Panels {
  const Op& op;
  const Call& call;
  const Packed& x;
  float* block;
};

// Upcoming that will be read, a few at a time.
struct Upcoming {
  const char* first;
  int64_t stride, row_bytes, rows, row = 0, at = 0;

  void fetch(int64_t count) {
    for (; count > 0 && row < rows; --count) {
      __builtin_prefetch(first + row * stride + at, 0, 2);
      if ((at += LINE) >= row_bytes) at = 0, ++row;
    }
  }
};

// Units from..to of rows at..at + count of a segment.
struct Part {
  const Segment& s;
  int64_t at, count, from, to;
};

template <class A, class W> inline void copy_rows(const Panels& t, const Part& p) {
  const int64_t first = p.from * A::features, n = smaller(p.to * A::features, t.op.n) - first;
  const W* weight = static_cast<const W*>(p.s.weight) + p.at * p.s.stride + first;
  for (int64_t c = 0; c < (p.count + ACROSS - 1) / ACROSS * ACROSS; ++c) {
    float* row = t.block + c * ROW;
    if (c < p.count) A::weights(weight + c * p.s.stride, n, row);
    else memset(row, 0, static_cast<size_t>(p.to - p.from) * sizeof(float));
  }
}

inline void decode_rows(const Panels& t, const Part& p) {
  for (int64_t c = 0; c < (p.count + ACROSS - 1) / ACROSS * ACROSS; ++c) {
    float* row = t.block + c * ROW;
    if (c < p.count) decode(t.op, p.s, p.at + c, p.from, p.to, row);
    else memset(row, 0, static_cast<size_t>(p.to - p.from) * sizeof(float));
  }
}

template <class A> inline void copy_block(const Panels& t, const Part& p) {
  if constexpr (A::features > 1) return copy_rows<A, Bf16>(t, p);
  else if (is_packed(t.op)) decode_rows(t, p);
  else if (t.op.weight_type == BFLOAT16) copy_rows<A, Bf16>(t, p);
  else if (t.op.weight_type == FLOAT32) copy_rows<A, float>(t, p);
  else copy_rows<A, Fp16>(t, p);
}

inline Upcoming packed_lines(const Op& op, const Part& p) {
  if (has_columns(op.weight_type)) return {nullptr, 0, 0, 0};
  const int64_t first = bytes_of(op.weight_type, p.from);
  const char* row = static_cast<const char*>(p.s.weight) + p.at * p.s.stride + first;
  return {row, p.s.stride, bytes_of(op.weight_type, p.to) - first, p.count};
}

template <class A> inline Upcoming lines_of(const Panels& t, const Part& p) {
  if (is_packed(t.op)) return packed_lines(t.op, p);
  const int64_t size = size_of(t.op.weight_type), first = p.from * A::features;
  const char* row = offset(p.s.weight, t.op.weight_type, p.at * p.s.stride + first);
  return {row, p.s.stride * size, (p.to - p.from) * A::features * size, p.count};
}

// sums[panel][c][m] (+)= the products of a block of weights; meanwhile the next block is fetched.
template <class A>
inline void block_products(const Panels& t, const Part& p, Upcoming next, float* sums) {
  const int64_t count = panels(t.x.rows), depth = p.to - p.from;
  const int64_t tiles = count * ((p.count + ACROSS - 1) / ACROSS);
  const int64_t some = next.rows * (next.row_bytes / LINE + 1) / tiles + 1;
  for (int64_t g = 0; g < count; ++g) {
    const float* x = panel<A>(t.x, t.op.n, g) + p.from * HEIGHT;
    const bool half = t.x.rows - g * HEIGHT <= Vec::lanes;
    for (int64_t c = 0; c < p.count; c += ACROSS) {
      float* out = sums + (g * WIDTH + c) * HEIGHT;
      next.fetch(some);
      if (half) micro_tile<A, 1>(x, t.block + c * ROW, depth, p.from, out);
      else micro_tile<A, VECTORS_HIGH>(x, t.block + c * ROW, depth, p.from, out);
    }
  }
}

// Where block b of a row begins: equally long ones, and of packed weights such as may be cut.
inline int64_t cut(const Op& op, int64_t n, int64_t b, int64_t blocks) {
  static_assert(DEPTH == CUT, "packed rows are cut between blocks");
  return is_packed(op) ? smaller(b * CUT, n) : n * b / blocks;
}

// All products of `count` columns of a segment, of which `next` is read afterwards.
template <class A>
inline void panel_products(const Panels& t, const Segment& s, int64_t at, int64_t count,
                           const Segment* next, int64_t next_at, float* sums) {
  const int64_t n = units<A>(t.op.n), blocks = (n + DEPTH - 1) / DEPTH;
  for (int64_t b = 0; b < blocks; ++b) {
    const Part p{s, at, count, cut(t.op, n, b, blocks), cut(t.op, n, b + 1, blocks)};
    copy_block<A>(t, p);
    Upcoming lines{nullptr, 0, 0, 0};
    if (b + 1 < blocks)
      lines = lines_of<A>(t, {s, at, count, p.to, cut(t.op, n, b + 2, blocks)});
    else if (next && next_at < next->rows)
      lines = lines_of<A>(t, {*next, next_at, smaller(WIDTH, next->rows - next_at), 0,
                              cut(t.op, n, 1, blocks)});
    block_products<A>(t, p, lines, sums);
  }
}

// Columns at..at + count of a panel, scaled and with their bias: out[m][c].
inline void panel_rows(const Panels& t, const Segment& s, int64_t at, int64_t count, int64_t g,
                       const float* sums, float* out) {
  const int64_t rows = smaller(HEIGHT, t.x.rows - g * HEIGHT);
  turn(sums + g * WIDTH * HEIGHT, HEIGHT, count, rows, out, CHUNK);
  float bias[WIDTH];
  if (s.bias)
    for (int64_t c = 0; c < count; ++c) bias[c] = number(s.bias, t.op.bias_type, at + c);
  for (int64_t m = 0; m < rows; ++m)
    scale_bias(out + m * CHUNK, row_factors(t.x)[g * HEIGHT + m], s.bias ? bias : nullptr, count);
}

inline void store_panel(const Panels& t, const Output& out, int64_t at, int64_t count, int64_t g,
                        const float* v) {
  const int64_t rows = smaller(HEIGHT, t.x.rows - g * HEIGHT);
  for (int64_t m = 0; m < rows; ++m) {
    const int64_t row = t.x.first + g * HEIGHT + m;
    store(t.op.x_type, v + m * CHUNK, out.y, row * out.stride + at, t.call.residual,
          row * t.call.residual_stride + at, count);
  }
}

template <class A> inline void panel_linear(const Panels& t, Range range, float* sums) {
  alignas(64) float out[HEIGHT * CHUNK];
  int64_t first = 0;
  for (int64_t i = 0; i < t.op.segments; first += t.op.segment[i].rows, ++i) {
    const Segment& s = t.op.segment[i];
    const int64_t end = smaller(range.end - first, s.rows);
    for (int64_t at = range.begin > first ? range.begin - first : 0; at < end; at += WIDTH) {
      const int64_t count = smaller(WIDTH, end - at);
      panel_products<A>(t, s, at, count, &s, at + count, sums);
      for (int64_t g = 0; g < panels(t.x.rows); ++g) {
        panel_rows(t, s, at, count, g, sums, out);
        store_panel(t, t.call.out[i], at, count, g, out);
      }
    }
  }
}

template <class A> inline void panel_glu(const Panels& t, Range range, float* sums) {
  alignas(64) float gate[HEIGHT * CHUNK], up[HEIGHT * CHUNK];
  float* others = sums + panels(t.x.rows) * WIDTH * HEIGHT;
  const Segment *a = t.op.segment, *b = a + 1;
  for (int64_t at = range.begin; at < range.end; at += WIDTH) {
    const int64_t count = smaller(WIDTH, range.end - at);
    panel_products<A>(t, *a, at, count, b, at, sums);
    panel_products<A>(t, *b, at, count, a, at + count, others);
    for (int64_t g = 0; g < panels(t.x.rows); ++g) {
      panel_rows(t, *a, at, count, g, sums, gate);
      panel_rows(t, *b, at, count, g, others, up);
      for (int64_t m = 0; m < smaller(HEIGHT, t.x.rows - g * HEIGHT); ++m)
        glu_row(t.op.act, gate + m * CHUNK, up + m * CHUNK, count);
      store_panel(t, t.call.out[0], at, count, g, gate);
    }
  }
}

// What is left of the output columns, piece by piece; `packed` is what pack_panels made of x.
template <class A>
int32_t panel_part(const Op& op, const Call& call, const Packed& packed, int64_t, WorkQueue& queue,
                   int64_t part) {
  Range range;
  if (!queue.take(part, range)) return OK;
  const int64_t sums = panels(packed.rows) * WIDTH * HEIGHT;
  float* space = workspace(WIDTH * ROW + (op.act ? 2 : 1) * sums);
  if (!space) return NO_MEMORY;
  const Panels t{op, call, packed, space};
  do {
    if (op.act) panel_glu<A>(t, range, space + WIDTH * ROW);
    else panel_linear<A>(t, range, space + WIDTH * ROW);
  } while (queue.take(part, range));
  return OK;
}

// More rows would leave no room for their sums in the second cache.
int64_t panel_rows_at_once(const Op&) { return 512; }

template <class A>
constexpr PackedTable panel_table(int64_t least) {
  return {pack_panels<A>, panel_part<A>, panel_bytes<A>, panel_rows_at_once, WIDTH, least};
}

}  // namespace
