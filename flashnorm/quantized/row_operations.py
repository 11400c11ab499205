"""What torch's operations do with a `RowTensor`: those that know rows, and all the others."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from flashnorm.compat.torch_names import tree_map_only
from flashnorm.errors import FlashNormError
from flashnorm.quantized.decoding import decoded, in_blocks
from flashnorm.quantized.row_tensor import RowTensor

Handler = Callable[..., Any]
_aten = torch.ops.aten
_HANDLERS: dict[Any, Handler] = {}


def run(func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    """An operation of which an argument is such a tensor."""
    handler = _HANDLERS.get(func)
    if handler is not None and isinstance(args[0], RowTensor) | (func in _PRODUCTS):
        found = handler(*args, **kwargs)
        if found is not NotImplemented:
            return found
    _refuse_writes(func, args, kwargs)
    args, kwargs = tree_map_only(RowTensor, RowTensor.dequantize, (tuple(args), kwargs))
    return func(*args, **kwargs)


def _refuse_writes(func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> None:
    for i, argument in enumerate(func._schema.arguments):
        if argument.alias_info is None or not argument.alias_info.is_write:
            continue
        given = args[i] if i < len(args) else kwargs.get(argument.name)
        for one in _listed(given):
            if isinstance(one, RowTensor):
                name = func._schema.name.removeprefix("aten::")
                raise FlashNormError(f"{name} would write into {one.WHAT}: {one.MEND}")


def _listed(given: Any) -> Sequence[Any]:
    return given if isinstance(given, (list, tuple)) else [given]


def _handles(*funcs: Any) -> Callable[[Handler], Handler]:
    def keep(handler: Handler) -> Handler:
        _HANDLERS.update(dict.fromkeys(funcs, handler))
        return handler

    return keep


# The same rows.


@_handles(_aten.detach.default, _aten.alias.default, _aten.lift_fresh.default)
def _same(weight: RowTensor) -> RowTensor:
    return weight.again()


@_handles(_aten.clone.default)
def _clone(weight: RowTensor, memory_format: Any = None) -> RowTensor:
    return weight.again(copied=True)


@_handles(_aten._to_copy.default)
def _to_copy(
    weight: RowTensor,
    dtype: torch.dtype | None = None,
    device: Any = None,
    non_blocking: bool = False,
    **other: Any,
) -> Any:
    if dtype is not None and not dtype.is_floating_point:
        return NotImplemented
    return weight.again(dtype, device, non_blocking)


@_handles(_aten.copy_.default)
def _copy(weight: RowTensor, source: Tensor, non_blocking: bool = False) -> RowTensor:
    return weight.write_(source, non_blocking)


# Views.


@_handles(_aten.t.default)
def _t(weight: RowTensor) -> Any:
    if weight.dim() != 2:
        return NotImplemented
    return weight.of(weight.held, weight.shape[::-1], not weight.turned)


@_handles(_aten.transpose.int)
def _transpose(weight: RowTensor, first: int, second: int) -> Any:
    if weight.dim() != 2:
        return NotImplemented
    return _t(weight) if (first - second) % 2 else _same(weight)


@_handles(_aten.permute.default)
def _permute(weight: RowTensor, dims: Sequence[int]) -> Any:
    if weight.dim() != 2:
        return NotImplemented
    return _t(weight) if dims[0] % 2 else _same(weight)


@_handles(_aten.select.int)
def _select(weight: RowTensor, dim: int, index: int) -> Any:
    """One matrix of several, or one row."""
    if not _by_rows(weight, dim):
        return NotImplemented
    index = index + weight.shape[0] if index < 0 else index
    if not 0 <= index < weight.shape[0]:
        raise IndexError(f"there is no index {index} in a first dimension of {weight.shape[0]}")
    each, shape = _rows_of_one(weight), weight.shape[1:]
    part = weight.held.rows(slice(index * each, (index + 1) * each))
    return weight.of(part, shape)


@_handles(_aten.slice.Tensor)
def _slice(
    weight: RowTensor, dim: int = 0, start: Any = None, end: Any = None, step: int = 1
) -> Any:
    if not _by_rows(weight, dim) or step != 1:
        return NotImplemented
    first, last, _ = slice(start, end).indices(weight.shape[0])
    each, count = _rows_of_one(weight), max(0, last - first)
    part = weight.held.rows(slice(first * each, (first + count) * each))
    return weight.of(part, (count, *weight.shape[1:]))


# Rows that are asked for.


@_handles(_aten.embedding.default)
def _embedding(weight: RowTensor, indices: Tensor, *options: Any, **named: Any) -> Any:
    if weight.turned or weight.dim() != 2:
        return NotImplemented
    return _gathered(weight, indices)


@_handles(_aten.index_select.default)
def _index_select(weight: RowTensor, dim: int, index: Tensor) -> Any:
    if not _by_rows(weight, dim):
        return NotImplemented
    return _gathered(weight, index)


@_handles(_aten.index.Tensor)
def _index(weight: RowTensor, indices: Sequence[Tensor | None]) -> Any:
    first = indices[0]
    if not _by_rows(weight, 0) or len(indices) != 1 or first is None:
        return NotImplemented
    if first.dtype in (torch.bool, torch.uint8):
        return NotImplemented
    return _gathered(weight, first, -weight.shape[0])


def _gathered(weight: RowTensor, indices: Tensor, lowest: int = 0) -> Tensor:
    """Rows as numbers, or matrices, of any shape of indices along the first dimension."""
    flat, each, count = indices.reshape(-1).long(), _rows_of_one(weight), weight.shape[0]
    if flat.numel() and not lowest <= int(flat.min()) <= int(flat.max()) < count:
        raise IndexError(f"an index is outside of a first dimension of {count}")
    if each != 1:
        flat = (flat[:, None] * each + torch.arange(each, device=flat.device)).flatten()
    part = weight.held.rows(flat)
    return decoded(part, weight.dtype).view(*indices.shape, *weight.shape[1:])


def _by_rows(weight: RowTensor, dim: int) -> bool:
    """Whether an index along a dimension is one of whole rows."""
    return not weight.turned and weight.dim() > 1 and dim % weight.dim() == 0


def _rows_of_one(weight: RowTensor) -> int:
    """How many packed rows one index of the first dimension stands for."""
    return prod(weight.shape[1:-1])


# Products.


@_handles(_aten.linear.default)
def _linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Any:
    if not isinstance(weight, RowTensor) or weight.turned or weight.dim() != 2:
        return NotImplemented
    return _product(x, weight, bias)


@_handles(_aten.mm.default)
def _mm(x: Tensor, weight: Tensor) -> Any:
    if not isinstance(weight, RowTensor) or not weight.turned or isinstance(x, RowTensor):
        return NotImplemented
    return _product(x, weight, None)


@_handles(_aten.addmm.default)
def _addmm(bias: Tensor, x: Tensor, weight: Tensor, *, beta: Any = 1, alpha: Any = 1) -> Any:
    if not isinstance(weight, RowTensor) or not weight.turned or bias.dim() != 1:
        return NotImplemented
    if isinstance(x, RowTensor) or (beta, alpha) != (1, 1):
        return NotImplemented
    return _product(x, weight, bias.expand(weight.shape[1]))


def _product(x: Tensor, weight: RowTensor, bias: Tensor | None) -> Tensor:
    """x Wᵀ + c in blocks of rows of W, which are decoded one after the other."""
    made = []
    for first, part in in_blocks(weight.held):
        own = None if bias is None else bias[first : first + part.outputs]
        made.append(F.linear(x, decoded(part, weight.dtype), own))
    if not made:
        return x.new_empty((*x.shape[:-1], 0))
    return made[0] if len(made) == 1 else torch.cat(made, -1)


_PRODUCTS = frozenset({_aten.linear.default, _aten.mm.default, _aten.addmm.default})
