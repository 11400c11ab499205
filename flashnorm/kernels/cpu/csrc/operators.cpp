// The operations as operators of torch: what a compiled graph calls, with no Python in between.
//
// They are registered through the stable C interface of torch's libraries
// (torch/csrc/inductor/aoti_torch/c/shim.h, torch/csrc/stable/c/shim.h), whose functions Python looks
// up: none of torch's headers is needed, and one build serves every version that has them. Arguments
// and results are 64-bit values on a stack; a tensor or a list is a handle that its receiver owns.
#include <stddef.h>
#include <stdio.h>
#include <string.h>

#include <stdexcept>
#include <utility>
#include <vector>

#include "formats.h"

namespace {

using Value = uint64_t;
using Handle = void*;
using Kernel = void (*)(Value* stack, uint64_t arguments, uint64_t results);

// In the order of SHIM in kernels/cpu/operators.py. Those that return an error return 0 for none.
struct Torch {
  int32_t (*open)(const char* space, const char* key, const char* file, uint32_t line, Handle*);
  int32_t (*implement)(Handle library, const char* name, Kernel);
  int32_t (*data)(Handle, void**);
  int32_t (*dims)(Handle, int64_t*);
  int32_t (*sizes)(Handle, int64_t**);
  int32_t (*strides)(Handle, int64_t**);
  int32_t (*dtype)(Handle, int32_t*);
  int32_t (*empty)(int64_t dims, const int64_t* sizes, const int64_t* strides, int32_t dtype,
                   int32_t device, int32_t index, Handle*);
  int32_t (*release)(Handle);
  int32_t (*list_size)(Handle, size_t*);
  int32_t (*list_item)(Handle, size_t, Value*);
  int32_t (*release_list)(Handle);
  int32_t (*threads)(uint32_t*);
  int32_t (*cpu)();
  int32_t (*dtypes[UNSIGNED8 + 1])();  // by the numbers of api.h
};
Torch torch;

void need(bool fine, const char* what) {
  if (!fine) throw std::invalid_argument(what);
}

void done(int32_t error) {
  if (error) throw std::runtime_error("flashnorm: torch's C interface reports an error");
}

void computed(int32_t status) {
  if (status != OK) throw std::runtime_error("flashnorm: no memory for a row in float32");
}

template <class To>
To from(Value value) {
  To found;
  memcpy(&found, &value, sizeof found);
  return found;
}

Value value_of(Handle handle) { return reinterpret_cast<uintptr_t>(handle); }

class Tensor {
 public:
  explicit Tensor(Handle handle, bool owned = true) : handle_(handle), owned_(owned) {
    done(torch.dims(handle, &dims));
    done(torch.sizes(handle, &sizes));
    done(torch.strides(handle, &strides));
    done(torch.data(handle, &data));
    done(torch.dtype(handle, &dtype));
    while (type <= UNSIGNED8 && torch.dtypes[type]() != dtype) ++type;
  }
  Tensor(Tensor&& other) noexcept : Tensor(static_cast<const Tensor&>(other)) {
    other.handle_ = nullptr;
  }
  ~Tensor() {
    if (handle_ && owned_) torch.release(handle_);
  }

  int64_t size(int64_t axis) const { return sizes[axis < 0 ? dims + axis : axis]; }
  int64_t stride(int64_t axis) const { return strides[axis < 0 ? dims + axis : axis]; }
  bool dense_rows() const { return dims && (stride(-1) == 1 || size(-1) == 1); }
  bool contiguous() const {
    int64_t expected = 1;
    for (int64_t i = dims; i-- > 0; expected *= sizes[i])
      if (sizes[i] != 1 && strides[i] != expected) return false;
    return true;
  }
  Handle give() { return std::exchange(handle_, nullptr); }

  int64_t dims;
  int64_t *sizes, *strides;
  void* data;
  int32_t dtype, type = 0;  // torch's number, and that of api.h: beyond UNSIGNED8 where it has none

