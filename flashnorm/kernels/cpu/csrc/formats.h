// What takes how many bytes in a packed weight.
#pragma once
#include "api.h"

namespace {

inline bool is_packed(int32_t type) { return type >= INT8; }
inline bool is_packed(const Op& op) { return is_packed(op.weight_type); }

// Whether words of a packed weight lie as [in, out]: neighbours in memory are other outputs.
inline bool has_columns(int32_t type) { return type == GPTQ4 || type == AWQ4; }

struct BlockSize { int64_t features, bytes; };

// What a packed row is made of.
inline BlockSize block_size(int32_t type) {
  switch (type) {
    case INT4: case CODEBOOK4: case GPTQ4: case AWQ4: return {2, 1};
    case Q8_0: return {32, 34};
    case Q4_0: return {32, 18};
    case Q4_1: return {32, 20};
    case Q5_0: return {32, 22};
    case Q5_1: return {32, 24};
    case Q4_K: return {256, 144};
    case Q5_K: return {256, 176};
    case Q6_K: return {256, 210};
    default: return {1, 1};
  }
}

// Bytes of one number of a dense weight; packed ones are counted in bytes.
inline int64_t size_of(int32_t type) { return type == FLOAT32 ? 4 : is_packed(type) ? 1 : 2; }

// Bytes that n features of a row take.
inline int64_t bytes_of(int32_t type, int64_t n) {
  if (!is_packed(type)) return n * size_of(type);
  const BlockSize block = block_size(type);
  return (n + block.features - 1) / block.features * block.bytes;
}

inline int64_t row_bytes(const Op& op) { return bytes_of(op.weight_type, op.n); }

// Whether values [rows, columns] of so many bytes or words, a row `stride` apart, hold `outputs` rows.
inline bool fits(const Op& op, int64_t rows, int64_t columns, int64_t stride, int64_t outputs) {
  const int32_t type = op.weight_type;
  if (type == GPTQ4) return rows >= (op.n + 7) / 8 && columns >= outputs && stride >= columns;
  if (type == AWQ4) return rows >= op.n && columns >= (outputs + 7) / 8 && stride >= columns;
  return op.n % block_size(type).features < 2 && rows >= outputs && columns >= row_bytes(op) &&
         (outputs < 2 || stride >= row_bytes(op));
}

// Rows may be cut between multiples of so many features.
constexpr int64_t CUT = 256;

}  // namespace
