"""A norm and the linear layers that read it as one module (E4, E5, E6), for new models.

    z = norm(x) · (gain_offset + gain) + norm_bias

with norm "rms", "layer", "dyt" or "none". A new model needs no gain and no norm_bias, which are
left out unless asked for: the weight behind the norm learns what they would (E1, E2). x: [.., n] in
any floating dtype, which is that of the results (under autocast, autocast decides). A gradient
saves x and one number per row (LayerNorm: two), and no normalized rows: `flashnorm.functional`.
Shapes that do not fit raise ValueError. Source: FlashNorm, arXiv 2407.09577.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import sqrt
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from flashnorm.functional.prepared import BoundCalls
from flashnorm.kernels import norms
from flashnorm.kernels.call import Call, check_activation
from flashnorm.nn.folding import fold_readers_

Self = TypeVar("Self", bound="NormReaders")


class Reader(NamedTuple):
    """The parameters of one linear layer: names of weight [features, n] and bias [features]."""

    weight: str
    bias: str
    features: int
    has_bias: bool


class NormReaders(nn.Module):
    """What the modules of this file share: a norm, and linear layers whose names `readers` says.

    With `gain` the norm has a parameter of that name, [n], which begins at `1 − gain_offset`; with
    `norm_bias` one that begins at zero; DyT has `alpha`, [1], which begins at the number given.
    `device` and `dtype` are those of the parameters. They are read at every call: they may be
    moved, replaced, parametrized and shared as those of any module.

    x: [.., n] in any floating dtype, which is that of the results. Raises ValueError for an unknown
    norm or activation, and at a call where x or a residual does not fit; TypeError for arguments
    that are not known.
    """

    def __init__(
        self,
        in_features: int,
        readers: Sequence[Reader],
        activation: str | None = None,
        *,
        norm: str = norms.RMS.name,
        eps: float = 1e-6,
        gain: bool = False,
        gain_offset: float = 0.0,
        norm_bias: bool = False,
        alpha: float = 0.5,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        kind = norms.find(norm)
        check_activation(activation)
        self.in_features, self.activation, self.norm, self.eps = in_features, activation, norm, eps
        self.gain_offset, self.initial_alpha = gain_offset, alpha
        self.readers = tuple((reader.weight, reader.bias) for reader in readers)
        shapes: dict[str, tuple[int, ...] | None] = {}
        for weight, bias, features, has_bias in readers:
            shapes[weight] = (features, in_features)
            shapes[bias] = (features,) if has_bias else None
        shapes["gain"] = (in_features,) if gain else None
        shapes["norm_bias"] = (in_features,) if norm_bias else None
        shapes["alpha"] = (1,) if kind.learns_alpha else None
        for name, shape in shapes.items():
            made = None if shape is None else torch.empty(shape, device=device, dtype=dtype)
            self.register_parameter(name, None if made is None else nn.Parameter(made))
        self._bound = BoundCalls()
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """As `nn.Linear`: uniform within ±1/√n; a norm that scales by one and shifts by zero."""
        bound = 1 / sqrt(max(1, self.in_features))
        for name in (name for pair in self.readers for name in pair):
            if (parameter := getattr(self, name)) is not None:
                parameter.uniform_(-bound, bound)
        start = {"gain": 1 - self.gain_offset, "norm_bias": 0.0, "alpha": self.initial_alpha}
        for name, value in start.items():
            if (parameter := getattr(self, name)) is not None:
                parameter.fill_(value)

    def fold_(self: Self) -> Self:
        """E1 and E2 in place: `W* = W diag(g)`, `c* = c + W β`; the norm has neither afterwards.

        Every result is rounded once to the dtype of its parameter; where the norm has a bias, a
        reader without one gets one. Raises FoldError, with nothing written, where a dtype's range
        would be left or a parameter is not the module's own.
        """
        fold_readers_(self, self.readers, self.gain_offset)
        return self

    def _run(self, x: Tensor, residual: Tensor | None = None) -> list[Tensor]:
        held: dict[str, Any] = self._parameters
        try:  # the dictionary takes a fraction of the time of nn.Module.__getattr__
            weights = [held[weight] for weight, _ in self.readers]
            biases = [held[bias] for _, bias in self.readers]
            gain, norm_bias, alpha = held["gain"], held["norm_bias"], held["alpha"]
        except KeyError:  # a parametrization makes what it computes an attribute
            weights = [getattr(self, weight) for weight, _ in self.readers]
            biases = [getattr(self, bias) for _, bias in self.readers]
            gain, norm_bias, alpha = self.gain, self.norm_bias, self.alpha
        norm, eps = norms.find(self.norm), self.eps
        offset, act = self.gain_offset, self.activation
        return self._bound(
            Call(x, weights, biases, norm, eps, gain, offset, norm_bias, alpha, act, residual)
        )

    def extra_repr(self) -> str:
        features = [getattr(self, weight).shape[0] for weight, _ in self.readers]
        said = [f"{self.in_features}", self._shown(features)]
        said += [f"norm={self.norm!r}", f"eps={self.eps}"]
        if self.gain is not None:
            said.append(f"gain_offset={self.gain_offset}")
        said += [f"{name}={getattr(self, name) is not None}" for name in ("gain", "norm_bias")]
        biases = [getattr(self, bias) is not None for _, bias in self.readers]
        said.append(f"bias={biases[0] if len(set(biases)) == 1 else biases}")
        return ", ".join(said)

    def _shown(self, features: list[int]) -> str:
        return f"{features[0]}"


class NormLinear(NormReaders):
    """`y = z Wᵀ + c [+ residual]`, one norm and one linear layer.

    weight: [out_features, n], bias: [out_features] or None, as in `nn.Linear`; the other arguments,
    dtypes and what is raised are those of `NormReaders`. Unknown norms raise ValueError.
    """

    def __init__(
        self, in_features: int, out_features: int, *, bias: bool = False, **norm: Any
    ) -> None:
        super().__init__(in_features, [Reader("weight", "bias", out_features, bias)], **norm)

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """x: [.., n], residual: [.., out_features]; returns [.., out_features] in x's dtype."""
        return self._run(x, residual)[0]


