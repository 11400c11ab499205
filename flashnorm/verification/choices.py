"""Discrete choices inside a forward pass, such as the experts that a router takes for a token.

Where two scores tie within rounding, two correct models may choose differently, and their outputs
then differ by much more than any rounding. So the choices of the reference are recorded, and the
candidate follows them wherever its own scores call it a tie. A choice that is no tie stays its own.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

CHOOSING = ("aten::topk", "aten::max", "aten::argmax")


class Choices:
    """The indices that topk, max and argmax gave for floating scores, in the order of execution.

    `turned` counts the rows in which the reference's choice was taken over, because it scores
    within `tolerance`, relative to the largest score, of the model's own.
    """

    def __init__(self, made: list[Tensor] | None = None, tolerance: float = 0.0) -> None:
        self.made: list[Tensor] = []
        self.turned = 0
        self._ahead = None if made is None else iter(made)
        self._tolerance = tolerance

    def follower(self, tolerance: float) -> Choices:
        """For a second model that runs the same inputs."""
        return Choices(self.made, tolerance)

    def settle(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> Any:
        """Record the choice in `result` of the operation, or answer with the recorded one."""
        scores, dim = args[0], _axis(name, args, kwargs)
        own = result if isinstance(result, Tensor) else result[-1]
        if dim is None or own.is_floating_point() or not scores.is_floating_point():
            return result
        if self._ahead is None:
            self.made.append(own)
            return result
        theirs = next(self._ahead, None)
        if theirs is None or theirs.shape != own.shape:
            self._ahead = iter(())  # another course of events: nothing can be followed from here
            return result
        if torch.equal(own, theirs):
            return result
        squeezed = own.ndim < scores.ndim
        if squeezed:
            own, theirs = own.unsqueeze(dim), theirs.unsqueeze(dim)
        chosen = self._follow(scores, own, theirs, dim)
        values = scores.gather(dim, chosen)
        if squeezed:
            chosen, values = chosen.squeeze(dim), values.squeeze(dim)
        return chosen if isinstance(result, Tensor) else (values, chosen)

    def _follow(self, scores: Tensor, own: Tensor, theirs: Tensor, dim: int) -> Tensor:
        """Row by row along `dim`: theirs where it ties with own, else own."""
        gap = (scores.gather(dim, own) - scores.gather(dim, theirs)).nan_to_num(nan=0.0).abs()
        finite = scores[scores.isfinite()]
        scale = finite.abs().max() if finite.numel() else scores.new_zeros(())
        tie = gap.amax(dim, keepdim=True) <= self._tolerance * scale
        differs = (own != theirs).any(dim, keepdim=True)
        self.turned += int((tie & differs).sum())
        return torch.where(tie, theirs, own)


def _axis(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> int | None:
    """The axis along which the operation chooses, None where it chooses among all elements."""
    position, default = (2, -1) if name == "aten::topk" else (1, None)
    value = args[position] if len(args) > position else kwargs.get("dim", default)
    return value if isinstance(value, int) else None
