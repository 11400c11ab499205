"""From the keys of an adapter to the parameters of the base that its tensors act on.

PEFT's keys are `base_model.model.`, the path of the module, and the factor. A target that is a bare
parameter of its module, as merged experts are, has the module's path; several of one module are
nested, the first of them innermost (`.base_layer`).
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from flashnorm.adapters.base import Base
from flashnorm.checkpoint.header import FLOAT_DTYPES, Entry
from flashnorm.errors import CheckpointError

if TYPE_CHECKING:
    from torch import nn

PREFIX = "base_model.model."
NESTED = ".base_layer"
TOKENS = ".token_adapter.trainable_tokens_delta"

_FACTOR = re.compile(r"(?P<target>.+)\.lora_(?P<factor>[AB])\.(?P<leaf>weight|bias)")
_EMBEDDING = re.compile(r"(?P<target>.+)\.lora_embedding_(?P<factor>[AB])")

DIMENSIONS = {"A": 2, "B": 2, "B bias": 1}
Kind = Literal["module", "embedding", "parameter"]
Axes = Mapping[int, int]  # axes of a parameter to axes of a tensor, or to the factor: A 1, B 0
Factors = Mapping[str, Entry]  # by "A", "B" and "B bias"


@dataclass(frozen=True)
class AdapterTensor:
    """One tensor of an adapter: axis a of `parameter` runs along its axis `axes[a]`.

    A copy takes the place of the parameter, or of some of its rows.
    """

    entry: Entry
    parameter: str
    axes: Axes


@dataclass(frozen=True)
class Lora:
    """The factors of one target, which is its key without the factor: `delta = scaling · B A`.

    a: [r, in], b: [out, r], bias: [out] or None. Beside a module or an embedding the delta is a
    path of its own, from the module's input to its output; to a bare parameter it is added.
    """

    kind: Kind
    target: str
    a: AdapterTensor
    b: AdapterTensor
    bias: AdapterTensor | None

    @property
    def module(self) -> str:
        return module_path(self.target)

    @property
    def parameter(self) -> str:
        return self.a.parameter

    @property
    def tensors(self) -> tuple[AdapterTensor, ...]:
        return (self.a, self.b, self.bias) if self.bias else (self.a, self.b)


@dataclass(frozen=True)
class AdapterTensors:
    """All tensors of an adapter that act on parameters."""

    loras: tuple[Lora, ...]
    copies: tuple[AdapterTensor, ...]

    def __iter__(self) -> Iterator[AdapterTensor]:
        for lora in self.loras:
            yield from lora.tensors
        yield from self.copies


def module_path(target: str) -> str:
    """The path in the base of what stands in a key before its factor."""
    return target.removeprefix(PREFIX).replace(NESTED, "")


def read_tensors(
    entries: Iterable[Entry], config: dict[str, Any], base: Base, canonical: Mapping[str, str]
) -> AdapterTensors:
    """Every tensor matched with the base; raises CheckpointError where one cannot be.

    `canonical` names the parameters as the plan does.
    """
    linear: dict[str, dict[str, Entry]] = defaultdict(dict)
    embeddings: dict[str, dict[str, Entry]] = defaultdict(dict)
    copies = []
    for entry in entries:
        _check_entry(entry)
        if match := _FACTOR.fullmatch(entry.name):
            name = match["factor"] + (" bias" if match["leaf"] == "bias" else "")
            linear[match["target"]][name] = entry
        elif match := _EMBEDDING.fullmatch(entry.name):
            embeddings[match["target"]][match["factor"]] = entry
        elif ".lora_" in entry.name:
            raise CheckpointError(f"the tensor {entry.name} is not of a plain LoRA")
        elif part := _copy(entry, base, canonical):
            copies.append(part)
    reader = _Reader(config, base, canonical)
    loras = [*reader.linear(linear), *reader.embeddings(embeddings)]
    return AdapterTensors(tuple(loras), tuple(copies))


def _check_entry(entry: Entry) -> None:
    if not entry.name.startswith(PREFIX):
        raise CheckpointError(f"the tensor {entry.name} has not the prefix {PREFIX} of PEFT's keys")
    if entry.dtype not in FLOAT_DTYPES:
        raise CheckpointError(f"the tensor {entry.name} is stored as {entry.dtype}, not as floats")


def _copy(entry: Entry, base: Base, canonical: Mapping[str, str]) -> AdapterTensor | None:
    """A parameter that the adapter holds whole, or some rows of one; None for a buffer."""
    axes: Axes = {axis: axis for axis in range(len(entry.shape))}
    name = module_path(entry.name)
    if name.endswith(TOKENS):
        name, axes = f"{name.removesuffix(TOKENS)}.weight", {1: 1}
    if name in base.buffers:
        return None
    parameter = base.parameter(name)
    if len(entry.shape) != parameter.ndim:
        raise CheckpointError(misfit(entry, name, parameter.shape))
    return AdapterTensor(entry, canonical[name], axes)


@dataclass(frozen=True)
class _Reader:
    """Puts factors together."""

    config: dict[str, Any]
    base: Base
    canonical: Mapping[str, str]

    def linear(self, found: Mapping[str, Factors]) -> Iterator[Lora]:
        """Targets that multiply: modules, and bare parameters of modules."""
        nests: dict[str, list[str]] = defaultdict(list)
        for target in sorted(found, key=len, reverse=True):  # the innermost first
            nests[module_path(target)].append(target)
        for path, targets in nests.items():
            module = self.base.module(path)
            names = self._targeted(path, module)
            if not names and len(targets) == 1:
                axes = module_axes(path, module)
                factors = found[targets[0]]
                yield self._lora("module", targets[0], f"{path}.weight", factors, axes)
                continue
            if len(names) != len(targets):
                raise CheckpointError(
                    f"the adapter holds {len(targets)} pairs of factors for {path}, of which "
                    f"target_parameters names {len(names)} parameters"
                )
            for target, name in zip(targets, names, strict=True):
                factors = found[target]
                axes = parameter_axes(module, name, factors)
                yield self._lora("parameter", target, f"{path}.{name}", factors, axes)

    def embeddings(self, found: Mapping[str, Factors]) -> Iterator[Lora]:
        """Weights [vocab, n] that are looked up: A is [r, vocab], B [n, r]."""
        for target, factors in found.items():
            name = f"{module_path(target)}.weight"
            yield self._lora("embedding", target, name, factors, {0: 1, 1: 0})

    def _targeted(self, path: str, module: nn.Module) -> list[str]:
        """The module's own parameters that target_parameters names, in their order."""
        wanted = self.config.get("target_parameters") or []
        names = [name for name, _ in module.named_parameters(recurse=False)]
        return [n for n in names if any(f".{path}.{n}".endswith(f".{w}") for w in wanted)]

    def _lora(self, kind: Kind, target: str, name: str, factors: Factors, axes: Axes) -> Lora:
        if "A" not in factors or "B" not in factors or "A bias" in factors:
            raise CheckpointError(f"the adapter holds only {', '.join(factors)} for {target}")
        shape = self.base.parameter(name).shape

        def part(key: str, side: int, axis: int) -> AdapterTensor:
            along = {a: axis for a, s in axes.items() if s == side}
            if len(factors[key].shape) < DIMENSIONS[key] or any(
                factors[key].shape[axis] != shape[a] for a in along
            ):
                raise CheckpointError(misfit(factors[key], name, shape))
            return AdapterTensor(factors[key], self.canonical[name], along)

        bias = part("B bias", 0, 0) if "B bias" in factors else None
        lora = Lora(kind, target, part("A", 1, 1), part("B", 0, 0), bias)
        if not lora.a.entry.shape[0]:
            raise CheckpointError(f"the factors of {lora.module} have the rank 0")
        if lora.a.entry.shape[0] != lora.b.entry.shape[1]:
            raise CheckpointError(
                f"the factors of {lora.module} have the shapes {list(lora.a.entry.shape)} and "
                f"{list(lora.b.entry.shape)}, which do not multiply"
            )
        return lora


