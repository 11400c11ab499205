"""Which way a call runs on the GPU, and why: what was measured on this card, or a default.

The defaults are those that cannot lose much where nothing was measured. Few rows: the skinny kernel
saves the launch of a norm and reads the same weights once. More rows: the library's product, with
the norm or the scale in a pass that the unfused model makes as well. The GEMM of this package runs
only where a measurement says that it wins.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec

import torch
from torch import Tensor

from flashnorm.kernels.call import Call
from flashnorm.kernels.gpu import cached, decoding
from flashnorm.kernels.gpu.launch import MOST_ROWS, Tile, device_of, interpreted
from flashnorm.kernels.weights import DTYPES, HALVES, packed

MOST_FEATURES = 2**16  # a row is one program's tile
# Up to so many rows the skinny kernel runs unless something else was measured. The matrix units
# have no float32.
SKINNY_ROWS = {dtype: 16 if dtype in HALVES else 1 for dtype in DTYPES}


@dataclass(frozen=True)
class Way:
    """One of "skinny", "gemm" and "matmul", and why it and no other."""

    way: str
    reason: str


def choose(call: Call) -> Way:
    """What `run` runs for a call that `why_not` has nothing against."""
    count = call.x.numel() // call.x.shape[-1]
    rows = f"{count} row{'' if count == 1 else 's'}"
    if packed(call.weights):
        return Way("skinny", f"{rows}: packed weights have no other kernel")
    entry = cached.find(call, device_of(call.x))
    if entry is not None and (entry.way != "skinny" or count <= MOST_ROWS):
        return Way(entry.way, f"measured fastest on this card ({entry.note})")
    limit = SKINNY_ROWS[call.x.dtype]
    if count <= limit:
        return Way("skinny", f"{rows}: the skinny kernel's default limit is {limit} (not measured)")
    return Way(
        "matmul", f"{rows}, above the skinny kernel's default limit of {limit} (not measured)"
    )


def tile_for(call: Call, way: str) -> Tile | None:
    """The measured tile of a call on this way, or None for the default."""
    entry = cached.find(call, device_of(call.x))
    return entry.tile if entry is not None and entry.way == way else None


def why_not(call: Call) -> str | None:
    """Why the kernels cannot take a call, or None where they can."""
    x = call.x
    if reason := unusable(x):
        return reason
    if call.norm.code is None:
        return f"the kernels do not know the norm {call.norm.name!r}"
    if x.dtype not in DTYPES:
        return f"x is {x.dtype}; the kernels take float32, bfloat16 and float16"
    if not 0 < x.shape[-1] <= MOST_FEATURES:
        return f"x has {x.shape[-1]} features; the kernels take 1 to {MOST_FEATURES}"
    if not call.weights:
        return "there is no weight"
    if packed(call.weights):
        return decoding.why_not(call) or _wrong_residual(call) or _wrong_vector(call)
    return _wrong_weight(call) or _wrong_residual(call) or _wrong_vector(call)


def unusable(x: Tensor) -> str | None:
    """Why no kernel runs where x is, or None where they do."""
    return _no_triton() or _wrong_device(x)


@cache
def _no_triton() -> str | None:
    if find_spec("triton") is None:
        return "triton is not installed, which the kernels for GPUs need (pip install triton)"
    return None


def _wrong_device(x: Tensor) -> str | None:
    if not x.is_cuda:
        return None if x.is_cpu and interpreted() else f"x is on {x.device}, not on a GPU"
    if torch.version.hip is not None:
        return "the kernels were never tried on an AMD GPU"
    major, minor = device_of(x).capability
    return None if major >= 8 else f"the GPU has capability {major}.{minor}; the kernels need 8.0"


def _wrong_weight(call: Call) -> str | None:
    x = call.x
    for w in call.dense_weights():
        if w.dtype != x.dtype or w.device != x.device:
            return f"x is {x.dtype} on {x.device} and a weight {w.dtype} on {w.device}"
        if w.stride(1) != 1 and w.shape[1] > 1:
            return "a weight's rows are not dense; weight.contiguous() has dense ones"
    return None


def _wrong_residual(call: Call) -> str | None:
    x = call.x
    for residual in (call.output_residual, call.input_residual):
        if residual is not None and (residual.dtype != x.dtype or residual.device != x.device):
            return f"the residual is not like x: {residual.dtype} on {residual.device}"
    return None


def _wrong_vector(call: Call) -> str | None:
    vectors = [("a bias", bias) for bias in call.biases or ()]
    vectors += [("gain", call.gain), ("norm_bias", call.norm_bias), ("alpha", call.alpha)]
    for name, v in vectors:
        if v is None:
            continue
        if v.dtype not in DTYPES or v.device != call.x.device or not v.is_contiguous():
            return f"{name} is {v.dtype} on {v.device}; it must be dense, of the kernels' dtypes"
    return None
