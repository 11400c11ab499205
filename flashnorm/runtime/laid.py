"""Packed weights while a step is traced: plain tensors that their modules hold as buffers.

A graph takes tensors as inputs and not what wraps them. So for the time of a trace the tensors that
a packed weight is made of are buffers of its module, under names that say which rows they are of,
and the parameter that wraps them is away; kernels read those, and afterwards all is as it was.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from flashnorm.compat.torch_names import is_traceable_wrapper_subclass
from flashnorm.errors import FlashNormError
from flashnorm.kernels.weights import Weight, find
from flashnorm.kernels.weights import part as cut
from flashnorm.quantized import layout
from flashnorm.quantized.decoding import rounded
from flashnorm.quantized.packed_tensor import PackedTensor
from flashnorm.runtime.bound import Kernel, part
from flashnorm.runtime.spec import Laid

PREFIX = "_flashnorm_"
OWN_CODE = (
    "'{}' reads a packed weight by its own code, so that the model cannot be packaged: "
    "flashnorm.acceleration(model) says why it has no kernel"
)


def names(rows: slice, weight: Weight) -> tuple[str, ...]:
    """What the tensors of these rows of a module's weight are called."""
    return tuple(f"{PREFIX}{rows.start}_{rows.stop}_{i}" for i in range(len(weight.tensors())))


def is_laid(name: str) -> bool:
    """Whether a buffer is a part of a packed weight."""
    return name.rpartition(".")[2].startswith(PREFIX)


class Parts:
    """The parts of a module's packed weight, by their names, as they are now."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module

    def __getitem__(self, name: str) -> Tensor:
        start, stop, number = map(int, name.removeprefix(PREFIX).split("_"))
        weight = _read(self.module)
        return cut(weight, start, stop - start).tensors()[number]


def _read(module: nn.Module) -> Weight:
    held = layout.find(module)
    if isinstance(held, layout.Held):
        return held.read(module)
    weight = module._parameters["weight"]
    assert isinstance(weight, PackedTensor)
    return weight.held


class Embedded(NamedTuple):
    """The rows of an embedding's table that its indices name, decoded: [..] to [.., n]."""

    module: nn.Module
    format: str
    features: int
    dtype: torch.dtype
    name: str

    def __call__(self, ids: Tensor) -> Tensor:
        rows = F.embedding(ids.reshape(-1), getattr(self.module, self.name))
        weight = Weight(rows, find(self.format), None, rows.shape[0], self.features)
        return rounded(weight.dequantized(), self.dtype).view(*ids.shape, self.features)


@contextmanager
def plain_parts(model: nn.Module, kernels: list[Kernel]) -> Iterator[None]:
    """A context in which kernels of a traced model read buffers instead of packed weights.

    Raises FlashNormError where a module that is no embedding and has no kernel holds one.
    """
    with ExitStack() as undo:
        for kernel in kernels:
            if kernel.packed:
                _lay(kernel, undo)
        for path, module in model.named_modules():
            _embed(path, module, undo)
            _put_away(path, module, undo)
        yield


def _lay(kernel: Kernel, undo: ExitStack) -> None:
    laid = []
    for product in kernel.products:
        rows = slice(product.rows.start, product.rows.start + product.rows.length)
        weight, _ = part(*product)
        assert isinstance(weight, Weight)
        called = names(rows, weight)
        for name, tensor in zip(called, weight.tensors(), strict=True):
            _hold(product.module, name, tensor, undo)
        given = (weight.scales, weight.zeros, weight.offsets, weight.table)
        has = [tensor is not None for tensor in given]
        size = (weight.outputs, weight.features, weight.group)
        laid.append(Laid(weight.format.name, *size, list(called), has))
    undo.callback(kernel.lay, [])
    kernel.lay(laid)


def _hold(module: nn.Module, name: str, tensor: Tensor, undo: ExitStack) -> None:
    if name in module._buffers:
        return
    undo.callback(module._buffers.pop, name)
    module._buffers[name] = tensor


def _embed(path: str, module: nn.Module, undo: ExitStack) -> None:
    """An embedding with a packed table decodes the rows that are asked for, in the graph too."""
    weight = module._parameters.get("weight")
    if not isinstance(weight, PackedTensor) or any(map(is_laid, module._buffers)):
        return
    if type(module) is not nn.Embedding or module.max_norm is not None or weight.turned:
        raise FlashNormError(OWN_CODE.format(path))
    rows = slice(0, weight.held.outputs)
    (name,) = names(rows, weight.held)
    _hold(module, name, weight.held.values, undo)
    had = module.__dict__.get("forward")
    if had is not None:
        raise FlashNormError(OWN_CODE.format(path))
    undo.callback(module.__dict__.pop, "forward")
    held = weight.held
    made = Embedded(module, held.format.name, held.features, weight.dtype, name)
    module.__dict__["forward"] = made.__call__


def _put_away(path: str, module: nn.Module, undo: ExitStack) -> None:
    for name, parameter in list(module._parameters.items()):
        if parameter is not None and is_traceable_wrapper_subclass(parameter):
            if not any(map(is_laid, module._buffers)):
                raise FlashNormError(OWN_CODE.format(path))
            undo.callback(module._parameters.__setitem__, name, parameter)
            module._parameters[name] = None


def wrapped(model: nn.Module) -> list[dict[str, Any]]:
    """What tensors that wrap others hold, to notice where one of them gets another."""
    found = {id(p): p for p in model.parameters() if is_traceable_wrapper_subclass(p)}
    return [vars(parameter) for parameter in found.values()]
