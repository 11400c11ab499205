// The kernels of one instruction set against sums in float64, without Python and torch, so that they
// run under an emulator of another processor: `tests/kernels/neon.py` compiles and runs it.
//
//     alone ISA
//
// The bounds are those of bounds.py and test_attention.py, whose constants are given on compiling.
#include "guarded.h"

#include <vector>

extern "C" {
const char* flashnorm_isa(int32_t);
int32_t flashnorm_isa_supported(int32_t);
void flashnorm_choose_isa(int32_t);
int32_t flashnorm_normalize(const Op*, const Call*);
int32_t flashnorm_glu(const Glu*);
int32_t flashnorm_read(const char*, int64_t, int64_t);
}

namespace {

using Row = std::vector<double>;

constexpr int32_t TYPES[] = {FLOAT32, BFLOAT16, FLOAT16};
constexpr int32_t NORMS[] = {NORM_NONE, NORM_RMS, NORM_LAYER, NORM_DYT};
constexpr double EPS = 1e-5;
std::mt19937 random_bits(1);
int64_t checked = 0;

bool chance() { return random_bits() & 1; }
uint32_t below(uint32_t n) { return random_bits() % n; }

void fail(const char* what, int64_t at, double found, double expected, double limit) {
  fprintf(stderr, "%s, element %lld: %.9g, expected %.9g within %.3g\n", what,
          static_cast<long long>(at), found, expected, limit);
  exit(1);
}

void near(const char* what, const Numbers& y, int64_t at, double expected, double limit) {
  ++checked;
  if (fabs(expected) + limit >= largest(y.type)) return;  // it may be infinite
  if (!(fabs(y[at] - expected) <= limit)) fail(what, at, y[at], expected, limit);
}

double activated(int32_t act, double x) {
  switch (act) {
    case ACT_RELU: return x > 0 ? x : 0;
    case ACT_SILU: return x / (1 + exp(-x));
    case ACT_GELU: return 0.5 * x * (1 + erf(x / sqrt(2.0)));
    case ACT_GELU_TANH: return 0.5 * x * (1 + tanh(sqrt(2 / M_PI) * (x + 0.044715 * x * x * x)));
    default: return x;
  }
}

// The parameters of one operation, each there or not.
struct Parameters {
  Numbers gain, shift, alpha;
  bool with_gain, with_shift;
  Parameters(int32_t type, int64_t n)
      : gain(type, n), shift(type, n), alpha(type, 1), with_gain(chance()), with_shift(chance()) {
    gain.fill(random_bits);
    shift.fill(random_bits);
    alpha.fill(random_bits, -2, -1);
  }
};

struct Normalized { Row z, size; };  // size: what errors are relative to

Normalized normalized(const Op& op, const Parameters& p, const Numbers& x, int64_t at) {
  const int64_t n = op.n;
  double mean = 0, squares = 0;
  for (int64_t i = 0; i < n; ++i) mean += op.norm == NORM_LAYER ? x[at + i] / n : 0;
  for (int64_t i = 0; i < n; ++i) squares += pow(x[at + i] - mean, 2) / n;
  Normalized found{Row(n), Row(n)};
  for (int64_t i = 0; i < n; ++i) {
    double z = x[at + i], gain = op.gain ? op.offset + p.gain[i] : 1;
    if (op.norm == NORM_DYT) z = tanh((op.alpha ? p.alpha[0] : 1.0) * z);
    else if (op.norm != NORM_NONE) z = (z - mean) / sqrt(squares + op.eps);
    const double shift = op.shift ? p.shift[i] : 0;
    found.z[i] = z * gain + shift;
    found.size[i] = fabs(found.z[i]) + (op.norm == NORM_LAYER ? fabs(gain) : 0) + fabs(shift);
  }
  return found;
}

double relative(int64_t n) {
  return (2 * CONFIDENCE * sqrt(static_cast<double>(n)) + STEPS) * unit_roundoff(FLOAT32);
}

// One rounding to `type` at the end, after `error` in a `value`.
double limit(int32_t type, double value, double error) {
  const double last = unit_roundoff(type), u = unit_roundoff(FLOAT32);
  return (1 + 2 * last) * error + (last + STEPS * u) * fabs(value) + smallest_normal(type) * 2 * last;
}

Op operation(int32_t norm, int32_t act, int32_t x, int32_t weight, int64_t n, const Parameters& p) {
  const int32_t own = p.gain.type;
  Op op{};
  op.norm = norm, op.act = act, op.x_type = x, op.weight_type = op.bias_type = weight;
  op.gain_type = op.shift_type = op.alpha_type = own;
  op.n = n, op.eps = EPS, op.offset = chance() ? 1.0 : 0.0;
  if (p.with_gain) op.gain = p.gain.data;
  if (p.with_shift) op.shift = p.shift.data;
  if (norm == NORM_DYT) op.alpha = p.alpha.data;
  return op;
}

struct Case { int32_t norm, act, x_type, weight_type; int64_t rows, n, columns; };

// Products of all rows with two weights: y of both, or of the GLU of both.
void products(const Case& c) {
  Parameters p(TYPES[below(3)], c.n);
  const int64_t stride = c.n + below(3), x_stride = c.n + below(3);
  const int64_t widths[2] = {c.columns, c.act ? c.columns : c.columns + 3};
  Numbers x(c.x_type, c.rows * x_stride), first(c.weight_type, widths[0] * stride);
  Numbers second(c.weight_type, widths[1] * stride), bias(c.weight_type, widths[1]);
  Numbers residual(c.x_type, c.rows * widths[0]), z(c.x_type, c.rows * c.n);
  Numbers y(c.x_type, c.rows * widths[0]), more(c.x_type, c.rows * widths[1]);
  for (Numbers* each : {&x, &first, &second, &bias, &residual}) each->fill(random_bits);
  const bool added = c.act && chance(), biased = chance();

  struct { Op op; Segment next; } op{operation(c.norm, c.act, c.x_type, c.weight_type, c.n, p), {}};
  op.op.segments = 2;
  op.op.segment[0] = {first.data, nullptr, widths[0], stride, 1};
  op.next = {second.data, biased ? bias.data : nullptr, widths[1], stride, 1};
  struct { Call call; Output next; } call{
      {x.data, added ? residual.data : nullptr, z.data, c.rows, x_stride, widths[0], 1,
       {{y.data, widths[0]}}}, {more.data, widths[1]}};
  if (flashnorm_run(&op.op, &call.call) != OK) abort();

  const double u = unit_roundoff(FLOAT32);
  for (int64_t m = 0; m < c.rows; ++m) {
    const Normalized row = normalized(op.op, p, x, m * x_stride);
    for (int64_t i = 0; i < c.n; ++i)
      near("norm", z, m * c.n + i, row.z[i], limit(c.x_type, row.z[i], relative(c.n) * row.size[i]));
    const auto product = [&](const Numbers& w, int64_t k, double add, double& error) {
      double sum = add, size = fabs(add);
      for (int64_t i = 0; i < c.n; ++i) {
        sum += row.z[i] * w[k * stride + i];
        size += row.size[i] * fabs(w[k * stride + i]);
      }
      error = relative(c.n) * size + c.n * ldexp(1.0, -149);
      return sum;
    };
    for (int64_t k = 0; k < widths[1]; ++k) {
      double a = 0, da = 0, db = 0;
      if (k < widths[0]) a = product(first, k, 0, da);
      const double b = product(second, k, biased ? bias[k] : 0, db);
      if (!c.act) {
        if (k < widths[0]) near("product", y, m * widths[0] + k, a, limit(c.x_type, a, da));
        near("second product", more, m * widths[1] + k, b, limit(c.x_type, b, db));
        continue;
      }
      const double gate = activated(c.act, a), add = added ? residual[m * widths[0] + k] : 0;
      const double moved = SLOPE * da * (fabs(b) + db) + fabs(gate) * db + STEPS * u * fabs(a * b);
      near("gate", y, m * widths[0] + k, gate * b + add, limit(c.x_type, gate * b + add, moved));
    }
  }
}

// Every number of a type passes through a vector unchanged, and as the end of a row too.
void every_number(int32_t type) {
  const int64_t n = 1 << 16, chunk = 1 << 10;
  Parameters p(type, 1);
  p.with_gain = p.with_shift = false;
  for (int64_t from = 0; from < n; from += chunk) {
    Numbers x(type, chunk + 1), y(type, chunk + 1);
    for (int64_t i = 0; i < chunk; ++i) x.put(i, static_cast<uint32_t>(from + i));
    x.put(chunk, static_cast<uint32_t>(from));
    const Op op = operation(NORM_NONE, ACT_NONE, type, type, chunk + 1, p);
    const Call call{x.data, nullptr, y.data, 1, chunk + 1, 0, 1, {}};
    if (flashnorm_normalize(&op, &call) != OK) abort();
    for (int64_t i = 0; i <= chunk; ++i, ++checked)
      if (!(y[i] == x[i] || (isnan(x[i]) && isnan(y[i])))) fail("number", i, y[i], x[i], 0);
  }
}

// Products of two 16-bit numbers are exact in float32, so that one rounding to nearest is left.
void rounding(int32_t type) {
  const int64_t rows = 40, width = 131;
  Numbers a(type, rows * width), b(type, rows * width), y(type, rows * width);
  const int low = type == FLOAT16 ? -12 : -60, high = type == FLOAT16 ? 9 : 60;
  a.fill(random_bits, low, high);
  b.fill(random_bits, low, high);
  const Glu glu{ACT_IDENTITY, type, a.data, b.data, y.data, nullptr, rows, width, width, width,
                width, 0, 1};
  if (flashnorm_glu(&glu) != OK) abort();
  for (int64_t i = 0; i < rows * width; ++i, ++checked) {
    const double expected = rounded(type, a[i] * b[i]);
    if (y[i] != expected) fail("rounding", i, y[i], expected, 0);
  }
}

struct Heads { int64_t batch, heads, kv_heads, length, width, value_width; };

void attention(int32_t type, const Heads& h, int mask_kind) {
  const int64_t groups = h.batch * h.kv_heads;
  Numbers q(type, h.batch * h.heads * h.width), k(type, groups * h.length * h.width);
  Numbers v(type, groups * h.length * h.value_width), mask(type, h.batch * h.length);
  Numbers out(type, h.batch * h.heads * h.value_width);
  for (Numbers* each : {&q, &k, &v, &mask}) each->fill(random_bits);
  std::vector<uint8_t> seen(static_cast<size_t>(h.batch * h.length));
  for (uint8_t& each : seen) each = below(3) > 0;
  for (int64_t b = 0; b < h.batch; ++b) seen[b * h.length + h.length / 2] = 1;
  const int32_t mask_type = mask_kind == 1 ? BOOLEAN : type;
  const void* given = mask_kind == 1 ? static_cast<void*>(seen.data()) : mask.data;
  const double scale = 1 / sqrt(static_cast<double>(h.width)), u = unit_roundoff(FLOAT32);
  const Attend call{type, mask_type, q.data, k.data, v.data, mask_kind ? given : nullptr, out.data,
                    h.batch, h.heads, h.kv_heads, h.length, h.width, h.value_width,
                    h.heads * h.width, h.width,
                    h.kv_heads * h.length * h.width, h.length * h.width, h.width,
                    h.kv_heads * h.length * h.value_width, h.length * h.value_width, h.value_width,
                    h.length, 1, scale, 1};
  if (flashnorm_attend(&call) != OK) abort();

  for (int64_t head = 0; head < h.batch * h.heads; ++head) {
    const int64_t b = head / h.heads, group = head / (h.heads / h.kv_heads);
    Row score(h.length), size(h.length), weight(h.length), moved(h.length);
    double top = -INFINITY, sum = 0, total = 0;
    for (int64_t t = 0; t < h.length; ++t) {
      for (int64_t i = 0; i < h.width; ++i) {
        const double one = scale * q[head * h.width + i] * k[(group * h.length + t) * h.width + i];
        score[t] += one;
        size[t] += fabs(one);
      }
      const int64_t at = b * h.length + t;
      if (mask_kind == 1 && !seen[at]) score[t] = -INFINITY;
      if (mask_kind == 2) score[t] += mask[at], size[t] += fabs(mask[at]);
      top = fmax(top, score[t]);
    }
    for (int64_t t = 0; t < h.length; ++t) sum += weight[t] = exp(score[t] - top);
    for (int64_t t = 0; t < h.length; ++t) {
      weight[t] /= sum;
      if (weight[t] > 0)
        moved[t] = weight[t] * expm1(u * (CONFIDENCE * sqrt(static_cast<double>(h.width)) * size[t] +
                                          STEPS * (size[t] + top - score[t]) + STEPS));
      total += moved[t];
    }
    for (int64_t i = 0; i < h.value_width; ++i) {
      double value = 0, error = 0;
      for (int64_t t = 0; t < h.length; ++t) {
        const double one = v[(group * h.length + t) * h.value_width + i];
        value += weight[t] * one;
        error += (moved[t] + (relative(h.length) + total) * weight[t]) * fabs(one);
      }
      near("attention", out, head * h.value_width + i, value,
           limit(type, value, (1 + 2 * total) * error));
    }
  }
}

void choose(const char* name) {
  int32_t i = 0;
  while (flashnorm_isa(i) && strcmp(flashnorm_isa(i), name)) ++i;
  if (!flashnorm_isa(i) || !flashnorm_isa_supported(i)) {
    fprintf(stderr, "there are no %s kernels here\n", name);
    exit(2);
  }
  flashnorm_choose_isa(i);
}

}  // namespace