 private:
  Tensor(const Tensor&) = default;
  Handle handle_;
  bool owned_;
};

Tensor empty(const std::vector<int64_t>& sizes, int32_t dtype) {
  std::vector<int64_t> strides(sizes.size(), 1);
  for (size_t i = sizes.size(); i-- > 1;) strides[i - 1] = strides[i] * sizes[i];
  Handle handle;
  done(torch.empty(static_cast<int64_t>(sizes.size()), sizes.data(), strides.data(), dtype,
                   torch.cpu(), 0, &handle));
  return Tensor(handle);
}

std::vector<Tensor> tensors(Value list) {
  const Handle handle = from<Handle>(list);
  size_t count;
  done(torch.list_size(handle, &count));
  std::vector<Tensor> found;
  found.reserve(count);
  for (size_t i = 0; i < count; ++i) {
    Value value;
    done(torch.list_item(handle, i, &value));
    found.emplace_back(from<Handle>(value));
  }
  done(torch.release_list(handle));
  return found;
}

std::vector<Tensor> borrowed(const Handle* handles, int64_t count) {
  std::vector<Tensor> found;
  found.reserve(static_cast<size_t>(count));
  for (int64_t i = 0; i < count; ++i) found.emplace_back(handles[i], false);
  return found;
}

int64_t threads() {
  uint32_t count;
  done(torch.threads(&count));
  return count;
}

constexpr int64_t MOST_SEGMENTS = 8;  // MOST_WEIGHTS of calls.py

template <class Head, class Item>
struct Storage {
  Head head;
  Item more[MOST_SEGMENTS - 1];
};

// What is optional: the next of `given`, if bit `bit` of `which` says that it is there.
const Tensor* next(const std::vector<Tensor>& given, size_t& used, int64_t which, int bit) {
  if (!(which >> bit & 1)) return nullptr;
  need(used < given.size(), "norm_linear_cpu: a parameter is missing");
  return &given[used++];
}

// A parameter of the norm or a bias.
const Tensor* next_vector(const std::vector<Tensor>& given, size_t& used, int64_t which, int bit) {
  const Tensor* found = next(given, used, which, bit);
  need(!found || (found->dims == 1 && found->contiguous() && found->type < BOOLEAN),
       "norm_linear_cpu: a bias or gain is not a dense vector");
  return found;
}

// What norm_linear_cpu is given beside tensors.
struct Numbers {
  int64_t which, norm;
  double eps, gain_offset;
  int64_t activation;
};

// One call as the library reads it, filled in part by part.
class Filled {
 public:
  Filled(const Tensor& x, const std::vector<Tensor>& vectors, const Numbers& numbers, size_t segments)
      : op(op_storage_.head), x_(x), vectors_(vectors), which_(numbers.which) {
    need(segments && segments <= MOST_SEGMENTS, "norm_linear_cpu: no weights, or too many");
    need(x.type < BOOLEAN && x.dims && x.contiguous(), "norm_linear_cpu: x is not contiguous");
    op = {};
    op.n = x.size(-1);
    op.norm = static_cast<int32_t>(numbers.norm);
    op.eps = numbers.eps;
    op.offset = numbers.gain_offset;
    op.act = static_cast<int32_t>(numbers.activation);
    op.x_type = x.type;
    op.segments = static_cast<int64_t>(segments);
    need(op.n > 0, "norm_linear_cpu: x has no features");
    need(op.norm >= NORM_NONE && op.norm <= NORM_LAYER, "norm_linear_cpu: no such norm");
    need(op.act >= ACT_NONE && op.act <= ACT_GELU_TANH, "norm_linear_cpu: no such activation");
    need(!op.act || segments == 2, "norm_linear_cpu: a GLU needs two weights");
  }

  // The bias of segment i, whose rows are known, or null.
  void bias(size_t i) {
    const Tensor* bias = next_vector(vectors_, used_, which_, static_cast<int>(i));
    if (!bias) return;
    need(bias->size(0) == op.segment[i].rows, "norm_linear_cpu: a bias does not fit its weight");
    need(!biased_ || bias->type == op.bias_type, "norm_linear_cpu: biases of two types");
    biased_ = true;
    op.bias_type = bias->type;
    op.segment[i].bias = bias->data;
  }

