"""The policy of a GPU on a backend in numpy, which captures nothing and can say that it does."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import SimpleNamespace

from flashnorm.kernels import dispatch
from flashnorm.kernels.backend import CompiledPolicy, Policy
from flashnorm.kernels.gpu import policy as gpu
from tests.toys.numpy_backend import NumpyBackend

ATTENTION = "numpy has no attention for a capture"


@dataclass(frozen=True, eq=False)
class Capturing(NumpyBackend):
    """`capture.on` says whether a step is captured, `capture.here` whether tensors are on it."""

    name: str = "capturing"
    policy: Policy = gpu.POLICY
    compiled: CompiledPolicy = gpu.COMPILED
    attention: str = ATTENTION
    capture: SimpleNamespace = field(default_factory=lambda: SimpleNamespace(on=False, here=True))

    def claims(self, x):
        return self.capture.here

    def capturing(self):
        return self.capture.on

    def rows(self, dtype, n, weights, compiled):
        return gpu.rows(dtype, compiled)

    def bind(self, call):
        found = super().bind(call)
        found.most = gpu.FEW * call.x.shape[-1]
        return found


@contextmanager
def capturing() -> Iterator[Capturing]:
    """A context in which models are accelerated for it."""
    found = Capturing()
    dispatch.register(found)
    try:
        yield found
    finally:
        dispatch.unregister(found)
