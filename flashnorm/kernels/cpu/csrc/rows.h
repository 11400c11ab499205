// Many rows: the product is a library's, what stands before and after it is one pass each.
#pragma once
#include "run.h"

namespace {

// y = normalized x in x's dtype, rows [begin, end).
int32_t normalize_part(const Op& op, const Call& call, int64_t part, int64_t parts) {
  const int64_t begin = call.rows * part / parts, end = call.rows * (part + 1) / parts;
  const int64_t width = padded(op.n);
  float* space = workspace(3 * width);
  if (!space) return NO_MEMORY;
  const Affine gains = affine(op, space);
  float* row = space + 2 * width;
  for (int64_t m = begin; m < end; ++m) {
    const float scale = prepare_row(op, gains, call.x, m * call.x_stride, row).factor;
    scale_bias(row, scale, nullptr, op.n);
    store(op.x_type, row, call.out[0].y, m * call.out[0].stride, nullptr, 0, op.n);
  }
  return OK;
}

int32_t glu_part(const Glu& g, int64_t part, int64_t parts) {
  const int64_t begin = g.rows * part / parts, end = g.rows * (part + 1) / parts;
  float* gate = workspace(2 * padded(g.width));
  if (!gate) return NO_MEMORY;
  float* up = gate + padded(g.width);
  for (int64_t m = begin; m < end; ++m) {
    copy_numbers(offset(g.gate, g.type, m * g.gate_stride), g.type, g.width, gate);
    copy_numbers(offset(g.up, g.type, m * g.up_stride), g.type, g.width, up);
    glu_row(g.act, gate, up, g.width);
    store(g.type, gate, g.y, m * g.y_stride, g.residual, m * g.residual_stride, g.width);
  }
  return OK;
}

// Reads `bytes` once, as the products do: the speed of memory that they are measured against.
float read_part(const char* p, int64_t bytes, int64_t ahead, int64_t part, int64_t parts) {
  const int64_t lines = bytes / 64;
  const int64_t begin = lines * part / parts * 64, end = lines * (part + 1) / parts * 64;
  constexpr int64_t each = Vec::lanes * sizeof(float), streams = 64 / each;
  Vec sum[streams];
  for (int64_t s = 0; s < streams; ++s) sum[s] = Vec::set(0);
  for (int64_t i = begin; i < end; i += 64) {
    prefetch(p + i + ahead);
    for (int64_t s = 0; s < streams; ++s)
      sum[s] = sum[s] + Vec::load(reinterpret_cast<const float*>(p + i + s * each));
  }
  for (int64_t s = 1; s < streams; ++s) sum[0] = sum[0] + sum[s];
  return sum[0].sum();
}

}  // namespace