def module_axes(path: str, module: nn.Module) -> Axes:
    """Which axis of a module's weight A (1) carries and which B (0)."""
    from torch import nn
    from transformers import Conv1D

    from flashnorm.compat.torch_names import ConvNd

    if isinstance(module, Conv1D):
        return {0: 1, 1: 0}
    if isinstance(module, nn.Linear):
        return {0: 0, 1: 1}
    if isinstance(module, ConvNd) and module.groups == 1:
        return {0: 0, 1: 1}
    raise CheckpointError(
        f"the adapter acts on {path}, a {type(module).__name__}: flashnorm knows the factors of "
        "linear layers, ungrouped convolutions, embeddings and bare parameters"
    )


def parameter_axes(module: nn.Module, name: str, factors: Factors) -> Axes:
    """The same for a bare parameter; 3-D ones are [experts, out, in], or [experts, in, out]."""
    shape = tuple(getattr(module, name).shape)
    if len(shape) == 2:
        return {0: 0, 1: 1}
    if len(shape) != 3 or "A" not in factors or "B" not in factors:
        return {}
    out_in, in_out = {1: 0, 2: 1}, {1: 1, 2: 0}
    # PEFT goes by the module; where the shapes say otherwise, an older one took all for in_out.
    transposed = getattr(module, "is_transposed", False)
    sizes = factors["B"].shape[0], factors["A"].shape[-1]
    for axes in (in_out, out_in) if transposed else (out_in, in_out):
        if all(shape[axis] == sizes[side] for axis, side in axes.items()):
            return axes
    return in_out if transposed else out_in


def misfit(entry: Entry, name: str, shape: tuple[int, ...]) -> str:
    """The words for a tensor that is not of this base."""
    return (
        f"the tensor {entry.name} of shape {list(entry.shape)} does not fit the parameter {name} "
        f"of shape {list(shape)}: give the base that the adapter was trained on"
    )
