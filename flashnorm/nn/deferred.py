"""A norm whose scale is applied later, and norms that undo it (E4, E7): the plain reference.

The scale of a row goes from the one to the others beside the values, so that no forward of a model
has to change. Every thread has its own.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from flashnorm.nn.norms import FlashRMSNorm


class RowScale:
    """`1/s² = mean(x²) + ε` of the rows that a norm saw last in this thread: [.., 1].

    float32, float64 for rows of float64. `get` raises RuntimeError where no norm ran before.
    """

    def __init__(self) -> None:
        self._held = threading.local()

    def set(self, inverse_square: Tensor) -> None:
        """Keep 1/s², [.., 1], for this thread."""
        self._held.value = inverse_square

    def get(self) -> Tensor:
        """The 1/s², [.., 1], that was set last in this thread; RuntimeError where none was."""
        try:
            return self._held.value
        except AttributeError:
            raise RuntimeError(
                "a norm that undoes another one's scale ran before it: run the model as a whole, "
                "or unfold_ it first"
            ) from None

    def __deepcopy__(self, memo: dict[int, Any]) -> RowScale:
        memo[id(self)] = RowScale()
        return memo[id(self)]

    def __reduce__(self) -> tuple[type, tuple[()]]:
        return RowScale, ()


class FlashLinkedRMSNorm(FlashRMSNorm):
    """A norm that leaves its scale to its readers (E4), undoes that of another norm (E7), or both.

    With `undoes`, v comes without the scale s of the other norm, and `ε/s²` stands for ε:
    `s · v / sqrt(mean(s²v²) + ε) = v / sqrt(mean(v²) + ε/s²)`. Axis `rows[i]` of v is the i-th row
    axis of what the other norm read. With `defers` the output is `v · (offset + weight)` alone, and
    the scale waits in `row_scale`, where anybody needs it.

    v: [.., n] in any floating dtype, which the result has too; computed as `FlashRMSNorm` computes.
    `fold_(cancel=True)` makes these. Raises RuntimeError where the other norm did not run before.
    """

    undoes: RowScale | None = None
    rows: tuple[int, ...] = ()
    defers: bool = False
    row_scale: RowScale | None = None

    def forward(self, v: Tensor) -> Tensor:
        wide = v.to(torch.promote_types(v.dtype, torch.float32))
        if not self.defers:
            return self._scaled(wide, self._inverse_square(wide), v)
        if self.row_scale is not None:
            self.row_scale.set(self._inverse_square(wide))
        if self.weight is None:
            return v
        return (wide * (self.offset + self.weight.to(wide.dtype))).to(v.dtype)

    def _inverse_square(self, wide: Tensor) -> Tensor:
        mean_square = wide.pow(2).mean(-1, keepdim=True)
        if self.undoes is None:
            return mean_square + self.eps
        sizes = [size if axis in self.rows else 1 for axis, size in enumerate(wide.shape)]
        return mean_square + self.eps * self.undoes.get().reshape(sizes)


class ScaleFeatures:
    """A forward hook on a linear layer: `y = s · y` on features that (start, length) pairs name.

    y: [.., k] in any floating dtype, s: [.., 1] from `row_scale`; the product is made in the dtype
    of s and rounded to that of y. Raises RuntimeError where no norm set the scale.
    """

    def __init__(self, row_scale: RowScale, features: Sequence[tuple[int, int]]) -> None:
        self.row_scale, self.features = row_scale, tuple(features)

    def __call__(self, module: nn.Module, given: Any, output: Tensor) -> Tensor:
        scale = self.row_scale.get().rsqrt()
        scaled = output.clone()
        for start, length in self.features:
            part = output[..., start : start + length]
            scaled[..., start : start + length] = (part.to(scale.dtype) * scale).to(output.dtype)
        return scaled
