// What Python hands over: plain numbers and pointers, in the order in which calls.py packs them.
#pragma once
#include <stdint.h>

#define FLASHNORM_ABI 9
#ifdef _WIN32
#define EXPORT extern "C" __declspec(dllexport)
#else
#define EXPORT extern "C" __attribute__((visibility("default")))
#endif

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
constexpr int32_t BOOLEAN = 3;  // of a mask, beside the types above
constexpr int32_t SIGNED8 = 4, UNSIGNED8 = 5;  // of zeros, beside the types above
// What a weight may be instead of a dense one: kernels/formats, where each is described.
enum Format : int32_t {
  INT8 = 16,
  FP8 = 17,
  INT4 = 18,
  CODEBOOK4 = 19,
  GPTQ4 = 20,
  AWQ4 = 21,
  Q8_0 = 32,
  Q4_0 = 33,
  Q4_1 = 34,
  Q5_0 = 35,
  Q5_1 = 36,
  Q4_K = 37,
  Q5_K = 38,
  Q6_K = 39,
};
enum Status : int32_t { OK = 0, NO_MEMORY = 1 };

// Numbers for groups of features of a packed weight, [rows, groups], `row` and `group` apart in
// elements, or null.
struct Grid {
  const void* data;
  int64_t row, group;
};

// weight: [rows, n], its rows `stride` elements apart and the features of a row `step`, of which one
// is 1: a weight held as [in, out] is read as it lies. Of a packed one `stride` is in bytes, of
// words [in, out] in words, and step is 1; table: 16 numbers of CODEBOOK4. bias: [rows] or null.
struct Segment {
  const void* weight;
  const void* bias;
  int64_t rows, stride, step;
  Grid scales, zeros, offsets;
  const float* table;
};

// What stays the same from call to call. weight_type is a Dtype or a Format. gain, shift: [n] or
// null; alpha: one number or null; group: features that share a scale, n where all of a row do.
struct Op {
  int32_t norm, act;
  int32_t x_type, weight_type, bias_type, gain_type, shift_type, alpha_type;
  int32_t scale_type, zero_type, offset_type, unused;
  int64_t n, group;
  double eps, offset;
  const void *gain, *shift, *alpha;
  int64_t segments;  // all of one layout
  Segment segment[1];  // as many as `segments` says; exactly gate and up where act is a GLU
};

// Whether the weights are held as [in, out].
static inline bool turned(const Op& op) { return op.segments && op.segment[0].step != 1; }

struct Output {
  void* y;
  int64_t stride;
};

// x: [rows, n]; one y per segment, [rows, its rows]; with a GLU or a residual there is one y. All are
// of x_type, strides in elements, last axis dense. z: [rows, n], dense, for the normalized rows, or
// null where nobody wants them.
struct Call {
  const void* x;
  const void* residual;
  void* z;
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

// Attention of one query per sequence. q: [batch, heads, width]; k: [batch, kv_heads, length, width];
// v: [batch, kv_heads, length, value_width]; out: [batch, heads, value_width], dense. All are of
// `type`, strides in elements, last axes dense. heads is a multiple of kv_heads.
struct Attend {
  int32_t type;
  int32_t mask_type;  // BOOLEAN bytes, where 0 hides, or `type`, which is added to the scores
  const void *q, *k, *v;
  const void* mask;  // [batch, length], or null
  void* out;
  int64_t batch, heads, kv_heads, length, width, value_width;
  int64_t q_batch, q_head, k_batch, k_head, k_row, v_batch, v_head, v_row, mask_batch, mask_step;
  double scale;
  int64_t threads;
};

EXPORT int32_t flashnorm_run(const Op* op, const Call* call);
EXPORT int32_t flashnorm_attend(const Attend* attend);
