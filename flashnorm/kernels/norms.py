"""The kinds of norms, a row each: all that the package knows of one stands here.

    z = x̂ ⊙ (offset + g) + β,   x̂ = norm(x)

A row says what a norm computes per row of x (its statistics), x̂ from that, and the gradient of it;
what the analysis may do with it; and its number in the kernels. `register` adds another one, which
runs on the reference until a kernel has it. Source: FlashNorm, arXiv 2407.09577.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

# (s, μ), each [.., 1], or None where the norm has none.
Statistics = tuple[Tensor | None, Tensor | None]


def _no_statistics(x: Tensor, eps: float) -> Statistics:
    return None, None


def _as_it_is(x: Tensor, scale: Tensor | None, mean: Tensor | None, alpha: Tensor | None) -> Tensor:
    return x


def _same(d: Tensor, hat: Tensor) -> Tensor:
    return d


def _unchanged(d: Tensor, hat: Tensor, scale: Tensor | None, alpha: Tensor | None) -> Tensor:
    return d


@dataclass(frozen=True, eq=False)
class NormKind:
    """One kind of norm. All functions take and give float32 or float64, x as [.., n].

    statistics(x, ε): (s, μ), what is computed per row.
    hat(x, s, μ, α): x̂.
    inner(dx̂, x̂): the gradient inside of the norm's own function, `dx̂ ⊙ f'`.
    backward(d, x̂, s, α): dx from that.
    statistic: what s is the inverse root of the mean of: "square" or "variance"; empty where x̂ is
    not x times a number per row. centers: μ is taken off first. undone: another norm behind a
    linear layer may undo the scale (E7). learns_alpha: x is multiplied by a learned number α.
    code: its number in csrc/api.h; None where no kernel knows it.
    """

    name: str
    code: int | None = None
    statistics: Callable[[Tensor, float], Statistics] = _no_statistics
    hat: Callable[[Tensor, Tensor | None, Tensor | None, Tensor | None], Tensor] = _as_it_is
    inner: Callable[[Tensor, Tensor], Tensor] = _same
    backward: Callable[[Tensor, Tensor, Tensor | None, Tensor | None], Tensor] = _unchanged
    statistic: str = ""
    centers: bool = False
    undone: bool = False
    learns_alpha: bool = False

    @property
    def scales(self) -> bool:
        """Whether x̂ is x, or x − μ, times one number per row."""
        return bool(self.statistic)

    def __reduce__(self) -> tuple[Any, ...]:
        return find, (self.name,)

    def __deepcopy__(self, memo: dict[int, Any]) -> NormKind:
        return self

    def __repr__(self) -> str:
        return f"NormKind({self.name!r})"


# What calls of norm + linear may ask for, by name.
KINDS: dict[str, NormKind] = {}


def register(kind: NormKind) -> NormKind:
    """Let calls ask for a kind by its name. Raises ValueError where another one has it."""
    if KINDS.setdefault(kind.name, kind) is not kind:
        raise ValueError(f"there is a norm {kind.name!r} already")
    return kind


def find(name: str) -> NormKind:
    """The kind of this name. Raises ValueError where there is none."""
    try:
        return KINDS[name]
    except KeyError:
        known = ", ".join(KINDS)
        raise ValueError(f"norm is {name!r}; it must be one of {known}") from None


def recognized(statistic: str, centered: bool) -> str:
    """The name of the kind that divides x, or x − μ, by the root of a statistic, or OTHER."""
    for kind in KINDS.values():
        if kind.scales and (kind.statistic, kind.centers) == (statistic, centered):
            return kind.name
    return OTHER


def described(name: str) -> NormKind:
    """The kind of a norm that was found in a model; one that promises nothing for all others."""
    return KINDS.get(name) or NormKind(name)


def _mean_square(x: Tensor, eps: float) -> Statistics:
    return torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps), None


def _variance(x: Tensor, eps: float) -> Statistics:
    mean = x.mean(-1, keepdim=True)
    return torch.rsqrt((x - mean).pow(2).mean(-1, keepdim=True) + eps), mean


def _scaled(x: Tensor, scale: Tensor | None, mean: Tensor | None, alpha: Tensor | None) -> Tensor:
    x = x if mean is None else x - mean
    return x if scale is None else x * scale


def _tanh(x: Tensor, scale: Tensor | None, mean: Tensor | None, alpha: Tensor | None) -> Tensor:
    return torch.tanh(x if alpha is None else alpha.to(x.dtype) * x)


def _rms_backward(d: Tensor, hat: Tensor, scale: Tensor | None, alpha: Tensor | None) -> Tensor:
    """`s ⊙ (d − x̂ ⟨d, x̂⟩/n)` (E15)."""
    assert scale is not None
    return (d - hat * (d * hat).mean(-1, keepdim=True)) * scale


def _layer_backward(d: Tensor, hat: Tensor, scale: Tensor | None, alpha: Tensor | None) -> Tensor:
    """The same, less the mean of d."""
    assert scale is not None
    inner = d - hat * (d * hat).mean(-1, keepdim=True)
    return (inner - d.mean(-1, keepdim=True)) * scale


def _times_alpha(d: Tensor, hat: Tensor, scale: Tensor | None, alpha: Tensor | None) -> Tensor:
    return d if alpha is None else d * alpha.to(d.dtype)


NONE = register(NormKind("none", 0))
RMS = register(
    NormKind(
        "rms", 1, _mean_square, _scaled, backward=_rms_backward, statistic="square", undone=True
    )
)
LAYER = register(
    NormKind(
        "layer", 2, _variance, _scaled, backward=_layer_backward, statistic="variance", centers=True
    )
)
DYT = register(
    NormKind(
        "dyt",
        3,
        hat=_tanh,
        inner=lambda d, hat: d * (1 - hat * hat),
        backward=_times_alpha,
        learns_alpha=True,
    )
)

# Names that only the analysis gives: statistics over groups of channels and all positions, and
# division by another statistic of x.
GROUP, OTHER = "group", "other"
