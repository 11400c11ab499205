// What Python hands over: plain numbers and pointers, in the order in which cpu/abi.py packs them.
#pragma once
#include <stdint.h>

#define FLASHNORM_ABI 1

enum Dtype : int32_t { FLOAT32 = 0, BFLOAT16 = 1, FLOAT16 = 2 };
enum Norm : int32_t { NORM_NONE = 0, NORM_RMS = 1, NORM_LAYER = 2, NORM_DYT = 3 };
enum Act : int32_t {
  ACT_NONE = 0,  // one product; the others are GLU: act(gate) * up
  ACT_IDENTITY = 1,
  ACT_RELU = 2,
  ACT_SILU = 3,
  ACT_GELU = 4,
  ACT_GELU_TANH = 5,
};
enum Status : int32_t { OK = 0, NO_MEMORY = 1 };

// weight: [rows, n], its rows `stride` elements apart; bias: [rows] or null.
struct Segment {
  const void* weight;
  const void* bias;
  int64_t rows, stride;
};

// What stays the same from call to call. gain, shift: [n] or null; alpha: one number or null.
struct Op {
  int32_t norm, act;
  int32_t x_type, weight_type, bias_type, gain_type, shift_type, alpha_type;
  int64_t n;
  double eps, offset;
  const void *gain, *shift, *alpha;
  int64_t segments;
  Segment segment[1];  // as many as `segments` says; exactly gate and up where act is a GLU
};

struct Output {
  void* y;
  int64_t stride;
};

// x: [rows, n]; one y per segment, [rows, its rows]; with a GLU or a residual there is one y. All are
// of x_type, strides in elements, last axis dense.
struct Call {
  const void* x;
  const void* residual;
  int64_t rows, x_stride, residual_stride, threads;
  Output out[1];  // as many as there are results
};

// y = act(gate) * up [+ residual] over the results of a library's matmul: [rows, width] each.
struct Glu {
  int32_t act, type;
  const void *gate, *up;
  void* y;  // may be gate or up
  const void* residual;
  int64_t rows, width, gate_stride, up_stride, y_stride, residual_stride, threads;
};
