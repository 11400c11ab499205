"""NVIDIA GPUs as a backend: Triton kernels, which read the parameters of every call anew."""

from __future__ import annotations

import torch
from torch import Tensor

from flashnorm.kernels import backend, reference
from flashnorm.kernels.call import Call
from flashnorm.kernels.fallback import fell_back
from flashnorm.kernels.gpu import calls, counters, policy, ways
from flashnorm.kernels.gpu.capture import CudaGraphs


class Unpacked:
    """A call but for its x (`backend.Bound`); it holds the parameters, and is not kept."""

    __slots__ = ("call", "most")

    def __init__(self, call: Call) -> None:
        self.call, self.most = call, policy.FEW * call.x.shape[-1]

    def run(self, x: Tensor, output_residual: Tensor | None = None) -> list[Tensor]:
        call = self.call._replace(x=x, output_residual=output_residual)
        if reason := ways.why_not(call):
            fell_back(reason)
            return reference.norm_linear(call)
        return calls.run(call)

    def normalize(self, x: Tensor) -> Tensor:
        return policy.normalized(self._with(x))

    def precomputes(self, x: Tensor) -> bool:
        return x.numel() <= self.most and policy.absorbs(self._with(x))

    def _with(self, x: Tensor) -> Call:
        return self.call if x is self.call.x else self.call._replace(x=x)

    def normalize_and_run(self, x: Tensor, z: Tensor | None) -> tuple[Tensor, list[Tensor]]:
        return self.normalize(x) if z is None else z, self.run(x)


class GpuBackend(backend.Backend):
    """Triton kernels (`device/`)."""

    def claims(self, x: Tensor) -> bool:
        return x.is_cuda

    def available(self, device: torch.device) -> tuple[bool, str]:
        probe = torch.zeros(1, 16, device=device)
        if (reason := ways.why_not(Call(probe, (probe,)))) is None:
            counters.reserve(probe.device)
        return (True, f"Triton kernels on {device}") if reason is None else (False, reason)

    def why_not(self, call: Call) -> str | None:
        return ways.why_not(call)

    def run(self, call: Call) -> list[Tensor]:
        return calls.run(call)

    def bind(self, call: Call) -> Unpacked:
        return Unpacked(call)

    def gate_(self, gate: Tensor, up: Tensor, activation: str) -> Tensor:
        return gate.copy_(reference.ACTIVATIONS[activation](gate).mul_(up))

    def rows(self, dtype: torch.dtype, n: int, weights: int, compiled: bool) -> int:
        return policy.rows(dtype, compiled)

    def explain(self, call: Call) -> str:
        way = ways.choose(call)
        return f"{way.way}: {way.reason}"

    def elsewhere(self, x: Tensor) -> str:
        return f"x is on {x.device}, and the model was accelerated on a GPU"

    def capturing(self) -> bool:
        return torch.cuda.is_current_stream_capturing()


GPU = GpuBackend(
    "gpu",
    "cuda",
    policy.LIMITS,
    policy.POLICY,
    policy.COMPILED,
    policy.ATTENTION,
    keeps=False,
    captures=CudaGraphs(),
)