  // All results side by side, [.., Σ rows]; one may have a residual added.
  Tensor run() {
    need(!op.act || op.segment[0].rows == op.segment[1].rows, "norm_linear_cpu: unequal gate and up");
    if (const Tensor* gain = next_vector(vectors_, used_, which_, MOST_SEGMENTS)) {
      need(gain->size(0) == op.n, "norm_linear_cpu: the gain does not fit x");
      op.gain = gain->data, op.gain_type = gain->type;
    }
    if (const Tensor* shift = next_vector(vectors_, used_, which_, MOST_SEGMENTS + 1)) {
      need(shift->size(0) == op.n, "norm_linear_cpu: the norm's bias does not fit x");
      op.shift = shift->data, op.shift_type = shift->type;
    }
    Storage<Call, Output> call_storage;
    Call& call = call_storage.head;
    call = {};
    call.x = x_.data, call.x_stride = op.n, call.threads = threads();
    call.rows = 1;
    for (int64_t i = 0; i + 1 < x_.dims; ++i) call.rows *= x_.size(i);
    std::vector<int64_t> shape(x_.sizes, x_.sizes + x_.dims);
    const int64_t results = op.act ? 1 : op.segments;
    int64_t& width = shape.back() = 0;
    for (int64_t i = 0; i < results; ++i) width += op.segment[i].rows;
    Tensor y = empty(shape, x_.dtype);
    for (int64_t i = 0, at = 0; i < results; at += op.segment[i++].rows)
      call.out[i] = {static_cast<char*>(y.data) + at * size_of(x_.type), width};
    if (const Tensor* residual = next(vectors_, used_, which_, MOST_SEGMENTS + 2))
      add(*residual, y, results, call);
    computed(flashnorm_run(&op, &call));
    return y;
  }

 private:
  static void add(const Tensor& residual, const Tensor& y, int64_t results, Call& call) {
    bool fits = results == 1 && residual.dims == y.dims && residual.type == y.type;
    for (int64_t i = 0; fits && i < y.dims; ++i) fits = residual.size(i) == y.size(i);
    need(fits && residual.contiguous(), "norm_linear_cpu: the residual does not fit the result");
    call.residual = residual.data, call.residual_stride = y.size(-1);
  }

  Storage<Op, Segment> op_storage_;

 public:
  Op& op;

