"""What of a model's packed layers kernels may stand for: read, proven, and grouped by format."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from flashnorm.graph.fusible import Rows
from flashnorm.graph.packed import kind_of, why_not_product
from flashnorm.kernels.backend import Backend
from flashnorm.kernels.weights import Weight
from flashnorm.quantized import layout
from flashnorm.quantized.layout import Held
from flashnorm.runtime.bound import UNPROVEN, Kernel, Packed, Product, part
from flashnorm.runtime.refused import Refused
from flashnorm.runtime.spec import Slice

TWO_FORMATS = "its gate and its up are packed in two formats, of which one call takes one"
PART = "'{}', which is a part of it, runs its own code"
NARROW = "in {} its module computes in another dtype, or not at all"
NOWHERE = "its packed weight is not in memory ({})"
TRAINED = "its weight is packed ({}): it keeps its own forward in training"


@dataclass
class Proven:
    """The packed layers of a model: how they hold their weight, and in which dtypes it is proven.

    Every layer in the dtypes that it was recorded with; in others one of each kind.
    """

    dtypes: tuple[torch.dtype, ...]
    _found: dict[nn.Module, Held | str | None] = field(default_factory=dict)
    _alike: dict[Any, str] = field(default_factory=dict)

    def find(self, module: nn.Module) -> Held | str | None:
        """How a module holds a packed weight, why it cannot be taken, or None."""
        if module not in self._found:
            found = layout.find(module)
            if isinstance(found, Held):
                away = [t.device for t in found.tensors(module) if t.is_meta]
                found = NOWHERE.format(away[0]) if away else found
            self._found[module] = found
        return self._found[module]

    def packed(self, module: nn.Module, held: Held, recorded: frozenset[torch.dtype]) -> Packed:
        """With the dtypes of x in which the module is what its layout says."""
        return Packed(held, {d: self._why_not(module, held, d, d in recorded) for d in self.dtypes})

    def _why_not(self, module: nn.Module, held: Held, dtype: torch.dtype, each: bool) -> str:
        if held.dtypes is not None and dtype not in held.dtypes:
            return NARROW.format(dtype)
        key = (kind_of(module, held), dtype)
        if each or key not in self._alike:
            self._alike[key] = why_not_product(module, held, dtype)
        return self._alike[key]


def packed_product(module: nn.Module, packed: Packed, rows: Rows | None) -> Product:
    """A packed layer, or some of its rows, as a product."""
    held = packed.held
    total = held.read(module).outputs
    start, length = (rows.start, rows.length) if rows else (0, total)
    return Product(module, Slice(start, length, total, held.weight, held.bias), packed)


def taken_linear(product: Product, kept: frozenset[torch.dtype], backend: Backend) -> Kernel:
    """The kernel of a packed layer, proven in a dtype that it was recorded in. Raises Refused."""
    packed = product.packed
    assert packed is not None
    reasons = {dtype: packed.dtypes.get(dtype, UNPROVEN) for dtype in kept}
    kernel = Kernel(backend, products=(product,))
    _refuse(kernel, reasons)
    return kernel


def taken_pair(
    kernel: Kernel, dtypes: dict[torch.dtype, str], made: dict[str, bool]
) -> dict[torch.dtype, str]:
    """The dtypes of a gated pair in which gate and up are proven as well. Raises Refused.

    made: whether each of the two layers, by its path, runs on a kernel.
    """
    for path, runs in made.items():
        if not runs:
            raise Refused(PART.format(path))
    if len({kind(product) for product in kernel.products}) > 1:
        raise Refused(TWO_FORMATS)
    for packed in kernel.packs:
        own = {} if packed is None else packed.dtypes
        dtypes = {d: reason or own.get(d, UNPROVEN) for d, reason in dtypes.items()}
    _refuse(kernel, dtypes)
    return dtypes


def _refuse(kernel: Kernel, reasons: dict[torch.dtype, str]) -> None:
    """Raise Refused where no dtype without a reason has a kernel."""
    found = ""
    for dtype, reason in reasons.items():
        device = kernel.parameters()[0].device
        x = torch.empty(1, kernel.width, dtype=dtype, device=device)
        found = reason or kernel.bind(x)[1]
        if not found:
            return
    raise Refused(found or UNPROVEN)


def kind(product: Product) -> Any:
    """What products have in common that one call takes: a format, a dtype, a layout."""
    if product.packed is None:
        return product.rows.turned
    weight, bias = part(*product)
    assert isinstance(weight, Weight)
    parts = (weight.scales, weight.zeros, weight.offsets, bias)
    dtypes = tuple(None if given is None else given.dtype for given in parts)
    return weight.format.name, weight.group, weight.values.dtype, weight.table is None, dtypes
