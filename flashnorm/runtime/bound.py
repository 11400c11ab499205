"""A kernel bound to the parameters of modules: once, and again when one of them moves."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import astuple
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from flashnorm.compat.torch_names import without_torch_function
from flashnorm.kernels import norms
from flashnorm.kernels.backend import Backend, Bound
from flashnorm.kernels.call import Call
from flashnorm.kernels.weights import AnyWeight, Weight
from flashnorm.kernels.weights import part as packed_part
from flashnorm.quantized.layout import Held, Unreadable, version
from flashnorm.runtime.spec import NO_NORM, Laid, Norm, Slice, read_spec

UNPROVEN = "what the module computes in this dtype was not held against its packed weight"
LEFT = (KeyError, AttributeError)  # where a tensor is no longer there
GONE = "a parameter is no longer held by its module: it is computed, or was removed"


class Packed(NamedTuple):
    """How a linear module holds a packed weight; why not, for each dtype of x that is not taken."""

    held: Held
    dtypes: dict[torch.dtype, str]


class Product(NamedTuple):
    """A linear module, and which of its rows are multiplied."""

    module: nn.Module
    rows: Slice
    packed: Packed | None = None


class Kernel:
    """norm + products of the modules that hold the parameters: [.., n] to [.., k_i] each.

    Without products it is the norm alone. Nothing is copied: the memory of the parameters is read
    where it lies, and any change of place or dtype is noticed at the next call.
    """

    def __init__(
        self,
        backend: Backend,
        norm: Norm = NO_NORM,
        holder: nn.Module | None = None,
        products: Sequence[Product] = (),
        activation: str | None = None,
    ) -> None:
        self.backend, self.norm, self.holder = backend, norm, holder
        self.products, self.activation = tuple(products), activation
        self.modules = tuple(product.module for product in self.products)
        self.packs = tuple(product.packed for product in self.products)
        self.packed = any(packed is not None for packed in self.packs)
        self._slots: list[tuple[dict[str, Any], str]] = [
            (module._parameters, name) for module, name in self._names()
        ]
        self._layers = [(p.module, p.packed.held) for p in self.products if p.packed is not None]
        self.laid: list[Laid] = []  # of packed products, while a step is traced
        # How many elements of x are worth the kernel; with more of them a library is faster.
        self.most = self._most(compiled=False)
        self.written = self._write()
        self._bound: tuple[list[Any], Bound | None, str] = ([], None, "")
        self._kept: list[AnyWeight] = []  # packed weights, parts of which are made for a call

    def _most(self, compiled: bool) -> dict[torch.dtype, int]:
        n, count = self._weight(self.products[0]).shape[1] if self.products else 0, self.products
        limits = self.backend.limits
        if self.packed:  # a graph that reads wrapped tensors runs the modules' own code
            wrapped = compiled and not self.laid
            return dict.fromkeys(limits.dtypes, 0 if wrapped else n * limits.packed)
        most = {d: self.backend.rows(d, n, len(count), compiled) for d in limits.dtypes}
        if any(product.rows.turned for product in self.products):
            most = {dtype: min(rows, limits.turned) for dtype, rows in most.items()}
        return {dtype: n * rows for dtype, rows in most.items()}

    def _write(self) -> str:
        """The kernel as a text, which `read_spec` reads."""
        rows = [product.rows for product in self.products]
        most = [(str(dtype), most) for dtype, most in self._most(compiled=True).items() if most]
        device, policy = self.backend.device, self.backend.compiled
        unknown = [str(dtype) for dtype in policy.unknown]
        made = [astuple(self.norm), rows, self.activation]
        adds, defers = self.backend.uses("residual"), self.backend.uses("deferral")
        rest = [policy.alone and adds, policy.precompute, most, unknown]
        rest += [policy.fuses and adds, policy.defers and defers and not self.packed, self.laid]
        return json.dumps([*made, device, *rest])

    def lay(self, laid: list[Laid]) -> None:
        """From now on packed weights are read from buffers, or again from their modules."""
        self.laid = laid
        self.written = self._write()

    def formats(self) -> list[Any]:
        """How the packed weights of its products lie; empty where all are dense."""
        found = [part(*product)[0] for product in self.products if product.packed is not None]
        return [
            (w.format.name, w.outputs, w.features, w.group, [t.dtype for t in w.tensors()])
            for w in found
            if isinstance(w, Weight)
        ]

    @property
    def width(self) -> int:
        """n: features of x."""
        return int(self._weight(self.products[0]).shape[1])

    @staticmethod
    def _weight(product: Product) -> AnyWeight:
        if product.packed is not None:
            return product.packed.held.read(product.module)
        return whole(product.module, product.rows)

    def _names(self) -> list[tuple[nn.Module, str]]:
        found = []
        if self.holder is not None:
            found += [(self.holder, name) for name in self.norm.names() if name]
        for module, rows, packed in self.products:
            names = (rows.weight, rows.bias) if packed is None else ()
            found += [(module, name) for name in names if name]
        return found

    def parameters(self) -> list[Tensor]:
        """All that is read, as far as it is there."""
        found = [held[name] for held, name in self._slots if held.get(name) is not None]
        try:
            return found + self._packed_tensors()
        except (*LEFT, Unreadable):
            return found

    def _packed_tensors(self) -> list[Tensor]:
        """What packed products are made of. Raises where it is gone, as `Held.tensors` does."""
        found: list[Tensor] = []
        for module, held in self._layers:
            found += held.tensors(module)
            if held.bias:
                found.append(_held_bias(module, held))
        return found

    def bind(self, x: Tensor) -> tuple[Bound | None, str]:
        """What the backend has bound for an x like this, or None and why there is none."""
        if not self.backend.keeps:
            return self._bind(x)
        state: list[Any] = [x.dtype, x.shape[-1]]
        try:
            for held, name in self._slots:
                p = held[name]
                strides = p.is_contiguous() or p.stride()
                state += (p.data_ptr(), type(p), p.dtype, p.shape, strides)
            if self.packed:
                with without_torch_function():  # of a subclass that goes through Python otherwise
                    for p in self._packed_tensors():
                        state += (p.data_ptr(), version(p), p.dtype, p.shape, p.stride())
        except LEFT:
            return None, GONE
        except Unreadable as reason:
            return None, str(reason)
        except RuntimeError:  # there is no memory to point to
            return None, self.why_not(x) or GONE
        bound = self._bound
        if bound[0] != state:
            self._bound = bound = (state, *self._bind(x))
        return bound[1:]

    def _bind(self, x: Tensor) -> tuple[Bound | None, str]:
        try:
            if reason := self.why_not(x):
                return None, reason
            call = self.call(x)
        except LEFT:
            return None, GONE
        except Unreadable as reason:
            return None, str(reason)
        self._kept = list(call.weights) if self.packed else []
        found = self.backend.bind(call)
        return (None, found) if isinstance(found, str) else (found, "")

    def call(self, x: Tensor) -> Call:
        """The arguments, as the plain functions take them."""
        made = read_spec(self.written)
        norm = made.norm
        gain, bias, alpha = self._vectors(norm)
        if made.laid:
            weights: list[AnyWeight] = [
                laid.read(module) for module, laid in zip(self.modules, made.laid, strict=True)
            ]
            biases = [_bias(*product) for product in zip(self.modules, made.products, strict=True)]
            pairs = list(zip(weights, biases, strict=True))
        else:
            found = zip(self.modules, made.products, self.packs, strict=True)
            pairs = [part(*product) for product in found]
        return Call(
            x,
            [weight for weight, _ in pairs],
            [bias for _, bias in pairs],
            norms.KINDS[norm.kind],
            norm.eps,
            gain,
            norm.offset,
            bias,
            alpha,
            activation=made.activation,
        )

    def _vectors(self, norm: Norm) -> list[Tensor | None]:
        """Gain, bias and α. (torch.compile cannot call a method of a constant.)"""
        return [self._held(name) for name in (norm.gain, norm.bias, norm.alpha)]

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
        for packed in self.packs:
            if packed is not None and (reason := packed.dtypes.get(x.dtype, UNPROVEN)):
                return reason
        for product in self.products:
            total, found = product.rows.total, self._weight(product).shape[0]
            if found != total:
                return f"a weight had {total} rows and has {found} now"
        return self.misfit(x)

    def misfit(self, x: Tensor) -> str:
        """Why the norm's parameters, as they are now, are not those of one for x, or empty."""
        return misfit(x.shape[-1:], *self._vectors(read_spec(self.written).norm))

    def __getstate__(self) -> dict[str, Any]:
        """Without what was bound, which holds addresses of this process."""
        return {**self.__dict__, "_bound": ([], None, ""), "_kept": []}