 private:
  const Tensor& x_;
  const std::vector<Tensor>& vectors_;
  int64_t which_;
  size_t used_ = 0;
  bool biased_ = false;
};

Tensor norm_linear(const Tensor& x, const std::vector<Tensor>& weights,
                   const std::vector<Tensor>& vectors, const Numbers& numbers) {
  Filled call(x, vectors, numbers, weights.size());
  Op& op = call.op;
  op.weight_type = op.bias_type = weights[0].type;
  need(op.weight_type < BOOLEAN, "norm_linear_cpu: a weight is of no type that kernels read");
  for (size_t i = 0; i < weights.size(); ++i) {
    const Tensor& w = weights[i];
    const bool dense = w.dense_rows();
    need(w.dims == 2 && w.size(1) == op.n && w.type == op.weight_type &&
             (dense || (w.stride(0) == 1 && w.stride(1) > 1)),
         "norm_linear_cpu: a weight does not fit x");
    op.segment[i] = {w.data, nullptr, w.size(0), w.stride(0), dense ? 1 : w.stride(1), {}, {}, {}, nullptr};
    need(turned(op) == !dense, "norm_linear_cpu: weights of two layouts");
    call.bias(i);
    need(op.bias_type == op.weight_type, "norm_linear_cpu: a bias does not fit its weight");
  }
  return call.run();
}

// What norm_packed_cpu is given beside: the format, features of a group (0: all), which parts each
// weight has (bits: scales, zeros, offsets, table), and how many rows.
struct Packing {
  int64_t format, group, parts;
  const int64_t* rows;
  size_t segments;
};

const Tensor& part(const std::vector<Tensor>& parts, size_t& used) {
  need(used < parts.size(), "norm_packed_cpu: a part of a weight is missing");
  return parts[used++];
}

Grid grid(const Tensor& part, int64_t rows, int64_t groups, int32_t last, int32_t& type) {
  need(part.dims == 2 && part.size(0) >= rows && part.size(1) >= groups && part.type <= last &&
           part.type != BOOLEAN,
       "norm_packed_cpu: scales, zeros or offsets do not fit their weight");
  type = part.type;
  return {part.data, part.stride(0), part.stride(1)};
}

Tensor norm_packed(const Tensor& x, const std::vector<Tensor>& parts,
                   const std::vector<Tensor>& vectors, const Numbers& numbers, const Packing& packing) {
  Filled call(x, vectors, numbers, packing.segments);
  Op& op = call.op;
  op.weight_type = static_cast<int32_t>(packing.format);
  need(is_packed(op), "norm_packed_cpu: no such format");
  op.group = packing.group ? packing.group : op.n;
  const int64_t groups = (op.n + op.group - 1) / op.group;
  size_t used = 0;
  for (size_t i = 0; i < packing.segments; ++i) {
    const int64_t rows = packing.rows[i];
    const Tensor& values = part(parts, used);
    need(values.dims == 2 && fits(op, values.size(0), values.size(1), values.stride(0), rows) &&
             values.stride(1) == 1,
         "norm_packed_cpu: a weight does not fit x");
    Segment& s = op.segment[i];
    s = {values.data, nullptr, rows, values.stride(0), 1, {}, {}, {}, nullptr};
    if (packing.parts & 1) s.scales = grid(part(parts, used), rows, groups, FLOAT16, op.scale_type);
    if (packing.parts & 2) s.zeros = grid(part(parts, used), rows, groups, UNSIGNED8, op.zero_type);
    if (packing.parts & 4) s.offsets = grid(part(parts, used), rows, groups, FLOAT16, op.offset_type);
    if (packing.parts & 8) {
      const Tensor& table = part(parts, used);
      need(table.dims == 1 && table.size(0) == 16 && table.contiguous() && table.type == FLOAT32,
           "norm_packed_cpu: no table of 16 numbers");
      s.table = static_cast<const float*>(table.data);
    }
    need(op.weight_type != CODEBOOK4 || s.table, "norm_packed_cpu: no table of 16 numbers");
    call.bias(i);
  }
  return call.run();
}

Numbers numbers_of(const Value* stack) {
  return {from<int64_t>(stack[0]), from<int64_t>(stack[1]), from<double>(stack[2]),
          from<double>(stack[3]), from<int64_t>(stack[4])};
}

// (Tensor x, Tensor[] weights, Tensor[] vectors, int which, int norm, float eps, float gain_offset,
//  int activation) -> Tensor
void norm_linear(Value* stack, uint64_t, uint64_t) {
  const Tensor x(from<Handle>(stack[0]));
  const std::vector<Tensor> weights = tensors(stack[1]), vectors = tensors(stack[2]);
  stack[0] = value_of(norm_linear(x, weights, vectors, numbers_of(stack + 3)).give());
}

std::vector<int64_t> integers(Value list) {
  const Handle handle = from<Handle>(list);
  size_t count;
  done(torch.list_size(handle, &count));
  std::vector<int64_t> found(count);
  for (size_t i = 0; i < count; ++i) {
    Value value;
    done(torch.list_item(handle, i, &value));
    found[i] = from<int64_t>(value);
  }
  done(torch.release_list(handle));
  return found;
}

// The same with (.., int format, int group, int parts, int[] rows), weights in parts.
void norm_packed(Value* stack, uint64_t, uint64_t) {
  const Tensor x(from<Handle>(stack[0]));
  const std::vector<Tensor> parts = tensors(stack[1]), vectors = tensors(stack[2]);
  const std::vector<int64_t> rows = integers(stack[11]);
  const Packing packing{from<int64_t>(stack[8]), from<int64_t>(stack[9]), from<int64_t>(stack[10]),
                        rows.data(), rows.size()};
  stack[0] = value_of(norm_packed(x, parts, vectors, numbers_of(stack + 3), packing).give());
}

Tensor attend(const Tensor& q, const Tensor& k, const Tensor& v, const std::vector<Tensor>& mask,
              double scale) {
  need(q.dims == 4 && k.dims == 4 && v.dims == 4 && q.size(2) == 1, "attend_cpu: not one token");
  need(q.type < BOOLEAN && k.type == q.type && v.type == q.type, "attend_cpu: unequal types");
  need(q.dense_rows() && k.dense_rows() && v.dense_rows(), "attend_cpu: rows are not dense");
  const int64_t batch = q.size(0), heads = q.size(1), groups = k.size(1), length = k.size(2);
  need(k.size(0) == batch && v.size(0) == batch && k.size(3) == q.size(3), "attend_cpu: q, k");
  need(v.size(1) == groups && v.size(2) == length, "attend_cpu: k and v do not fit");
  need(batch && length && groups && heads % groups == 0, "attend_cpu: heads, or nothing to read");

  Tensor out = empty({batch, 1, heads, v.size(3)}, q.dtype);
  Attend a{};
  a.type = a.mask_type = q.type;
  a.q = q.data, a.k = k.data, a.v = v.data, a.out = out.data;
  a.batch = batch, a.heads = heads, a.kv_heads = groups, a.length = length;
  a.width = q.size(3), a.value_width = v.size(3);
  a.q_batch = q.stride(0), a.q_head = q.stride(1);
  a.k_batch = k.stride(0), a.k_head = k.stride(1), a.k_row = k.stride(2);
  a.v_batch = v.stride(0), a.v_head = v.stride(1), a.v_row = v.stride(2);
  need(mask.size() <= 1, "attend_cpu: more than one mask");
  if (!mask.empty()) {
    const Tensor& m = mask[0];
    need(m.dims == 4 && m.size(3) == length && m.size(1) == 1 && m.size(2) == 1 &&
             (m.size(0) == 1 || m.size(0) == batch) && (m.type == BOOLEAN || m.type == q.type),
         "attend_cpu: the mask does not fit");
    a.mask = m.data, a.mask_type = m.type;
    a.mask_batch = m.size(0) == 1 ? 0 : m.stride(0), a.mask_step = m.stride(3);
  }
  a.scale = scale;
  a.threads = threads();
  computed(flashnorm_attend(&a));
  return out;
}

// (Tensor q, Tensor k, Tensor v, Tensor[] mask, float scale) -> Tensor
void attend(Value* stack, uint64_t, uint64_t) {
  const Tensor q(from<Handle>(stack[0])), k(from<Handle>(stack[1])), v(from<Handle>(stack[2]));
  const std::vector<Tensor> mask = tensors(stack[3]);
  stack[0] = value_of(attend(q, k, v, mask, from<double>(stack[4])).give());
}

// The error of a call from C: 0, or 1 and a line that says why.
template <class Body>
int32_t reported(Body body) {
  try {
    body();
    return 0;
  } catch (const std::exception& error) {
    fprintf(stderr, "flashnorm: %s\n", error.what());
    return 1;
  }
}

}  // namespace

