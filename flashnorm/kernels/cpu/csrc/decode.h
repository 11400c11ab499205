// Packed weights as float32, row by row: the meaning of every format, and what several rows of x, the
// portable kernels and panels multiply. (Source of the blocks of GGUF: ggml's layouts.)
#pragma once
#include "formats.h"
#include "prepare.h"

namespace {

using Byte = unsigned char;

inline float half_at(const Byte* p) {
  Fp16 h;
  memcpy(&h, p, sizeof h);
  return widen(h);
}

inline float number_at(const void* data, int32_t type, int64_t at) {
  if (type == SIGNED8) return static_cast<const signed char*>(data)[at];
  if (type == UNSIGNED8) return static_cast<const Byte*>(data)[at];
  return number(data, type, at);
}
inline float grid_at(const Grid& grid, int32_t type, int64_t row, int64_t group) {
  return number_at(grid.data, type, row * grid.row + group * grid.group);
}

// (q − zero) · scale + offset over one group.
struct GroupScale { float zero, scale, offset; };

inline GroupScale group_of(const Op& op, const Segment& s, int64_t row, int64_t group, float zero) {
  return {s.zeros.data ? grid_at(s.zeros, op.zero_type, row, group) : zero,
          s.scales.data ? grid_at(s.scales, op.scale_type, row, group) : 1.0f,
          s.offsets.data ? grid_at(s.offsets, op.offset_type, row, group) : 0.0f};
}

inline void apply(const GroupScale& a, int64_t count, float* out) {
  for (int64_t i = 0; i < count; ++i) out[i] = (out[i] - a.zero) * a.scale + a.offset;
}

// Exact: an e4m3 number is a float16 with another bias, 2^-8 of it; 0x7f is its only NaN.
inline float fp8(Byte b) {
  const uint32_t sign = static_cast<uint32_t>(b & 0x80) << 24, rest = b & 0x7fu;
  const float size = from_bits(rest << 20) * from_bits(0x7b800000u);  // 2^120
  return from_bits(sign | (rest == 0x7f ? 0x7fc00000u : to_bits(size)));
}

// Levels from..to of one row, not yet scaled.
inline void levels(const Op& op, const Segment& s, int64_t row, int64_t from, int64_t to,
                   float* out) {
  const Byte* p = static_cast<const Byte*>(s.weight);
  const uint32_t* words = static_cast<const uint32_t*>(s.weight);
  switch (op.weight_type) {
    case INT8:
      p += row * s.stride;
      for (int64_t i = from; i < to; ++i) out[i - from] = static_cast<signed char>(p[i]);
      return;
    case FP8:
      p += row * s.stride;
      for (int64_t i = from; i < to; ++i) out[i - from] = fp8(p[i]);
      return;
    case INT4:
      p += row * s.stride;
      for (int64_t i = from; i < to; ++i)
        out[i - from] = static_cast<float>(p[i / 2] >> (i % 2 ? 4 : 0) & 15);
      return;
    case CODEBOOK4:
      p += row * s.stride;
      for (int64_t i = from; i < to; ++i)
        out[i - from] = s.table[p[i / 2] >> (i % 2 ? 0 : 4) & 15];
      return;
    case GPTQ4:
      for (int64_t i = from; i < to; ++i)
        out[i - from] = static_cast<float>(words[i / 8 * s.stride + row] >> i % 8 * 4 & 15);
      return;
    default: {  // AWQ4: outputs of a word are in the order 0, 2, 4, 6, 1, 3, 5, 7
      const int64_t at = row % 8, place = at % 2 * 4 + at / 2;
      for (int64_t i = from; i < to; ++i)
        out[i - from] = static_cast<float>(words[i * s.stride + row / 8] >> place * 4 & 15);
    }
  }
}

inline float zero_of(int32_t type) { return type == INT4 || has_columns(type) ? 8.0f : 0.0f; }

inline void decode_groups(const Op& op, const Segment& s, int64_t row, int64_t from, int64_t to,
                          float* out) {
  levels(op, s, row, from, to, out);
  for (int64_t i = from, end; i < to; i = end) {
    const int64_t group = i / op.group;
    end = smaller((group + 1) * op.group, to);
    apply(group_of(op, s, row, group, zero_of(op.weight_type)), end - i, out + (i - from));
  }
}

template <int32_t T> inline void decode_block(const Byte* p, float* out);

template <> inline void decode_block<Q8_0>(const Byte* p, float* out) {
  const float d = half_at(p);
  const signed char* q = reinterpret_cast<const signed char*>(p + 2);
  for (int i = 0; i < 32; ++i) out[i] = static_cast<float>(q[i]) * d;
}

// 16 bytes: the low halves of all, then the high ones.
template <> inline void decode_block<Q4_0>(const Byte* p, float* out) {
  const float d = half_at(p);
  for (int i = 0; i < 16; ++i) {
    out[i] = static_cast<float>((p[2 + i] & 15) - 8) * d;
    out[i + 16] = static_cast<float>((p[2 + i] >> 4) - 8) * d;
  }
}

template <> inline void decode_block<Q4_1>(const Byte* p, float* out) {
  const float d = half_at(p), m = half_at(p + 2);
  for (int i = 0; i < 16; ++i) {
    out[i] = static_cast<float>(p[4 + i] & 15) * d + m;
    out[i + 16] = static_cast<float>(p[4 + i] >> 4) * d + m;
  }
}

// A fifth bit for each feature, in four bytes.
inline void decode_fifths(const Byte* bits, const Byte* q, float zero, float d, float m, float* out) {
  uint32_t high;
  memcpy(&high, bits, sizeof high);
  for (int i = 0; i < 16; ++i) {
    const uint32_t low = (q[i] & 15u) | (high >> i & 1u) << 4;
    const uint32_t up = (q[i] >> 4) | (high >> (i + 16) & 1u) << 4;
    out[i] = (static_cast<float>(low) - zero) * d + m;
    out[i + 16] = (static_cast<float>(up) - zero) * d + m;
  }
}

template <> inline void decode_block<Q5_0>(const Byte* p, float* out) {
  decode_fifths(p + 2, p + 6, 16.0f, half_at(p), 0.0f, out);
}

template <> inline void decode_block<Q5_1>(const Byte* p, float* out) {
  decode_fifths(p + 4, p + 8, 0.0f, half_at(p), half_at(p + 2), out);
}

// Scale and minimum `i` of eight: six bits each, in 12 bytes.
inline void six_bits(const Byte* s, int i, Byte& scale, Byte& minimum) {
  if (i < 4) {
    scale = s[i] & 63, minimum = s[i + 4] & 63;
  } else {
    scale = static_cast<Byte>((s[i + 4] & 15) | (s[i - 4] >> 6) << 4);
    minimum = static_cast<Byte>((s[i + 4] >> 4) | (s[i] >> 6) << 4);
  }
}

// Q4_K, and with `fifths` Q5_K: 8 times 32 features, of each 32 bytes the low halves first.
inline void decode_eighths(const Byte* p, const Byte* fifths, const Byte* q, float* out) {
  const float d = half_at(p), least = half_at(p + 2);
  for (int part = 0; part < 8; ++part) {
    Byte scale, minimum;
    six_bits(p + 4, part, scale, minimum);
    const float by = d * scale, less = least * minimum;
    const Byte* bytes = q + part / 2 * 32;
    for (int i = 0; i < 32; ++i) {
      const int low = bytes[i] >> (part % 2 * 4) & 15, high = fifths ? fifths[i] >> part & 1 : 0;
      out[part * 32 + i] = static_cast<float>(low | high << 4) * by - less;
    }
  }
}

template <> inline void decode_block<Q4_K>(const Byte* p, float* out) {
  decode_eighths(p, nullptr, p + 16, out);
}

template <> inline void decode_block<Q5_K>(const Byte* p, float* out) {
  decode_eighths(p, p + 16, p + 48, out);
}

// Four low bits, two high ones, and a scale of 8 bits for each 16 features.
template <> inline void decode_block<Q6_K>(const Byte* p, float* out) {
  const float d = half_at(p + 208);
  for (int part = 0; part < 8; ++part) {  // 32 features each
    const int side = part / 4, j = part % 4;
    const Byte *low = p + side * 64 + j % 2 * 32, *high = p + 128 + side * 32;
    const signed char* scales = reinterpret_cast<const signed char*>(p + 192 + part * 2);
    for (int i = 0; i < 32; ++i) {
      const int q = (low[i] >> (j / 2 * 4) & 15) | (high[i] >> (j * 2) & 3) << 4;
      out[part * 32 + i] = static_cast<float>(q - 32) * (d * static_cast<float>(scales[i / 16]));
    }
  }
}

template <int32_t T>
inline void decode_blocks(const Segment& s, int64_t row, int64_t from, int64_t to, float* out) {
  const BlockSize size = block_size(T);
  const Byte* p = static_cast<const Byte*>(s.weight) + row * s.stride;
  for (int64_t b = from / size.features; b < to / size.features; ++b, out += size.features)
    decode_block<T>(p + b * size.bytes, out);
}

// Features from..to of one row, which are cut at multiples of CUT or at n.
inline void decode(const Op& op, const Segment& s, int64_t row, int64_t from, int64_t to,
                   float* out) {
  switch (op.weight_type) {
    case Q8_0: return decode_blocks<Q8_0>(s, row, from, to, out);
    case Q4_0: return decode_blocks<Q4_0>(s, row, from, to, out);
    case Q4_1: return decode_blocks<Q4_1>(s, row, from, to, out);
    case Q5_0: return decode_blocks<Q5_0>(s, row, from, to, out);
    case Q5_1: return decode_blocks<Q5_1>(s, row, from, to, out);
    case Q4_K: return decode_blocks<Q4_K>(s, row, from, to, out);
    case Q5_K: return decode_blocks<Q5_K>(s, row, from, to, out);
    case Q6_K: return decode_blocks<Q6_K>(s, row, from, to, out);
    default: return decode_groups(op, s, row, from, to, out);
  }
}

}  // namespace
