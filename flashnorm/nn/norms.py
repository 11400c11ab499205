"""RMSNorm that may have lost its gain, and Dynamic Tanh."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


class FlashRMSNorm(nn.Module):
    """`y = x / sqrt(mean(x²) + ε) · (offset + weight) + bias`, weight and bias only where given.

    x: [.., n] in any floating dtype; statistics, gain and bias are computed in float32 (float64
    for float64) and rounded once to the dtype of x. Without a weight it is what a folded norm has
    become: other engines know it by the name that ends in RMSNorm, `weight is None`, `with_scale`,
    `eps` and `variance_epsilon`.

    `absent` names the parameters that a fold removed, with the number that each of them held: they
    are written into a state dict, and may be in one that is loaded, so that checkpoints stay those
    of the original model. With `contiguous` the result is laid out as a LayerNorm's always is: code
    behind it may count on that. Loading a state dict raises ValueError where it has another value
    for a name in `absent`. x of another width raises RuntimeError where there is a weight or a
    bias; without them any width is normalized. Source: FlashNorm, arXiv 2407.09577.
    """

    weight: Tensor | None
    bias: Tensor | None

    def __init__(
        self,
        hidden_size: int,
        eps: float = 1e-6,
        *,
        weight: nn.Parameter | None = None,
        bias: nn.Parameter | None = None,
        offset: float = 0.0,
        absent: dict[str, Tensor] | None = None,
        contiguous: bool = False,
    ) -> None:
        super().__init__()
        self.hidden_size, self.eps, self.variance_epsilon = hidden_size, eps, eps
        self.offset, self.with_scale = offset, weight is not None
        self.register_parameter("weight", weight)
        self.register_parameter("bias", bias)
        self.contiguous = contiguous
        self.absent = tuple(absent or ())
        for name, value in (absent or {}).items():
            self.register_buffer(f"absent_{name}", value, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        return self._scaled(wide, wide.pow(2).mean(-1, keepdim=True) + self.eps, x)

    def _scaled(self, wide: Tensor, mean_square: Tensor, x: Tensor) -> Tensor:
        y = wide * torch.rsqrt(mean_square)
        if self.weight is not None:
            y = y * (self.offset + self.weight.to(y.dtype))
        if self.bias is not None:
            y = y + self.bias.to(y.dtype)
        y = y.to(x.dtype)
        return y.contiguous() if self.contiguous else y

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for name in self.absent:
            destination[prefix + name] = getattr(self, f"absent_{name}").clone()

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        for name in self.absent:
            found, expected = state_dict.pop(prefix + name, None), getattr(self, f"absent_{name}")
            if found is not None and not bool((found == expected.to(found.device)).all()):
                raise ValueError(
                    f"{prefix}{name} holds other numbers than the folded norm had; fold the model "
                    "after loading, not before"
                )
        super()._load_from_state_dict(state_dict, prefix, *args)

    def extra_repr(self) -> str:
        return f"{self.hidden_size}, eps={self.eps}, with_scale={self.with_scale}"


class DyT(nn.Module):
    """Dynamic Tanh: `y = tanh(α·x) · γ + β`, a replacement for a norm without any statistic.

    x: [.., n]; α is one number, γ (`weight`) and β (`bias`) are [n]. The gain and bias fold into
    the linear layers that read y (E6 with E1 and E2); α stays. Computed in the dtype that torch
    promotes x and the parameters to, float32 with its own. Raises RuntimeError for an x of another
    width. Source: Dynamic Tanh, arXiv 2503.10622; FlashNorm, arXiv 2407.09577.
    """

    bias: Tensor | None

    def __init__(self, hidden_size: int, alpha: float = 0.5, *, bias: bool = True) -> None:
        super().__init__()
        self.alpha = nn.Parameter(torch.full((1,), alpha))
        self.weight = nn.Parameter(torch.ones(hidden_size))
        self.register_parameter("bias", nn.Parameter(torch.zeros(hidden_size)) if bias else None)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.tanh(self.alpha * x) * self.weight
        return y if self.bias is None else y + self.bias

    def extra_repr(self) -> str:
        return f"{len(self.weight)}, bias={self.bias is not None}"
