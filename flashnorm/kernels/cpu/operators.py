"""Kernels without Python around them, in `torch.ops.flashnorm`.

    norm_linear_cpu: (norm(x) · (gain_offset + gain) + β) [W_1; W_2; ..]ᵀ + [c_1; c_2; ..], or
        act(first) ⊙ second; of one result also plus a residual
    norm_packed_cpu: the same with packed weights
    attend_cpu: softmax(scale · q kᵀ + mask) v for one token per sequence

They are what a compiled graph calls where no gradient is wanted: the library registers them with
torch's dispatcher by itself, so that a call takes some microseconds where an operator written in
Python takes some tens. `kernels.ops.norm_linear` is for everything else.
"""

from __future__ import annotations

import ctypes
from typing import Any

import torch
from torch import Tensor

from flashnorm.kernels import attention
from flashnorm.kernels.call import Call
from flashnorm.kernels.cpu import packing
from flashnorm.kernels.cpu.calls import ACTIVATION
from flashnorm.kernels.cpu.library import load
from flashnorm.kernels.cpu.policy import MOST_WEIGHTS
from flashnorm.kernels.openmp import torch_symbols
from flashnorm.kernels.weights import DTYPES, memories, packed, turned

# The functions of torch's stable C interface, as csrc/operators.cpp expects them.
SHIM = [
    "aoti_torch_library_init_impl",
    "aoti_torch_library_impl",
    "aoti_torch_get_data_ptr",
    "aoti_torch_get_dim",
    "aoti_torch_get_sizes",
    "aoti_torch_get_strides",
    "aoti_torch_get_dtype",
    "aoti_torch_empty_strided",
    "aoti_torch_delete_tensor_object",
    "torch_list_size",
    "torch_list_get_item",
    "torch_delete_list",
    "torch_get_num_threads",
    "aoti_torch_device_type_cpu",
    "aoti_torch_dtype_float32",
    "aoti_torch_dtype_bfloat16",
    "aoti_torch_dtype_float16",
    "aoti_torch_dtype_bool",
    "aoti_torch_dtype_int8",
    "aoti_torch_dtype_uint8",
]

# x, weights (or their parts), vectors, which of those that are optional are among them (a bit each:
# biases by their weights, then gain, the norm's bias and the residual), and numbers.
RESIDUAL = 1 << MOST_WEIGHTS + 2
LINEAR = (
    "(Tensor x, Tensor[] weights, Tensor[] vectors, int which, int norm, float eps, "
    "float gain_offset, int activation) -> Tensor"
)


# A packed weight is several tensors: values, and those of scales, zeros, offsets and table of which
# `parts` has a bit (`packing.parts`).
PACKED = LINEAR.replace("weights", "parts").replace(
    ") ->", ", int format, int group, int part, int[] rows) ->"
)


def _fake_packed(
    x: Tensor,
    parts: list[Tensor],
    vectors: list[Tensor],
    which: int,
    norm: int,
    eps: float,
    gain_offset: float,
    activation: int,
    format: int,
    group: int,
    part: int,
    rows: list[int],
) -> Tensor:
    return x.new_empty((*x.shape[:-1], sum(rows[:1] if activation else rows)))


def _fake_linear(
    x: Tensor,
    weights: list[Tensor],
    vectors: list[Tensor],
    which: int,
    norm: int,
    eps: float,
    gain_offset: float,
    activation: int,
) -> Tensor:
    rows = [weight.shape[0] for weight in weights]
    return x.new_empty((*x.shape[:-1], sum(rows[:1] if activation else rows)))


_TAGS = (torch.Tag.pt2_compliant_tag, torch.Tag.needs_exact_strides)
torch.library.define("flashnorm::norm_linear_cpu", LINEAR, tags=_TAGS)
torch.library.register_fake("flashnorm::norm_linear_cpu", _fake_linear)
torch.library.define("flashnorm::norm_packed_cpu", PACKED, tags=_TAGS)
torch.library.register_fake("flashnorm::norm_packed_cpu", _fake_packed)
attention.define("flashnorm::attend_cpu", torch.Tag.needs_exact_strides)


def _register() -> bool:
    """Whether the library's kernels could be registered for the operators above."""
    library = load()
    if isinstance(library, str) or (shim := torch_symbols(*SHIM)) is None:
        return False
    return library.register_operators((ctypes.c_void_p * len(SHIM))(*shim)) == 0


AVAILABLE = _register()


def norm_linear(call: Call) -> list[Tensor]:
    """`call` without input_residual and alpha, on a kernel. x: [.., n], any strides."""
    biases = list(call.biases or ())
    optional = [*biases, *[None] * (MOST_WEIGHTS - len(biases)), call.gain, call.norm_bias]
    optional.append(call.output_residual)
    which = sum(1 << bit for bit, vector in enumerate(optional) if vector is not None)
    vectors = [vector for vector in optional if vector is not None]
    numbers = (which, call.norm.code, call.eps, call.gain_offset, ACTIVATION[call.activation])
    x, operators = call.x.contiguous(), torch.ops.flashnorm
    rows = [weight.shape[0] for weight in call.weights]
    if (first := packed(call.weights)) is None:
        y = operators.norm_linear_cpu(x, list(call.weights), vectors, *numbers)
    else:
        about = (first.format.code, first.group, packing.parts(first), rows)
        y = operators.norm_packed_cpu(x, memories(call.weights), vectors, *numbers, *about)
    if call.activation or len(rows) == 1:
        return [y]
    return [part.contiguous() for part in y.split(rows, dim=-1)]


def adding(arguments: tuple[Any, ...], residual: Any) -> tuple[Any, ...] | None:
    """An operator's arguments where it adds a residual to its result; None where it cannot."""
    x, weights, vectors, which, norm, eps, offset, activation, *about = arguments
    results = 1 if activation else len(about[-1] if about else weights)
    if results > 1 or which >= RESIDUAL:
        return None
    return x, weights, [*vectors, residual], which | RESIDUAL, norm, eps, offset, activation, *about


def takes(call: Call) -> bool:
    """Whether `norm_linear` can run it: types and strides, which a tracer knows as well."""
    if not AVAILABLE or call.input_residual is not None:
        return False
    added = call.output_residual
    if added is not None and not (added.dtype == call.x.dtype and added.is_contiguous()):
        return False
    if call.norm.code is None or call.norm.learns_alpha or call.alpha is not None:
        return False
    if not 0 < len(call.weights) <= MOST_WEIGHTS or call.x.dtype not in DTYPES:
        return False
    vectors = call.vectors()
    if packed(call.weights):
        known = all(v.dtype in DTYPES for v in vectors) and not packing.why_not(call)
        return known and all(v.is_contiguous() for v in vectors)
    if any(w.dtype != call.x.dtype for w in call.dense_weights()) or not _one_layout(call):
        return False
    return all(v.dtype == call.x.dtype and v.is_contiguous() for v in vectors)


def _one_layout(call: Call) -> bool:
    """Whether all weights have dense rows, or are all held as [in, out]."""
    weights = call.dense_weights()
    return all(w.stride(1) == 1 for w in weights) or all(map(turned, weights))


def attend(q: Tensor, k: Tensor, v: Tensor, scale: float, mask: Tensor | None) -> Tensor:
    """`kernels.attention.attend`, for arguments that its `why_not` has nothing against."""
    return torch.ops.flashnorm.attend_cpu(q, k, v, [] if mask is None else [mask], scale)
