"""The CPU as a backend: a call packed once, as bytes that hold no tensor, and run many times."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from flashnorm.kernels import backend
from flashnorm.kernels.call import Call, check
from flashnorm.kernels.cpu import attention, calls, operators, policy
from flashnorm.kernels.cpu.pages import collapse


class Packed:
    """A call of the library, but for x and results (`backend.Bound`)."""

    __slots__ = ("most", "packed", "together", "widths")

    def __init__(self, call: Call) -> None:
        self.packed = calls.pack(call)
        self.widths = [w.shape[0] for w in call.results()]
        self.most = policy.most_rows(call) * call.x.shape[-1]
        self.together = min(self.most, policy.ROWS_TOGETHER * call.x.shape[-1])

    def run(self, x: Tensor, output_residual: Tensor | None = None) -> list[Tensor]:
        return calls.run_packed(self.packed, x, self.widths, output_residual)

    def normalize(self, x: Tensor) -> Tensor:
        return calls.normalize_packed(self.packed, x, torch.empty_like(x))

    def precomputes(self, x: Tensor) -> bool:
        return x.numel() <= self.together

    def normalize_and_run(self, x: Tensor, z: Tensor | None) -> tuple[Tensor, list[Tensor]]:
        if z is not None:
            return z, calls.run_packed(self.packed, x, self.widths, None)
        z = torch.empty_like(x)
        return z, calls.run_packed(self.packed, x, self.widths, None, z)


class Attention(backend.Attention):
    """`cpu.attention` and its operator."""

    def why_not(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> str | None:
        return attention.why_not(q, k, v, mask)

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, scale: float, mask: Tensor | None = None
    ) -> Tensor:
        return attention.attend(q, k, v, scale, mask)

    def why_not_in_graph(
        self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None
    ) -> str | None:
        if not operators.AVAILABLE:
            return "the library's operators could not be registered"
        return attention.unfit(q, k, v, mask)

    def attend_in_graph(
        self, q: Tensor, k: Tensor, v: Tensor, scale: float, mask: Tensor | None = None
    ) -> Tensor:
        return operators.attend(q, k, v, scale, mask)


class CpuBackend(backend.Backend):
    """C++ kernels (`csrc/`)."""

    def claims(self, x: Tensor) -> bool:
        return x.is_cpu

    def available(self, device: torch.device) -> tuple[bool, str]:
        return calls.available()

    def why_not(self, call: Call) -> str | None:
        return calls.why_not(call)

    def run(self, call: Call) -> list[Tensor]:
        return calls.run(call)

    def bind(self, call: Call) -> Packed | str:
        try:
            check(call)
        except ValueError as error:
            return str(error)
        return calls.why_not(call) or Packed(call)

    def gate_(self, gate: Tensor, up: Tensor, activation: str) -> Tensor:
        return calls.gate_(gate, up, activation)

    def rows(self, dtype: torch.dtype, n: int, weights: int, compiled: bool) -> int:
        return policy.rows_for(dtype, n, weights)

    def elsewhere(self, x: Tensor) -> str:
        return f"x is on {x.device}, not on the CPU"

    def in_graph(self, call: Call) -> list[Tensor] | None:
        return operators.norm_linear(call) if operators.takes(call) else None

    def prepare_memory(self, parameters: Iterable[Tensor]) -> int:
        return collapse(parameters)


CPU = CpuBackend("cpu", "cpu", policy.LIMITS, policy.POLICY, policy.COMPILED, Attention())
