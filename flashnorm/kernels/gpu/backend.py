"""NVIDIA GPUs as a backend: Triton kernels, which read the parameters of every call anew."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from flashnorm.kernels import backend, reference
from flashnorm.kernels.call import Call
from flashnorm.kernels.fallback import fell_back
from flashnorm.kernels.gpu import attention, calls, counters, policy, switches, ways
from flashnorm.kernels.gpu.capture import CudaGraphs
from flashnorm.kernels.loaded import Loaded


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


class GpuAttention(backend.Attention):
    """`gpu.attention` in captures and compiled graphs; torch's own, one call, in eager calls."""

    def __init__(self) -> None:
        # Kinds of calls whose kernels are loaded, as they have to be in a capture.
        self._loaded = Loaded()

    def capturing(self) -> bool:
        return torch.cuda.is_current_stream_capturing()

    def why_not(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> str | None:
        """None in a capture, if the kernel is loaded. Outside it is run once of a kind to load it,
        for nothing else: every call there has to give the bits of before."""
        kind = attention.kind(q, k, v, mask)
        if self.capturing():
            loaded = kind in self._loaded
            return attention.unfit(q, k, v, mask) if loaded else policy.NOT_LOADED
        if self._loaded.knows(kind):
            return policy.EAGER_ATTENTION
        if reason := ways.unusable(q) or attention.unfit(q, k, v, mask):
            return reason
        self._loaded.load(kind, partial(attention.attend, q, k, v, 1.0, mask))
        return policy.EAGER_ATTENTION

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, scale: float, mask: Tensor | None = None
    ) -> Tensor:
        return attention.attend(q, k, v, scale, mask)

    def why_not_in_graph(
        self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None
    ) -> str | None:
        return attention.unfit(q, k, v, mask)

    def attend_in_graph(
        self, q: Tensor, k: Tensor, v: Tensor, scale: float, mask: Tensor | None = None
    ) -> Tensor:
        return attention.attend_in_graph(q, k, v, scale, mask)


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
        return calls.explain(call)

    def elsewhere(self, x: Tensor) -> str:
        return f"x is on {x.device}, and the model was accelerated on a GPU"

    def uses(self, part: str) -> bool:
        return switches.on(part)

    def capturing(self) -> bool:
        return torch.cuda.is_current_stream_capturing()


GPU = GpuBackend(
    "gpu",
    "cuda",
    policy.LIMITS,
    policy.POLICY,
    policy.COMPILED,
    GpuAttention(),
    keeps=False,
    captures=CudaGraphs(),
)
