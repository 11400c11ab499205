"""Models that need nothing beside torch and transformers: for failures in the ordinary tests."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from .specimen import Made, normal, specimen_maker

add, SPECIMENS = specimen_maker("plain")
add_transformers, TRANSFORMERS = specimen_maker("transformers")

TYPES = (
    "llama", "gemma2", "qwen3_moe", "gpt2", "deepseek_v3", "bert", "opt", "mamba2", "phi3",
    "cohere2", "olmo2", "bloom", "t5gemma", "gpt_oss",
)  # fmt: skip


class Frozen(dict):
    """A configuration as some libraries have it: it can be emptied, and not be filled again."""

    def update(self, *_: Any, **__: Any) -> None:
        raise TypeError("this configuration is frozen")

    pop = setdefault = __delitem__ = update


class Block(nn.Module):
    """Pre-norm feed-forward; `norm` makes the norm of a width."""

    def __init__(self, norm: Callable[[int], nn.Module]) -> None:
        super().__init__()
        self.norm, self.up, self.down = norm(16), nn.Linear(16, 24), nn.Linear(24, 16)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.relu(self.up(self.norm(x))))


class Configured(nn.Module):
    """A model with a frozen configuration, in a dict and as an attribute of every part."""

    def __init__(self) -> None:
        super().__init__()
        self._internal_dict = Frozen(width=16, names=["a", "b"])
        self.blocks = nn.ModuleList([Block(nn.LayerNorm), Block(nn.RMSNorm)])

    @property
    def config(self) -> Frozen:
        return self._internal_dict

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x * (self.config["width"] / 16)


class Merging(nn.Linear):
    """A LoRA layer that merges when it is told to evaluate, and takes it out again to train."""

    def __init__(self, width: int) -> None:
        super().__init__(width, width)
        self.merged = False
        self.a, self.b = nn.Parameter(torch.randn(2, width)), nn.Parameter(torch.randn(width, 2))

    def train(self, mode: bool = True) -> Merging:
        super().train(mode)
        if self.merged == mode:
            sign = -1.0 if mode else 1.0
            self.weight.data += sign * self.b.data @ self.a.data
            self.merged = not mode
        return self

    def forward(self, x: Tensor) -> Tensor:
        out = super().forward(x)
        return out if self.merged else out + x @ self.a.T @ self.b.T


class Counting(nn.Module):
    """A forward that changes what its model holds: tensors, lists, dicts, buffers and flags."""

    def __init__(self) -> None:
        super().__init__()
        self.block, self.head = Block(nn.RMSNorm), nn.Linear(16, 4)
        self.state, self.seen = torch.zeros(3), []
        self.cache: dict[str, Any] = {"calls": 0, "inner": {"last": None}}
        self.register_buffer("total", torch.zeros(16))

    def forward(self, x: Tensor) -> Tensor:
        self.state += 1
        self.total.add_(x.detach().mean((0, 1)))
        x = self.block(x)
        self.seen.append(x)
        self.cache["calls"] += 1
        self.cache["inner"]["last"] = x
        return self.head(x)


def _plain(make: Callable[[], nn.Module]) -> Callable[[], Made]:
    return lambda: (make(), (normal(2, 3, 16),))


def _hooked() -> Made:
    """Hooks of a user that keep what they see, in a list and in an object."""
    model, seen = nn.Sequential(Block(nn.LayerNorm), Block(nn.RMSNorm), nn.Linear(16, 4)), []
    model[0].norm.register_forward_hook(lambda module, given, out: seen.append(out))
    model[1].register_forward_pre_hook(lambda module, given: seen.append(given))
    return model, (normal(2, 3, 16),)


def _random() -> nn.Module:
    """Draws numbers in evaluation mode too."""

    class Noise(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x + 0.1 * torch.randn_like(x)

    return nn.Sequential(Noise(), Block(nn.LayerNorm), nn.Dropout(0.3), nn.Linear(16, 4))


add("blocks", _plain(lambda: nn.Sequential(Block(nn.LayerNorm), Block(nn.RMSNorm))))
add("frozen config", _plain(Configured))
add(
    "merging",
    _plain(lambda: nn.Sequential(nn.RMSNorm(16), Merging(16), nn.LayerNorm(16), Merging(16))),
)
add("counting", _plain(Counting))
add("hooked", _hooked)
add("random", _plain(_random))


def _tiny(name: str) -> Callable[[], Made]:
    def make() -> Made:
        from tests.zoo import tiny_inputs, tiny_model
        from tests.zoo.build import causal_lm_types
        from tests.zoo.further import further_model

        if name in causal_lm_types():
            model = tiny_model(name)
            return model, tiny_inputs(model)
        return further_model(name)

    return make


def _transformer_layer() -> Made:
    layer = nn.TransformerEncoderLayer(32, 2, 48, batch_first=True, norm_first=True)
    return nn.TransformerEncoder(layer, 2, norm=nn.LayerNorm(32)), (normal(2, 5, 32),)


add("TransformerEncoder", _transformer_layer)
for _name in TYPES:
    add_transformers(_name, _tiny(_name))
