"""The forward of a model whose decode steps are a compiled library; everything else is its own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from flashnorm.compat.torch_names import (
    TensorGuards,
    forward_hooks_of_all,
    forward_pre_hooks_of_all,
)
from flashnorm.kernels import dispatch
from flashnorm.runtime import growing
from flashnorm.runtime.laid import Parts, is_laid
from flashnorm.runtime.package.arguments import PLACES, Given, Masks, read
from flashnorm.runtime.package.caches import Shapes, find
from flashnorm.runtime.package.still import HOOKED, Still
from flashnorm.runtime.stand import Retired, Stand

BATCH = "another batch than the package is for"
MOVED = "a parameter is not what it was: its dtype, shape, strides or device"
WATCHED = "a tracer, a mode or a tensor subclass watches every operation"
STEP = "decode step not from the package: {}"

Run = Callable[[list[Tensor]], list[Tensor]]
_PLAIN = frozenset((Tensor, nn.Parameter))


Slot = tuple[Any, str]  # what holds tensors by name, and a name


class Inputs:
    """The parameters and buffers of a model that a step is given, where they are by now.

    more: where other tensors are held.
    """

    def __init__(self, model: nn.Module, names: Sequence[str], more: Sequence[Slot] = ()) -> None:
        self.slots = [*(_slot(model, name) for name in names), *more]
        self.expected = _look(self.find())
        self.guards: Any = None  # the same, as torch looks at it

    def find(self) -> list[Tensor]:
        return [held[name] for held, name in self.slots]

    def why_not(self, tensors: list[Tensor]) -> str:
        """Why the step cannot read them; empty where they are as they were traced."""
        if self.guards is None or not self.guards.check(*tensors):
            if not _PLAIN.issuperset(map(type, tensors)) or _look(tensors) != self.expected:
                return MOVED
            free = {"dynamic_dims_sizes": None, "dynamic_dims_strides": None}
            self.guards = TensorGuards(*tensors, **free)
        if torch.is_grad_enabled() and any(t.requires_grad for t in tensors):
            return dispatch.GRADIENT
        return ""


def _slot(model: nn.Module, name: str) -> Slot:
    path, _, last = name.rpartition(".")
    owner = model.get_submodule(path)
    if is_laid(last):
        return Parts(owner), last
    return (owner._parameters if last in owner._parameters else owner._buffers), last


def _look(tensors: list[Tensor]) -> tuple[list[Any], ...]:
    """What code that was compiled for tensors relies on, but for where they lie."""
    return (
        [t.shape for t in tensors],
        [t.stride() for t in tensors],
        [t.dtype for t in tensors],
        [t.device for t in tensors],
    )


class Packaged(Stand):
    """A model's forward: one new token per sequence by `run`, where nothing speaks against it.

    `positions`: whether the model itself counts the positions of new tokens from the cache.
    """

    def __init__(
        self,
        model: nn.Module,
        run: Run,
        names: tuple[str, ...],
        shapes: Shapes,
        output: type,
        positions: bool,
    ) -> None:
        self.module, self.run, self.shapes = model, run, shapes
        self.output, self.positions = output, positions
        self.batch = shapes.sizes[0][0]
        self.masks = Masks(self.batch, shapes.length)
        self.inputs = Inputs(model, names)
        self.still: Still | None = None
        # The parameters of the last step, and the versions of the dictionaries that had them.
        self.tensors: list[Tensor] = []
        self.seen: list[int] | None = None

    def watch(self) -> None:
        """From now on the model has to stay as it is now, with this forward."""
        self.still = Still(self.module)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not torch.compiler.is_compiling():
            given = read(args, kwargs)
            if isinstance(given, Given):
                given = self.step(given)
            if given is not None and not isinstance(given, str):
                return given
            if given is not None:
                dispatch.fell_back(STEP.format(given))
        return growing.run(self.module, args, kwargs)

    def step(self, given: Given) -> Any:
        """What the model returns for one more token, or why the package cannot say."""
        tensors, reason = self._parameters(given)
        if reason:
            return reason
        cache = find(given.cache, self.shapes)
        if isinstance(cache, str):
            return cache
        visible = self.masks.of(given.mask, cache.used, not hasattr(cache, "views"))
        if isinstance(visible, str):
            return visible
        positions = self._positions(given.positions, cache.used)
        if isinstance(positions, str):
            return positions
        more = [given.ids, visible, positions, *cache.lengths, *cache.tensors]
        logits = self.run([*tensors, *more])[0]
        cache.stepped()
        return self.output(logits=logits, past_key_values=given.cache)

    def _parameters(self, given: Given) -> tuple[list[Tensor], str]:
        """What the step reads of the model, or why the model's own code has to run."""
        if dispatch.watched(given.ids) or not given.ids.is_cpu or given.ids.dtype != torch.int64:
            return [], WATCHED
        if dispatch.transformed():
            return [], dispatch.TRANSFORM
        if forward_hooks_of_all or forward_pre_hooks_of_all:
            return [], HOOKED
        if given.ids.shape[0] != self.batch:
            return [], BATCH
        if self.still is None:
            self.tensors = self.inputs.find()
        elif reason := self.still.changed():
            return [], reason
        elif self.seen is not self.still.versions:
            self.tensors, self.seen = self.inputs.find(), self.still.versions
        return self.tensors, self.inputs.why_not(self.tensors)

    def _positions(self, given: Tensor | None, used: int) -> Tensor | str:
        if given is None:
            return torch.full((self.batch, 1), used) if self.positions else PLACES
        plain = type(given) is Tensor and given.is_cpu and given.dtype == torch.int64
        if not plain or given.dim() != 2 or given.shape[1] != 1:
            return PLACES
        if given.shape[0] not in (1, self.batch):
            return PLACES
        return given.expand(self.batch, 1).contiguous()

    def __reduce__(self) -> tuple[Any, ...]:
        """A copy of the model runs without the package."""
        return _without, (self.module,)


def _without(module: nn.Module) -> Retired:
    made = Retired()
    made.module = module
    return made
