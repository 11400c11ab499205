"""Weights: dense ones, and those in a packed format, which kernels decode as they load them.

A dense weight is a tensor as it is, [k, n]; in any other format it is a `Weight`. A call takes
both. `register` adds a format (`kernels/formats`, a file for each family), which runs on the
reference (its dequantized values) until a kernel decodes it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

# The dtypes of x, parameters and dense weights that kernels know, by their numbers in csrc/api.h.
DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
BOOLEAN = 3  # of an attention mask, beside these
ZEROS = DTYPES | {torch.int8: 4, torch.uint8: 5}  # of the zeros of packed weights
HALVES = (torch.bfloat16, torch.float16)
FP8, INT8 = torch.float8_e4m3fn, torch.int8
# The largest number of a dtype that weights and rows are quantized to.
LARGEST = {FP8: 448.0, INT8: 127.0}


@dataclass(frozen=True, eq=False)
class WeightFormat:
    """How the numbers of a weight lie in memory.

    dequantize(weight): W as the products see it, [k, n], in float64. unfit(weight): why its tensors
    do not lie as the format says, or empty; kernels ask before they read. code: the format's number
    in csrc/api.h, or None where no kernel of the CPU decodes it. cut(values, start, stop): what the
    outputs start : stop take of the values, as a view.
    """

    name: str
    dequantize: Callable[[Weight], Tensor]
    unfit: Callable[[Weight], str] = lambda weight: ""
    code: int | None = None
    cut: Callable[[Tensor, int, int], Tensor] = lambda values, start, stop: values[start:stop]

    def __reduce__(self) -> tuple[Any, ...]:
        return find, (self.name,)

    def __deepcopy__(self, memo: dict[int, Any]) -> WeightFormat:
        return self

    def __repr__(self) -> str:
        return f"WeightFormat({self.name!r})"


class Weight(NamedTuple):
    """A weight [outputs, features] in a format: values as they lie, and what they are scaled by.

        W = (values − zeros) · scales + offsets,  or  table[values] · scales

    scales, zeros, offsets: [k, groups], in any strides and any dtype of kernels (zeros also as
    integers of 8 bits), each for `group` features in a row; where a block of values holds its own
    scale, as in a GGUF file, there are none. table: [16], float32.
    """

    values: Tensor
    format: WeightFormat
    scales: Tensor | None
    outputs: int
    features: int
    group: int = 0
    zeros: Tensor | None = None
    offsets: Tensor | None = None
    table: Tensor | None = None

    @property
    def dtype(self) -> torch.dtype:
        """Of the values."""
        return self.values.dtype

    @property
    def shape(self) -> torch.Size:
        """[k, n], whatever the values take."""
        return torch.Size((self.outputs, self.features))

    def dim(self) -> int:
        return 2

    @property
    def device(self) -> torch.device:
        return self.values.device

    def rows(self, which: slice | Tensor) -> Weight:
        """Some rows: a view for a slice, a copy for indices."""
        values = self.values[: self.outputs][which]
        return self._replace(values=values, outputs=values.shape[0])

    def tensors(self) -> list[Tensor]:
        """All that it is made of."""
        given = (self.values, self.scales, self.zeros, self.offsets, self.table)
        return [tensor for tensor in given if tensor is not None]

    def dequantized(self) -> Tensor:
        """W as the products see it: [k, n], float64."""
        return self.format.dequantize(self)

    def unfit(self) -> str:
        """Why it is not as its format says; empty where it is."""
        groups = -(-self.features // self.group) if self.group else 1
        for part, name in (
            (self.scales, "scales"),
            (self.zeros, "zeros"),
            (self.offsets, "offsets"),
        ):
            if part is not None and (
                part.dim() != 2 or part.shape[0] < self.outputs or part.shape[1] < groups
            ):
                return f"{name} are {list(part.shape)}, for {self.outputs} rows in {groups} groups"
        return self.format.unfit(self)


AnyWeight = Tensor | Weight


def part(weight: Weight, start: int, length: int) -> Weight:
    """The outputs `start : start + length` of a weight; nothing is copied."""
    stop = start + length
    scales, zeros, offsets = (
        given if given is None else given[start:stop]
        for given in (weight.scales, weight.zeros, weight.offsets)
    )
    values = weight.format.cut(weight.values, start, stop)
    return weight._replace(
        values=values, scales=scales, zeros=zeros, offsets=offsets, outputs=length
    )


FORMATS: dict[str, WeightFormat] = {}


def register(row: WeightFormat) -> WeightFormat:
    """Let weights be of a format. Raises ValueError where there is another of that name."""
    if FORMATS.setdefault(row.name, row) is not row:
        raise ValueError(f"there is a weight format {row.name!r} already")
    return row


def find(name: str) -> WeightFormat:
    """The format of this name. Raises ValueError where there is none."""
    if name not in FORMATS:
        raise ValueError(f"no weight format {name!r}: there are {', '.join(FORMATS)}")
    return FORMATS[name]


def dense(weight: AnyWeight, dtype: torch.dtype) -> Tensor:
    """W as a tensor of a dtype: what the reference multiplies."""
    return (weight.dequantized() if isinstance(weight, Weight) else weight).to(dtype)


def memories(weights: Iterable[AnyWeight]) -> list[Tensor]:
    """The tensors that hold the numbers of weights."""
    found: list[Tensor] = []
    for weight in weights:
        found += weight.tensors() if isinstance(weight, Weight) else [weight]
    return found


def dense_rows(weight: Tensor) -> bool:
    """Whether the features of each output lie one behind the other."""
    return weight.is_contiguous() or weight.stride(1) == 1


def turned(weight: AnyWeight) -> bool:
    """Whether a dense weight is a view of one held as [in, out], whose rows are dense there."""
    if isinstance(weight, Weight):
        return False
    return weight.stride(0) == 1 and not dense_rows(weight) and weight.stride(1) > 1


def joined(tensors: Sequence[Tensor]) -> Tensor | None:
    """Tensors that lie one behind the other in memory, as one along the first axis; or None."""
    first, rows = tensors[0], 0
    for tensor in tensors:
        place = first.storage_offset() + rows * first.stride(0)
        if not (tensor.is_contiguous() and tensor.shape[1:] == first.shape[1:]):
            return None
        if tensor.dtype != first.dtype or tensor.storage_offset() != place:
            return None
        if tensor.untyped_storage().data_ptr() != first.untyped_storage().data_ptr():
            return None
        rows += tensor.shape[0]
    return first.as_strided((rows, *first.shape[1:]), first.stride())


def packed(weights: Any) -> Weight | None:
    """The first of these that is not dense, if there is one."""
    for weight in weights:
        if type(weight) is Weight:
            return weight
    return None
