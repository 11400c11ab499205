"""What the zoo holds: a tiny model of a library, and inputs for it."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from flashnorm.verification.precision import float64_truth
from tests.zoo.build import randomize_
from tests.zoo.further import tensors_of

Made = tuple[nn.Module, Any]
LARGEST = 45_000_000  # parameters: more is not tiny


@dataclass(frozen=True)
class Specimen:
    """One model class of one library; `make` gives a new model and the inputs for its forward."""

    library: str
    name: str
    make: Callable[[], Made]

    @property
    def key(self) -> str:
        return f"{self.library}:{self.name}"


def specimen_maker(library: str):
    """`add(name, make)` for the specimens of one library, and the list that it fills."""
    found: list[Specimen] = []

    def add(name: str, make: Callable[[], Made]) -> None:
        found.append(Specimen(library, name, make))

    return add, found


def made(specimen: Specimen, seed: int = 0) -> Made:
    """The model in eval mode and float32, every parameter random, and its inputs."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model, inputs = specimen.make()
    model = model.float().eval()
    size = sum(parameter.numel() for parameter in model.parameters())
    if size > LARGEST:
        raise ValueError(f"{size} parameters are not tiny")
    randomize_(model, seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.requires_grad_(parameter.is_floating_point())
    return model, inputs


def run(model: nn.Module, inputs: Any) -> list[Tensor]:
    """All floating tensors that a forward gives; the same draws every time."""
    # Copies, because some models keep state from one call to the next.
    model, inputs = copy.deepcopy(model), copy.deepcopy(inputs)
    torch.manual_seed(0)
    with torch.no_grad():
        return tensors_of(called(model, inputs))


def truth(model: nn.Module, inputs: Any) -> list[Tensor]:
    """The same in true float64, of a model of any dtype."""
    model = copy.deepcopy(model).double()
    inputs = in_dtype(copy.deepcopy(inputs), torch.float64)
    torch.manual_seed(0)
    with float64_truth():
        return tensors_of(called(model, inputs))


def called(model: nn.Module, inputs: Any) -> Any:
    if isinstance(inputs, Mapping):
        return model(**inputs)
    return model(*inputs) if isinstance(inputs, (tuple, list)) else model(inputs)


def in_dtype(inputs: Any, dtype: torch.dtype) -> Any:
    """The inputs with every floating tensor in `dtype`."""

    def cast(tensor: Tensor) -> Tensor:
        return tensor.to(dtype) if tensor.is_floating_point() else tensor

    return tree_map_only(Tensor, cast, inputs)


def nudged(model: nn.Module) -> nn.Module:
    """The model with every weight changed by about one rounding of its dtype."""
    moved = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in moved.parameters():
            if parameter.is_floating_point():
                step = torch.randint(-1, 2, parameter.shape, generator=generator)
                parameter.mul_(1 + step.to(parameter.dtype) * torch.finfo(parameter.dtype).eps)
    return moved


def normal(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


def tokens(vocab: int, *shape: int) -> Tensor:
    return torch.randint(1, vocab, shape, generator=torch.Generator().manual_seed(7))


def named(specimens: Iterator[Specimen], names: list[str]) -> list[Specimen]:
    return [s for s in specimens if not names or s.key in names or s.library in names]