def misfit(
    width: torch.Size, gain: Tensor | None, bias: Tensor | None, alpha: Tensor | None
) -> str:
    """Why these are not [n], [n] and one number; a module would broadcast what they are."""
    for vector in (gain, bias):
        if vector is not None and vector.shape != width:
            return f"a gain or a bias is {list(vector.shape)}, and not {list(width)} like x"
    if alpha is not None and alpha.shape not in ((), (1,)):
        return f"alpha is {list(alpha.shape)}, and no longer one number"
    return ""


def whole(module: nn.Module, rows: Slice) -> Tensor:
    """The weight with all its rows, [out, in], as it is now."""
    held: Tensor = getattr(module, rows.weight)
    return held.T if rows.turned else held


def part(
    module: nn.Module, rows: Slice, packed: Packed | None = None
) -> tuple[AnyWeight, Tensor | None]:
    """These rows of the weight and of the bias, as they are now."""
    weight = whole(module, rows) if packed is None else packed.held.read(module)
    bias = _bias(module, rows)
    if rows.length == weight.shape[0]:
        return weight, bias
    chosen = slice(rows.start, rows.start + rows.length)
    if isinstance(weight, Weight):
        return packed_part(weight, rows.start, rows.length), bias
    return weight[chosen], bias


def _bias(module: nn.Module, rows: Slice) -> Tensor | None:
    """These rows of the bias, if there is one."""
    bias: Tensor | None = getattr(module, rows.bias) if rows.bias else None
    if bias is None or rows.length == rows.total:
        return bias
    return bias[rows.start : rows.start + rows.length]


def _held_bias(module: nn.Module, held: Held) -> Tensor:
    """The bias of a module with a packed weight: a parameter or a buffer of its own."""
    found: Tensor | None = module._parameters.get(held.bias)
    found = module._buffers[held.bias] if found is None else found
    if found is None:
        raise KeyError(held.bias)
    return found
