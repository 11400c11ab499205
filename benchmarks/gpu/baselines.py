"""What norm + linear costs without us: norm and library matmul, and torch.compile at its best."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

TUNED, PLAIN = "max-autotune-no-cudagraphs", "default"


@dataclass(frozen=True)
class Inputs:
    """One norm + linear: x [rows, n], gain [n], copies of W [k, n]; `glu` gates the halves of W."""

    x: Tensor
    gain: Tensor
    weights: list[Tensor]
    eps: float
    glu: bool


def torch_norm(given: Inputs) -> Callable[[int], Tensor]:
    """`F.rms_norm` and the library's matmul, as eager PyTorch runs them, and an eager gate."""
    width = given.x.shape[-1:]

    def run(i: int) -> Tensor:
        y = F.linear(F.rms_norm(given.x, width, given.gain, given.eps), given.weights[i])
        return _gated(y) if given.glu else y

    return run


def triton_norm(given: Inputs) -> Callable[[int], Tensor]:
    """A weighted norm as one Triton kernel, the library's matmul, and a gate as one kernel."""
    from benchmarks.gpu.baseline_kernels import rms_norm, silu_mul

    def run(i: int) -> Tensor:
        y = F.linear(rms_norm(given.x, given.gain, given.eps), given.weights[i])
        return silu_mul(y) if given.glu else y

    return run


def compiled(given: Inputs, mode: str) -> Callable[[int], Tensor]:
    """torch.compile for exactly these shapes. Its own CUDA graphs are off: all sides get ours."""

    def operation(x: Tensor, gain: Tensor, weight: Tensor) -> Tensor:
        y = F.linear(F.rms_norm(x, x.shape[-1:], gain, given.eps), weight)
        return _gated(y) if given.glu else y

    call = torch.compile(operation, mode=mode, dynamic=False, fullgraph=True)
    return lambda i: call(given.x, given.gain, given.weights[i])


def linear_alone(given: Inputs) -> Callable[[int], Tensor]:
    """The library's matmul of rows that are normalized: what a norm that costs nothing leaves."""
    return lambda i: F.linear(given.x, given.weights[i])


def _gated(y: Tensor) -> Tensor:
    gate, up = y.chunk(2, -1)
    return F.silu(gate) * up