int main(int count, char** given) {
  choose(count > 1 ? given[1] : "neon");
  const int64_t widths[] = {1, 3, 4, 31, 32, 33, 64, 100, 257}, rows[] = {1, 2, 3, 4, 5, 7, 16, 19};
  const int64_t columns[] = {1, 4, 6, 64, 67};
  for (int32_t x : TYPES)
    for (int32_t weight : TYPES)
      for (int32_t norm : NORMS)
        for (int64_t n : widths)
          for (const uint32_t act : {0u, 1 + below(5)})
            products({norm, static_cast<int32_t>(act), x, weight, rows[below(8)], n, columns[below(5)]});
  for (int32_t type : {BFLOAT16, FLOAT16}) every_number(type), rounding(type);
  const Heads shapes[] = {{1, 3, 3, 1, 64, 64}, {2, 6, 2, 17, 33, 7}, {1, 8, 1, 64, 1, 1},
                          {2, 5, 1, 100, 80, 96}, {1, 9, 3, 301, 64, 64}, {1, 4, 2, 1030, 66, 130}};
  for (int32_t type : TYPES)
    for (const Heads& shape : shapes)
      for (int mask = 0; mask < 3; ++mask) attention(type, shape, mask);
  Numbers bytes(FLOAT32, 4096);
  if (flashnorm_read(bytes.data, 4096 * 4, 1) != OK) abort();
  printf("%s: %lld elements within their bounds\n", count > 1 ? given[1] : "neon",
         static_cast<long long>(checked));
}
