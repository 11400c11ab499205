"""A kernel bound to the parameters of modules: packed once, and again when one of them moves."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import astuple, dataclass
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from flashnorm.kernels.call import Call, check
from flashnorm.kernels.cpu import calls as cpu


@dataclass(frozen=True)
class Norm:
    """What a norm module computes: `norm(x) · (offset + gain) + bias`, by the names it holds.

    kind is that of `kernels.call.NORMS`; gain and bias are attributes of the module, or empty.
    """

    kind: str
    eps: float
    gain: str = ""
    offset: float = 0.0
    bias: str = ""


class Slice(NamedTuple):
    """Rows `start : start + length` of a linear module's weight, and of its bias if it has one.

    `total` is how many rows the weight has in all.
    """

    start: int
    length: int
    total: int
    weight: str = "weight"
    bias: str = ""


class Product(NamedTuple):
    """A linear module, and which of its rows are multiplied."""

    module: nn.Module
    rows: Slice


class Recipe(NamedTuple):
    """What a kernel is made of but for modules; `most` by the numbers of `cpu.DTYPES`."""

    norm: Norm
    products: list[Slice]
    activation: str | None
    most: list[int]


@torch.compiler.assume_constant_result
def recipe(written: str) -> Recipe:
    """What a text stands for: a compiled graph checks the text at every call, not every field."""
    return _read(written)


@cache
def _read(written: str) -> Recipe:
    norm, products, activation, most = json.loads(written)
    return Recipe(Norm(*norm), [Slice(*rows) for rows in products], activation, most)


NONE = Norm("none", 0.0)
GONE = "a parameter is no longer held by its module: it is computed, or was removed"


class Kernel:
    """norm + products of the modules that hold the parameters: [.., n] to [.., k_i] each.

    Without products it is the norm alone. Nothing is copied: the memory of the parameters is read
    where it lies, and any change of place or dtype is noticed at the next call.
    """

    def __init__(
        self,
        norm: Norm = NONE,
        holder: nn.Module | None = None,
        products: Sequence[Product] = (),
        activation: str | None = None,
    ) -> None:
        self.norm, self.holder, self.products = norm, holder, tuple(products)
        self.activation = activation
        self.modules = tuple(module for module, _ in self.products)
        widths = [rows.length for _, rows in self.products]
        self.widths = widths[:1] if activation else widths
        self._slots: list[tuple[dict[str, Any], str]] = [
            (module._parameters, name) for module, name in self._names()
        ]
        # How many elements of x are worth the kernel; with more of them a library is faster.
        n = self._weight(self.products[0]).shape[1] if products else 0
        count = len(self.products)
        self.most = {dtype: n * cpu.rows_for(dtype, n, count) for dtype in cpu.DTYPES}
        self.written = self._write()
        self._bound: tuple[list[Any], bytes, int, str] = ([], b"", 0, "")

    def _write(self) -> str:
        """The kernel as a text, which `recipe` reads."""
        rows = [rows for _, rows in self.products]
        most = [self.most[dtype] for dtype in cpu.DTYPES]
        return json.dumps([astuple(self.norm), rows, self.activation, most])

    @staticmethod
    def _weight(product: Product) -> Tensor:
        found: Tensor = getattr(product.module, product.rows.weight)
        return found

    def _names(self) -> list[tuple[nn.Module, str]]:
        found = []
        if self.holder is not None:
            found += [(self.holder, name) for name in (self.norm.gain, self.norm.bias) if name]
        for module, rows in self.products:
            found += [(module, name) for name in (rows.weight, rows.bias) if name]
        return found

    def parameters(self) -> list[Tensor]:
        return [held[name] for held, name in self._slots if held.get(name) is not None]

    def bind(self, x: Tensor) -> tuple[bytes, int, str]:
        """The packed call, how many elements of x it may take, and why there is none ("" if so)."""
        state: list[Any] = [x.dtype, x.shape[-1]]
        try:
            for held, name in self._slots:
                p = held[name]
                strides = p.is_contiguous() or p.stride()
                state += (p.data_ptr(), type(p), p.dtype, p.shape, strides)
        except (AttributeError, KeyError):
            return b"", 0, GONE
        except RuntimeError:  # there is no memory to point to
            return b"", 0, self.why_not(x) or GONE
        bound = self._bound
        if bound[0] != state:
            self._bound = bound = (state, *self._pack(x))
        return bound[1:]

    def call(self, x: Tensor) -> Call:
        """The arguments, as the plain functions take them."""
        made = recipe(self.written)
        norm = made.norm
        gain, bias = (self._held(name) for name in (norm.gain, norm.bias))
        pairs = [part(*product) for product in zip(self.modules, made.products, strict=True)]
        return Call(
            x,
            [weight for weight, _ in pairs],
            [bias for _, bias in pairs],
            norm.kind,
            norm.eps,
            gain,
            norm.offset,
            bias,
            activation=made.activation,
        )

    def _held(self, name: str) -> Tensor | None:
        return getattr(self.holder, name) if name else None

    def why_not(self, x: Tensor) -> str:
        """Why the parameters, as they are now, do not fit x or what they were; empty if they do."""
        for held, name in self._slots:
            if (parameter := held.get(name)) is None:
                return GONE
            if type(parameter) not in (Tensor, nn.Parameter):
                return f"a parameter is a {type(parameter).__name__}, not a plain tensor"
            if parameter.dtype != x.dtype:
                return f"x is {x.dtype}, a parameter is {parameter.dtype}"
        for product in self.products:
            total, found = product.rows.total, self._weight(product).shape[0]
            if found != total:
                return f"a weight had {total} rows and has {found} now"
        return ""

    def _pack(self, x: Tensor) -> tuple[bytes, int, str]:
        if reason := self.why_not(x):
            return b"", 0, reason
        call = self.call(x)
        try:
            check(call)
        except ValueError as error:
            return b"", 0, str(error)
        if unfit := cpu.why_not(call):
            return b"", 0, unfit
        return cpu.pack(call), cpu.most_rows(call) * x.shape[-1], ""


def part(module: nn.Module, rows: Slice) -> tuple[Tensor, Tensor | None]:
    """These rows of the weight and of the bias, as they are now."""
    weight = getattr(module, rows.weight)
    bias = getattr(module, rows.bias) if rows.bias else None
    if rows.length == weight.shape[0]:
        return weight, bias
    chosen = slice(rows.start, rows.start + rows.length)
    return weight[chosen], None if bias is None else bias[chosen]
