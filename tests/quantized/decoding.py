"""Counts how often kernels with packed weights are bound and run, and in which formats."""

from __future__ import annotations

from collections import Counter

from torch import Tensor

from flashnorm.kernels.call import Call
from flashnorm.kernels.cpu import backend
from flashnorm.kernels.weights import Weight

bound: Counter[tuple[str, ...]] = Counter()
ran: Counter[tuple[str, ...]] = Counter()


class Counted:
    """A bound call that counts how often it ran."""

    def __init__(self, call: Call, kernel: backend.Packed) -> None:
        self.formats = tuple(w.format.name for w in call.weights if isinstance(w, Weight))
        self.kernel, self.most = kernel, kernel.most
        self.normalize, self.precomputes = kernel.normalize, kernel.precomputes
        bound[self.formats] += 1

    def run(self, x: Tensor, output_residual: Tensor | None = None) -> list[Tensor]:
        ran[self.formats] += 1
        return self.kernel.run(x, output_residual)

    def normalize_and_run(self, x: Tensor, z: Tensor | None) -> tuple[Tensor, list[Tensor]]:
        ran[self.formats] += 1
        return self.kernel.normalize_and_run(x, z)


def install(monkeypatch) -> None:
    """Count from now on."""
    own = backend.CpuBackend.bind

    def bind(self, call: Call):
        found = own(self, call)
        packed = any(isinstance(weight, Weight) for weight in call.weights)
        return Counted(call, found) if packed and not isinstance(found, str) else found

    monkeypatch.setattr(backend.CpuBackend, "bind", bind)
    bound.clear()
    ran.clear()
