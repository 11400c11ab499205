// Attention of one query per sequence: out = Σ_t softmax_t(scale · q·k_t + mask_t) v_t.
// Every row of k and of v is read once for all heads that share it; all sums are in float32.
#pragma once
#include "run.h"

namespace {

constexpr int KEYS = 4;        // rows of k side by side
constexpr int64_t VALUES = 64;  // rows of v that stay in the nearest cache between heads
constexpr int VECTORS = 4;     // vectors of a row of v side by side

// `count` rows of k or v of one kv head, `stride` elements apart; `ahead` rows are prefetched, up to
// `last`: behind these rows the next piece begins.
template <class T> struct Rows {
  const T* first;
  int64_t stride, width, count, last, ahead;

  inline const T* row(int64_t t) const { return first + t * stride; }
  inline void fetch(int64_t t) const {
    if (t + ahead >= last) return;
    const char* p = reinterpret_cast<const char*>(row(t + ahead));
    for (int64_t b = 0; b < width * static_cast<int64_t>(sizeof(T)); b += 64) prefetch(p + b);
  }
};

// The vector at p, or the `left` elements that are there and zeros behind them.
template <class T> inline Vec load_some(const T* p, int64_t left) {
  if (left >= Vec::lanes) return Vec::load(p);
  alignas(64) T rest[Vec::lanes] = {};
  for (int64_t i = 0; i < left; ++i) rest[i] = p[i];
  return Vec::load(rest);
}

// scores[r][c] = q_r · k_(t + c) for C rows of k and R heads; q is padded with zeros. Rows of whole
// vectors have no TAIL, for which sums would have to leave their registers.
template <class T, int C, int R, bool TAIL>
inline void score_tile(const Rows<T>& k, int64_t t, const float* q, float* scores, int64_t apart) {
  Vec sum[R][C];
  for (int r = 0; r < R; ++r)
    for (int c = 0; c < C; ++c) sum[r][c] = Vec::set(0);
  for (int64_t i = 0; i < k.width; i += Vec::lanes) {
    Vec key[C];
    for (int c = 0; c < C; ++c) {
      const T* p = k.row(t + c) + i;
      key[c] = TAIL ? load_some(p, k.width - i) : Vec::load(p);
    }
    for (int r = 0; r < R; ++r) {
      const Vec query = Vec::load(q + r * padded(k.width) + i);
      for (int c = 0; c < C; ++c) sum[r][c] = fma(query, key[c], sum[r][c]);
    }
  }
  for (int r = 0; r < R; ++r) {
    if constexpr (C == KEYS) Vec::sums(sum[r], scores + r * apart);
    else for (int c = 0; c < C; ++c) scores[r * apart + c] = sum[r][c].sum();
  }
}

// out[r] += Σ_t weights[r][t] v_t over rows [begin, end) and C vectors of them, from element i.
template <class T, int C, int R>
inline void mix_tile(const Rows<T>& v, int64_t begin, int64_t end, int64_t i, const float* weights,
                     int64_t apart, float* out) {
  const int64_t width = padded(v.width), left = v.width - i;
  Vec sum[R][C];
  for (int r = 0; r < R; ++r)
    for (int c = 0; c < C; ++c) sum[r][c] = Vec::load(out + r * width + i + c * Vec::lanes);
  for (int64_t t = begin; t < end; ++t) {
    Vec value[C];
    for (int c = 0; c < C; ++c)
      value[c] = C > 1 ? Vec::load(v.row(t) + i + c * Vec::lanes) : load_some(v.row(t) + i, left);
    for (int r = 0; r < R; ++r) {
      const Vec weight = Vec::set(weights[r * apart + t]);
      for (int c = 0; c < C; ++c) sum[r][c] = fma(weight, value[c], sum[r][c]);
    }
  }
  for (int r = 0; r < R; ++r)
    for (int c = 0; c < C; ++c) sum[r][c].store(out + r * width + i + c * Vec::lanes);
}

template <class T, int R> struct Heads {
  static constexpr int count = R;
  static inline void score(const Rows<T>& k, int64_t t, const float* q, float* scores,
                           int64_t apart) {
    if (t + KEYS > k.count)
      for (; t < k.count; ++t) score_tile<T, 1, R, true>(k, t, q, scores + t, apart);
    else if (k.width % Vec::lanes) score_tile<T, KEYS, R, true>(k, t, q, scores + t, apart);
    else score_tile<T, KEYS, R, false>(k, t, q, scores + t, apart);
  }
  static inline void mix(const Rows<T>& v, int64_t begin, int64_t end, const float* weights,
                         int64_t apart, float* out) {
    int64_t i = 0;
    for (; i + VECTORS * Vec::lanes <= v.width; i += VECTORS * Vec::lanes)
      mix_tile<T, VECTORS, R>(v, begin, end, i, weights, apart, out);
    for (; i < v.width; i += Vec::lanes) mix_tile<T, 1, R>(v, begin, end, i, weights, apart, out);
  }
};

// act(Heads, first head) for `heads` heads, as many at a time as the registers hold.
template <class T, class Act> inline void some_heads(int64_t heads, Act act) {
  int64_t h = 0;
  if constexpr (Vec::max_rows >= 4) {
    for (; h + 4 <= heads; h += 4) act(Heads<T, 4>(), h);
    if (h + 3 == heads) return act(Heads<T, 3>(), h);
  }
  for (; h + 2 <= heads; h += 2) act(Heads<T, 2>(), h);
  if (h < heads) act(Heads<T, 1>(), h);
}

inline float larger(float a, float b) { return a > b ? a : b; }

// The largest of the numbers in s [padded]: what is no number spoils the sum later.
inline float largest(const float* s, int64_t end) {
  float top[PAD];
  for (int64_t i = 0; i < PAD; ++i) top[i] = -INFINITY;
  for (int64_t t = 0; t < end; t += PAD)
    for (int64_t i = 0; i < PAD; ++i) top[i] = larger(s[t + i], top[i]);
  for (int64_t half = PAD / 2; half > 0; half /= 2)
    for (int64_t i = 0; i < half; ++i) top[i] = larger(top[i], top[i + half]);
  return top[0];
}

// s = exp(s + mask − max); returns max and their sum. Both are padded; what is behind `count` becomes zero.
struct Sum { float most, total; };
inline Sum exp_and_sum(float* s, const float* mask, int64_t count) {
  const int64_t end = padded(count);
  if (mask)
    for (int64_t t = 0; t < end; ++t) s[t] += mask[t];
  for (int64_t t = count; t < end; ++t) s[t] = -INFINITY;
  const float top = largest(s, end), most = top == -INFINITY ? 0.0f : top;
  for (int64_t t = 0; t < end; ++t) s[t] = exp_(s[t] - most);
  Vec sum = Vec::set(0);
  for (int64_t t = 0; t < end; t += Vec::lanes) sum = sum + Vec::load(s + t);
  return {top, sum.sum()};
}

// What is added to the scores of sequence b: [length] as float32, padded.
inline void copy_mask(const Attend& a, int64_t b, float* out) {
  const int64_t length = a.length, step = a.mask_step;
  if (a.mask_type == BOOLEAN) {
    const uint8_t* mask = static_cast<const uint8_t*>(a.mask) + b * a.mask_batch;
    for (int64_t t = 0; t < length; ++t) out[t] = mask[t * step] ? 0.0f : -INFINITY;
  } else if (step == 1) {
    copy_numbers(offset(a.mask, a.type, b * a.mask_batch), a.type, length, out);
  } else {
    for (int64_t t = 0; t < length; ++t) out[t] = number(a.mask, a.type, b * a.mask_batch + t * step);
  }
}

inline bool hidden(const float* mask, int64_t count) {
  int32_t seen = 0;
  for (int64_t i = 0; i < count; ++i) seen |= mask[i] != -INFINITY;
  return !seen;
}

// The rows from the first to the last that the mask shows: padding and an empty cache are not read.
inline Range shown(const float* mask, int64_t length) {
  Range rows{0, length};
  while (rows.end - rows.begin >= PAD && hidden(mask + rows.begin, PAD)) rows.begin += PAD;
  while (rows.begin < rows.end && hidden(mask + rows.begin, 1)) ++rows.begin;
  while (rows.end - rows.begin >= PAD && hidden(mask + rows.end - PAD, PAD)) rows.end -= PAD;
  while (rows.begin < rows.end && hidden(mask + rows.end - 1, 1)) --rows.end;
  return rows;
}

// Where a thread keeps the mask of a sequence, and q, scores and sums of the heads of a group.
struct Buffers {
  int64_t heads, apart;  // scores of two heads are so far apart
  float *mask, *q, *scores, *out, *most, *total;
};

inline int64_t buffer_floats(const Attend& a, int64_t most) {
  const int64_t heads = a.heads / a.kv_heads, apart = padded(most);
  return padded(a.length) + PAD + heads * (padded(a.width) + apart + padded(a.value_width) + 2);
}

inline Buffers buffers(const Attend& a, int64_t most, float* space) {
  const int64_t heads = a.heads / a.kv_heads, apart = padded(most);
  float* q = space + padded(a.length) + PAD;
  float* scores = q + heads * padded(a.width);
  float* out = scores + heads * apart;
  float* largest = out + heads * padded(a.value_width);
  return {heads, apart, space, q, scores, out, largest, largest + heads};
}

template <class T>
inline Rows<T> rows(const void* p, int64_t at, int64_t stride, int64_t width, Range range,
                    int64_t last, int64_t ahead) {
  const int64_t bytes = width * static_cast<int64_t>(sizeof(T));
  return {static_cast<const T*>(p) + at + range.begin * stride, stride, width,
          range.end - range.begin, last - range.begin, ahead / bytes + 1};
}

// q · scale of the heads that share kv head g of sequence b.
template <class T>
inline void copy_queries(const Attend& a, const Buffers& buf, int64_t b, int64_t g) {
  const int64_t width = padded(a.width);
  const T* q = static_cast<const T*>(a.q) + b * a.q_batch + g * buf.heads * a.q_head;
  for (int64_t h = 0; h < buf.heads; ++h) copy_row(q + h * a.q_head, a.width, buf.q + h * width);
  const float scale = static_cast<float>(a.scale);
  for (int64_t i = 0; i < buf.heads * width; ++i) buf.q[i] *= scale;
}

template <class T> inline void score(const Rows<T>& k, const Buffers& buf) {
  for (int64_t t = 0; t < k.count; t += KEYS) {
    for (int64_t c = t; c < smaller(t + KEYS, k.count); ++c) k.fetch(c);
    some_heads<T>(buf.heads, [&](auto some, int64_t h) {
      some.score(k, t, buf.q + h * padded(k.width), buf.scores + h * buf.apart, buf.apart);
    });
  }
}

template <class T> inline void mix(const Rows<T>& v, const Buffers& buf) {
  const int64_t width = padded(v.width);
  for (int64_t i = 0; i < buf.heads * width; ++i) buf.out[i] = 0.0f;
  for (int64_t t = 0; t < v.count; t += VALUES) {
    const int64_t end = smaller(t + VALUES, v.count);
    for (int64_t c = t; c < end; ++c) v.fetch(c);
    some_heads<T>(buf.heads, [&](auto some, int64_t h) {
      some.mix(v, t, end, buf.scores + h * buf.apart, buf.apart, buf.out + h * width);
    });
  }
}

// out = Σ_t exp(score − most) v_t, most and total of the heads that share kv head g of sequence b, over
// `range` of the rows of k and v, behind which there are more up to `last`.
template <class T>
inline void attend_rows(const Attend& a, const Buffers& buf, int64_t b, int64_t g, Range range,
                        int64_t last, int64_t ahead) {
  const int64_t first_k = b * a.k_batch + g * a.k_head, first_v = b * a.v_batch + g * a.v_head;
  const auto k = rows<T>(a.k, first_k, a.k_row, a.width, range, last, ahead);
  const auto v = rows<T>(a.v, first_v, a.v_row, a.value_width, range, last, ahead);
  copy_queries<T>(a, buf, b, g);
  score(k, buf);
  for (int64_t h = 0; h < buf.heads; ++h) {
    const float* mask = a.mask ? buf.mask + range.begin : nullptr;
    const Sum sum = exp_and_sum(buf.scores + h * buf.apart, mask, k.count);
    buf.most[h] = sum.most;
    buf.total[h] = sum.total;
  }
  mix(v, buf);
}

inline void attend_rows(const Attend& a, const Buffers& buf, int64_t b, int64_t g, Range range,
                        int64_t last, int64_t ahead) {
  if (a.type == FLOAT32) attend_rows<float>(a, buf, b, g, range, last, ahead);
  else if (a.type == BFLOAT16) attend_rows<Bf16>(a, buf, b, g, range, last, ahead);
  else attend_rows<Fp16>(a, buf, b, g, range, last, ahead);
}

// Without a row to see, or where each score is −infinity, the result is zero.
inline void store_group(const Attend& a, const Buffers& buf, int64_t group) {
  for (int64_t h = 0; h < buf.heads; ++h) {
    float* row = buf.out + h * padded(a.value_width);
    scale_bias(row, buf.total[h] == 0.0f ? 0.0f : 1.0f / buf.total[h], nullptr, a.value_width);
    const int64_t at = (group * buf.heads + h) * a.value_width;
    store(a.type, row, a.out, at, nullptr, 0, a.value_width);
  }
}

// What a piece found, as [heads][value_width + 2].
inline void keep(const Attend& a, const Buffers& buf, float* found) {
  for (int64_t h = 0; h < buf.heads; ++h, found += a.value_width + 2) {
    const float* row = buf.out + h * padded(a.value_width);
    for (int64_t i = 0; i < a.value_width; ++i) found[i] = row[i];
    found[a.value_width] = buf.most[h];
    found[a.value_width + 1] = buf.total[h];
  }
}

// Of all pieces of a group, in their order: each is scaled from its largest score to that of all.
inline void join(const Attend& a, const Pieces& p, const Buffers& buf, int64_t group) {
  const int64_t width = a.value_width, step = p.floats;
  for (int64_t h = 0; h < buf.heads; ++h) {
    const float* first = p.found + group * p.each * step + h * (width + 2);
    float* row = buf.out + h * padded(width);
    for (int64_t i = 0; i < padded(width); ++i) row[i] = 0.0f;
    float top = -INFINITY, total = 0.0f;
    for (int64_t c = 0; c < p.each; ++c) top = larger(first[c * step + width], top);
    for (int64_t c = 0; c < p.each; ++c) {
      const float* one = first + c * step;
      const float scale = exp_(one[width] - (top == -INFINITY ? 0.0f : top));
      for (int64_t i = 0; i < width; ++i) row[i] += one[i] * scale;
      total += one[width + 1] * scale;
    }
    buf.total[h] = total;
  }
}

// Pieces of groups of heads, until all are taken.
int32_t attend_part(const Attend& a, Pieces& p, int64_t ahead) {
  int64_t i = p.next.fetch_add(1, std::memory_order_relaxed);
  if (i >= p.count) return OK;
  const int64_t most = smaller(p.rows, a.length);
  float* space = workspace(buffer_floats(a, most));
  if (!space) return NO_MEMORY;
  const Buffers buf = buffers(a, most, space);
  Range seen{0, a.length};
  for (int64_t masked = -1; i < p.count; i = p.next.fetch_add(1, std::memory_order_relaxed)) {
    const int64_t group = i / p.each, b = group / a.kv_heads, g = group % a.kv_heads;
    if (a.mask && (masked < 0 || (masked != b && a.mask_batch))) {
      copy_mask(a, b, buf.mask);
      seen = shown(buf.mask, a.length);
      masked = b;
    }
    const int64_t from = i % p.each * p.rows;
    Range range{from > seen.begin ? from : seen.begin, smaller(from + p.rows, seen.end)};
    if (range.begin > range.end) range.begin = range.end;
    attend_rows(a, buf, b, g, range, seen.end, ahead);
    if (p.each > 1) {
      keep(a, buf, p.found + i * p.floats);
      // Whoever does the last piece of a group sees what the others have left.
      if (p.left[group].fetch_sub(1, std::memory_order_acq_rel) > 1) continue;
      join(a, p, buf, group);
    }
    store_group(a, buf, group);
  }
  return OK;
}

}  // namespace