// The same as AOTInductor's code calls them, by these names: lists are a pointer and a length, the
// arguments stay the caller's, and the result comes last.
EXPORT int32_t aoti_torch_cpu_norm_linear_cpu(Handle x, const Handle* weights, int64_t many_weights,
                                              const Handle* vectors, int64_t many_vectors,
                                              int64_t which, int64_t norm, double eps,
                                              double gain_offset, int64_t activation,
                                              Handle* result) {
  return reported([&] {
    *result = norm_linear(Tensor(x, false), borrowed(weights, many_weights),
                          borrowed(vectors, many_vectors), {which, norm, eps, gain_offset, activation})
                  .give();
  });
}

EXPORT int32_t aoti_torch_cpu_norm_packed_cpu(Handle x, const Handle* parts, int64_t many_parts,
                                              const Handle* vectors, int64_t many_vectors,
                                              int64_t which, int64_t norm, double eps,
                                              double gain_offset, int64_t activation, int64_t format,
                                              int64_t group, int64_t part, const int64_t* rows,
                                              int64_t many_rows, Handle* result) {
  return reported([&] {
    *result = norm_packed(Tensor(x, false), borrowed(parts, many_parts),
                          borrowed(vectors, many_vectors), {which, norm, eps, gain_offset, activation},
                          {format, group, part, rows, static_cast<size_t>(many_rows)})
                  .give();
  });
}

EXPORT int32_t aoti_torch_cpu_attend_cpu(Handle q, Handle k, Handle v, const Handle* mask,
                                         int64_t many_masks, double scale, Handle* result) {
  return reported([&] {
    Tensor out = attend(Tensor(q, false), Tensor(k, false), Tensor(v, false),
                        borrowed(mask, many_masks), scale);
    *result = out.give();
  });
}

// `shim` are the functions of Torch. Returns 0, or the error of torch's interface.
EXPORT int32_t flashnorm_register_operators(void* const* shim) {
  memcpy(&torch, shim, sizeof torch);
  Handle library;  // stays: closing it would take the operators back
  if (const int32_t error = torch.open("flashnorm", "CPU", "operators.cpp", 1, &library)) return error;
  if (const int32_t error = torch.implement(library, "norm_linear_cpu", norm_linear)) return error;
  if (const int32_t error = torch.implement(library, "norm_packed_cpu", norm_packed)) return error;
  return torch.implement(library, "attend_cpu", attend);
}
