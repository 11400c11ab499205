"""What a program does to the rows of matrices, found with matrices that take no memory.

A program that moves numbers and computes none is known by three runs: on the number of each row, on
the number of each column, and on random numbers, whose bits must be those that the first two say.
The matrices are views of a few numbers with strides of their own, and cannot be written to.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from math import prod
from typing import NamedTuple

import numpy as np
import torch
from numpy.lib.stride_tricks import as_strided
from torch import Tensor

from flashnorm.gguf.routes import Array

Program = Callable[[Mapping[str, Array]], dict[str, Tensor]]
Shapes = Mapping[str, tuple[int, ...]]
LARGEST = 1 << 24  # whole numbers up to here are float32's
_ROWS = 1 << 12  # that are compared at once


class Rows(NamedTuple):
    """A result [.., n] whose row r is row `source[r]` of all given rows, one behind the other.

    source: None where the result is what was given. turned: of the transpose.
    """

    shape: tuple[int, ...]
    source: Tensor | None
    turned: bool = False


def rearrangement(program: Program, shapes: Shapes) -> dict[str, Rows] | None:
    """What each result of a program on float32 arrays of these shapes is made of.

    None where a result is anything but whole rows, as they were. All shapes end in the same n.
    """
    features = {shape[-1] for shape in shapes.values()}
    count = sum(prod(shape[:-1]) for shape in shapes.values())
    if len(features) != 1 or not 0 < count < LARGEST or not 0 < min(features) < LARGEST:
        return None
    if len(shapes) == 1 and (same := _untouched(program, shapes)):
        return same
    by_row = program({name: _row_numbers(*given) for name, given in _placed(shapes).items()})
    found = {name: _sources(result) for name, result in by_row.items()}
    del by_row
    by_column = program({name: _column_numbers(shape) for name, shape in shapes.items()})
    if not found or by_column.keys() != found.keys():
        return None
    rows: dict[str, Rows] = {}
    for name, result in by_column.items():
        plain, turned = found[name]
        if plain is not None and _counts(result, result.dim() - 1):
            rows[name] = Rows(tuple(result.shape), plain)
        elif turned is not None and result.dim() == 2 and _counts(result, 0):
            rows[name] = Rows(tuple(result.shape), turned, True)
        else:
            return None
    if any(int(row.source.max()) >= count for row in rows.values() if row.source is not None):
        return None
    del by_column
    return rows if _moves_alone(program, shapes, rows) else None


def _untouched(program: Program, shapes: Shapes) -> dict[str, Rows] | None:
    """Where the only result is the very view that was given: its strides are like no other's."""
    ((name, shape),) = shapes.items()
    steps = tuple(range(len(shape), 0, -1))
    memory = np.zeros(sum(size * step for size, step in zip(shape, steps, strict=True)), np.float32)
    given = _view(memory, shape, steps)
    made = program({name: given})
    if len(made) != 1:
        return None
    ((parameter, result),) = made.items()
    same = result.data_ptr() == memory.ctypes.data and result.stride() == steps
    if not same or tuple(result.shape) != shape or memory.any():
        return None
    return {parameter: Rows(shape, None)}


def _view(memory: Array, shape: tuple[int, ...], steps: tuple[int, ...]) -> Array:
    return as_strided(memory, shape, tuple(4 * step for step in steps), writeable=False)


def _placed(shapes: Shapes) -> dict[str, tuple[tuple[int, ...], int]]:
    """With the number of the first row of each."""
    found, first = {}, 0
    for name, shape in shapes.items():
        found[name] = (shape, first)
        first += prod(shape[:-1])
    return found


def _row_numbers(shape: tuple[int, ...], first: int) -> Array:
    count = prod(shape[:-1])
    rows = np.arange(first, first + count, dtype=np.float32).reshape(*shape[:-1], 1)
    return np.broadcast_to(rows, shape)


def _column_numbers(shape: tuple[int, ...]) -> Array:
    return np.broadcast_to(np.arange(shape[-1], dtype=np.float32), shape)


def _sources(result: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """The numbers along all rows, if each row has one; and those along the columns."""
    plain = turned = None
    if result.dtype == torch.float32 and result.dim() > 1:
        if bool((result == result[..., :1]).all()):
            plain = _whole(result[..., 0].flatten())
        if result.dim() == 2 and bool((result == result[:1]).all()):
            turned = _whole(result[0])
    return plain, turned


def _whole(numbers: Tensor) -> Tensor | None:
    found = numbers.long()
    return found if bool((found == numbers).all()) and bool((found >= 0).all()) else None


def _counts(result: Tensor, dim: int) -> bool:
    """Whether numbers count from 0 on along a dimension, and are the same along all others."""
    numbers = torch.arange(result.shape[dim], dtype=torch.float32)
    shape = [-1 if i == dim else 1 for i in range(result.dim())]
    return result.dtype == torch.float32 and bool((result == numbers.view(shape)).all())


def _moves_alone(program: Program, shapes: Shapes, rows: Mapping[str, Rows]) -> bool:
    """Whether random numbers come out with the bits that the rows say. Each row is another one."""
    (features,) = {shape[-1] for shape in shapes.values()}
    count, step = sum(prod(shape[:-1]) for shape in shapes.values()), 3
    memory = np.random.default_rng(0).standard_normal(step * count + features, np.float32)
    given = {}
    for name, (shape, first) in _placed(shapes).items():
        steps = [step * prod(shape[i + 1 : -1]) for i in range(len(shape) - 1)]
        given[name] = _view(memory[step * first :], shape, (*steps, 1))
    every = torch.from_numpy(memory).as_strided((count, features), (step, 1))
    results = program(given)
    return results.keys() == rows.keys() and all(
        _same_bits(results[name], every, row) for name, row in rows.items()
    )


def _same_bits(result: Tensor, every: Tensor, row: Rows) -> bool:
    found = result.T if row.turned else result.reshape(-1, every.shape[1])
    source = row.source
    if source is None or len(source) != len(found):
        return False
    parts = (slice(i, i + _ROWS) for i in range(0, len(found), _ROWS))
    return all(bool((_bits(found[part]) == _bits(every[source[part]])).all()) for part in parts)


def _bits(numbers: Tensor) -> Tensor:
    return numbers.contiguous().view(torch.int32)