class NormLinears(NormReaders):
    """`y_i = z W_iᵀ + c_i`: the readers of one norm (q, k and v) as one call.

    weight_i: [out_features[i], n], bias_i: [out_features[i]] or None; `bias` is one answer for all
    or one for each. The other arguments and dtypes are those of `NormReaders`. Raises ValueError
    for another number of answers, and what `NormReaders` raises.
    """

    def __init__(
        self,
        in_features: int,
        out_features: Sequence[int],
        *,
        bias: bool | Sequence[bool] = False,
        **norm: Any,
    ) -> None:
        biases = [bias] * len(out_features) if isinstance(bias, bool) else bias
        if len(biases) != len(out_features):
            raise ValueError(f"{len(biases)} answers in bias for {len(out_features)} readers")
        readers = [
            Reader(f"weight_{i}", f"bias_{i}", features, has_bias)
            for i, (features, has_bias) in enumerate(zip(out_features, biases, strict=True))
        ]
        super().__init__(in_features, readers, **norm)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """x: [.., n]; returns [.., out_features[i]] for every reader, in the dtype of x."""
        return tuple(self._run(x))

    def _shown(self, features: list[int]) -> str:
        return f"{tuple(features)}"


class NormGLU(NormReaders):
    """`y = act(z Gᵀ + c_g) ⊙ (z Uᵀ + c_u) [+ residual]`: a norm, gate and up, and their product.

    gate_weight and up_weight: [width, n], gate_bias and up_bias: [width] or None; activation:
    "silu", "gelu" (erf), "gelu_tanh", "relu" or "identity". The other arguments, dtypes and what is
    raised are those of `NormReaders`. Unknown norms and activations raise ValueError.
    """

    def __init__(
        self,
        in_features: int,
        width: int,
        *,
        activation: str = "silu",
        bias: bool = False,
        **norm: Any,
    ) -> None:
        readers = [Reader(f"{name}_weight", f"{name}_bias", width, bias) for name in ("gate", "up")]
        super().__init__(in_features, readers, activation, **norm)

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """x: [.., n], residual: [.., width]; returns [.., width] in the dtype of x."""
        return self._run(x, residual)[0]

    def _shown(self, features: list[int]) -> str:
        return f"{features[0]}, activation={self.activation!r}"
