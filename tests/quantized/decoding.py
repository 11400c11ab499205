"""A stand-in for kernels that decode packed weights: the reference, on what was read when bound.

It keeps what it decoded, as a kernel keeps addresses: where a packed weight moves or changes and
nobody binds again, its results are those of before.
"""

from __future__ import annotations

from collections import Counter

import torch
from torch import Tensor

from flashnorm.kernels import reference
from flashnorm.kernels.call import Call, check
from flashnorm.kernels.cpu import backend, calls
from flashnorm.kernels.weights import Weight, dense, packed

MOST = 512  # rows of x that a norm computes its readers for
# How often a call with packed weights was bound and run, and by which formats.
bound: Counter[tuple[str, ...]] = Counter()
ran: Counter[tuple[str, ...]] = Counter()


class Decoded:
    """A bound call whose packed weights were decoded when it was bound."""

    most = 2**62

    def __init__(self, call: Call) -> None:
        self.formats = tuple(w.format.name for w in call.weights if isinstance(w, Weight))
        self.call = call._replace(weights=[dense(w, torch.float64) for w in call.weights])
        bound[self.formats] += 1

    def run(self, x: Tensor, output_residual: Tensor | None = None) -> list[Tensor]:
        ran[self.formats] += 1
        return run(self.call._replace(x=x, output_residual=output_residual))

    def normalize(self, x: Tensor) -> Tensor:
        return reference.normalized(self.call._replace(x=x))

    def precomputes(self, x: Tensor) -> bool:
        return x.numel() <= MOST * x.shape[-1]

    def normalize_and_run(self, x: Tensor, z: Tensor | None) -> tuple[Tensor, list[Tensor]]:
        return (self.normalize(x) if z is None else z), self.run(x)


def run(call: Call) -> list[Tensor]:
    """The reference in float64, rounded once to the dtype of x."""
    wide = call._replace(x=call.x.double())
    if call.output_residual is not None:
        wide = wide._replace(output_residual=call.output_residual.double())
    return [y.to(call.x.dtype) for y in reference.norm_linear(wide)]


def unfit(call: Call) -> str:
    """Why no kernel would take the packed weights of a call."""
    weights = [w for w in call.weights if isinstance(w, Weight)]
    if len(weights) < len(call.weights):
        return "some weights are dense, some are packed"
    if len({w.format for w in weights}) > 1:
        return "the weights are in several formats"
    return next(filter(None, (w.unfit() for w in weights)), "")


def install(monkeypatch) -> None:
    """Let the CPU's backend take packed weights."""
    own_bind, own_why = backend.CpuBackend.bind, calls.why_not

    def bind(self, call: Call):
        if packed(call.weights) is None:
            return own_bind(self, call)
        try:
            check(call)
        except ValueError as error:
            return str(error)
        return unfit(call) or Decoded(call)

    def why_not(call: Call):
        return (unfit(call) or None) if packed(call.weights) else own_why(call)

    monkeypatch.setattr(backend.CpuBackend, "bind", bind)
    monkeypatch.setattr(backend.CpuBackend, "why_not", lambda self, call: why_not(call))
    bound.clear()
    ran.clear()
