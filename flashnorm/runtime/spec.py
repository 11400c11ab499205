"""What a kernel of modules is made of but for the modules, as a text that compiled graphs read."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor, nn

from flashnorm.kernels import norms
from flashnorm.kernels.weights import Weight, find


@dataclass(frozen=True)
class Norm:
    """What a norm module computes: `norm(x) · (offset + gain) + bias`, by the names it holds.

    kind is the name of a `NormKind`; gain, bias and α of tanh(αx) are attributes of the module,
    or empty.
    """

    kind: str
    eps: float
    gain: str = ""
    offset: float = 0.0
    bias: str = ""
    alpha: str = ""

    def names(self) -> tuple[str, str, str]:
        """Of gain, bias and alpha, in this order."""
        return self.gain, self.bias, self.alpha


NO_NORM = Norm(norms.NONE.name, 0.0)


class Slice(NamedTuple):
    """Rows `start : start + length` of a linear module's weight, and of its bias if it has one.

    `total` is how many rows the weight has in all; with `turned` it is held as [in, out].
    """

    start: int
    length: int
    total: int
    weight: str = "weight"
    bias: str = ""
    turned: bool = False


class Laid(NamedTuple):
    """A packed weight whose tensors are buffers of its module by now (`runtime.laid`).

    has: whether there are scales, zeros, offsets and a table, in this order, behind the values.
    """

    format: str
    outputs: int
    features: int
    group: int
    names: list[str]
    has: list[bool]

    def read(self, module: nn.Module) -> Weight:
        """The weight over these buffers."""
        parts = [getattr(module, name) for name in self.names]
        given: list[Tensor | None] = []
        used = 1
        for has in self.has:
            given.append(parts[used] if has else None)
            used += has
        scales, zeros, offsets, table = given
        size = (self.outputs, self.features, self.group)
        return Weight(parts[0], find(self.format), scales, *size, zeros, offsets, table)


class KernelSpec(NamedTuple):
    """What a kernel is made of but for modules, and what a compiled graph has to know of it.

    alone, precompute, fuses and defers: those of the backend's `CompiledPolicy`. most: (name of a
    dtype, elements of x that it takes in a compiled graph); unknown: those dtypes in which it is
    called where the number of elements is not known. (torch.compile cannot look into a dict of a
    constant.)
    """

    norm: Norm
    products: list[Slice]
    activation: str | None
    device: str
    alone: bool
    precompute: bool
    most: list[tuple[str, int]]
    unknown: list[str]
    fuses: bool
    defers: bool
    laid: list[Laid]

    def takes(self, x: Tensor) -> bool:
        """Whether a compiled graph should call the kernel on x: by place, dtype and size."""
        if x.device.type != self.device:
            return False
        dtype, size = str(x.dtype), x.numel()
        for name, most in self.most:
            if name == dtype:
                return size <= most if isinstance(size, int) else name in self.unknown
        return False


@torch.compiler.assume_constant_result
def read_spec(written: str) -> KernelSpec:
    """What a text stands for: a compiled graph checks the text at every call, not every field."""
    return _read(written)


@cache
def _read(written: str) -> KernelSpec:
    norm, products, *rest = json.loads(written)
    rows = [Slice(*given) for given in products]
    rest[-1] = [Laid(*given) for given in rest[-1]]
    return KernelSpec(Norm(*norm), rows, *rest)
