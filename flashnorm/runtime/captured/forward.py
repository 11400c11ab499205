"""The forward of a model whose decode steps are captured; everything else is what was below it."""

from __future__ import annotations

import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from flashnorm.compat.torch_names import forward_hooks_of_all, forward_pre_hooks_of_all
from flashnorm.kernels import dispatch
from flashnorm.kernels.backend import Backend
from flashnorm.runtime.captured import arguments, caches
from flashnorm.runtime.captured.caches import Fixed
from flashnorm.runtime.captured.graphs import Graph, Step, counts_itself
from flashnorm.runtime.captured.products import Product
from flashnorm.runtime.forwards import Fused
from flashnorm.runtime.package.arguments import Given, read
from flashnorm.runtime.package.forward import WATCHED, Inputs
from flashnorm.runtime.package.still import HOOKED, Still
from flashnorm.runtime.stand import Stand
from flashnorm.runtime.watch import TRAINING

STEP = "decode step not captured: {}"
INFERENCE = "torch.inference_mode() is on, in which no version says what was written (use no_grad)"
MOVED = "a parameter or buffer was replaced: steps are captured anew"
OTHERS = "somebody else captures this step"
RESTLESS = "the model was another one at every step, and is not looked at any more"
MOST_CHANGES = 16  # of the model, without a step from a graph in between
BUSY = "another thread is in a step of this model"

Key = tuple[object, ...]


class Memory(Inputs):
    """Every tensor that a model holds by name, and where it lies."""

    def __init__(self, model: nn.Module) -> None:
        named = [
            *(name for name, _ in model.named_parameters(remove_duplicate=False)),
            *(name for name, _ in model.named_buffers(remove_duplicate=False)),
        ]
        tables = map(vars, model.modules())
        more = [(held, n) for held in tables for n, v in held.items() if isinstance(v, Tensor)]
        super().__init__(model, named, more)
        self.places = [t.data_ptr() for t in self.find()]

    def changed(self) -> str:
        """Why graphs of the model would read something else; empty where they would not."""
        tensors = self.find()
        if reason := self.why_not(tensors):
            return reason
        return MOVED if [t.data_ptr() for t in tensors] != self.places else ""


class Model:
    """A model as its graphs were captured from it."""

    def __init__(self, model: nn.Module) -> None:
        self.still, self.memory = Still(model), Memory(model)
        self.counts: bool | None = None  # whether positions may be given to it
        self.trains = any(module.training for module in model.modules())

    def changed(self) -> str:
        """Why the model is not what it was, or has no steps to capture; empty where it has."""
        if reason := self.still.changed():
            return reason
        return TRAINING if self.trains else self.memory.changed()


class Captured(Stand):
    """A model's forward: one new token per sequence from a graph, where nothing speaks against it.

    below: the forward that was there before, if it was not that of the class; `most` graphs are
    kept, of the caches that were used last.
    """

    def __init__(
        self,
        model: nn.Module,
        backend: Backend,
        below: Stand | None,
        products: Sequence[Fused],
        most: int,
    ) -> None:
        self.module, self.backend, self.below, self.most = model, backend, below, most
        self.fused = list(products)
        self.products = [Product(fused) for fused in products]
        self.known: Model | None = None
        # By key: a graph, or nothing where the first call was seen. By what is left of a key
        # without its cache: why such a step cannot be captured.
        self.graphs: OrderedDict[Key, Graph | None] = OrderedDict()
        self.refused: dict[Key, str] = {}
        self.ends: dict[int, weakref.ref[Any]] = {}
        self.changes = 0  # of the model, since the last step from a graph
        self.lock = threading.Lock()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not torch.compiler.is_compiling():
            given = read(args, kwargs)
            if isinstance(given, Given):
                given = self.try_step(given, args, kwargs)
            if given is not None and not isinstance(given, str):
                return given
            if given is not None:
                dispatch.fell_back(STEP.format(given))
        return self.own(*args, **kwargs)

    def own(self, *args: Any, **kwargs: Any) -> Any:
        """What runs without graphs."""
        if self.below is not None:
            return self.below(*args, **kwargs)
        return type(self.module).forward(self.module, *args, **kwargs)

    def try_step(self, given: Given, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """What the model returns for one more token, or why no graph can say."""
        if not self.lock.acquire(blocking=False):
            return BUSY
        try:
            return self._step(given, args, kwargs)
        finally:
            self.lock.release()

    def _step(self, given: Given, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if reason := self._why_not(given):
            return reason
        device = given.ids.device
        held = caches.find(given.cache, device)
        tensors = arguments.tensors(given, device)
        if isinstance(held, str) or isinstance(tensors, str):
            return held if isinstance(held, str) else tensors
        form = self._form(held, tensors, given, kwargs)
        if form in self.refused:
            return self.refused[form]
        key = (id(given.cache), held.place(), form)
        if key not in self.graphs:
            self._remember(key, given.cache)
            return self._steps(device).load(args, kwargs)
        self.graphs.move_to_end(key)
        graph = self.graphs[key]
        if graph is None:
            position = None if given.positions is not None else self._counted(held, device)
            found = self._steps(device).capture(tensors, position, args, kwargs)
            if isinstance(found, str):
                self.refused[form] = found
                return found
            self.graphs[key] = graph = found
        if graph.counts.is_full(held):
            return caches.FULL
        self.changes = 0
        return graph.run(tensors, held)

    def _why_not(self, given: Given) -> str:
        """Why the model's own code has to run, whatever the cache is."""
        if dispatch.watched(given.ids):
            return WATCHED
        if not self.backend.claims(given.ids):
            return self.backend.elsewhere(given.ids)
        if self.backend.capturing():
            return OTHERS
        if torch.is_grad_enabled():
            return dispatch.GRADIENT
        if torch.is_inference_mode_enabled():
            return INFERENCE
        if dispatch.transformed():
            return dispatch.TRANSFORM
        if forward_hooks_of_all or forward_pre_hooks_of_all:
            return HOOKED
        if self.changes > MOST_CHANGES:
            return RESTLESS
        if self.known is None:
            self.known = Model(self.module)
        # Hooks and training may go again, and leave the model that it was.
        if (reason := self.known.changed()) and reason not in (HOOKED, TRAINING):
            self.forget()
            self.changes += 1
        return reason

    def _form(
        self, held: Fixed, tensors: dict[str, Tensor], given: Given, kwargs: dict[str, Any]
    ) -> Key:
        """All that a graph is for, but for where its cache lies."""
        assert not isinstance(self.backend.captures, str)
        settings = (torch.get_default_dtype(), *self.backend.captures.settings())
        said = arguments.options(kwargs, given.mask)
        return held.form(), arguments.form(tensors), said, settings

    def _counted(self, held: Fixed, device: torch.device) -> int | None:
        """The position that the model may be given, where it is one that the host counts."""
        position = held.counted()
        if position is None:
            return None
        assert self.known is not None
        if self.known.counts is None:
            self.known.counts = counts_itself(self.module, self.own, device)
        return position if self.known.counts else None

    def _steps(self, device: torch.device) -> Step:
        assert not isinstance(self.backend.captures, str)
        return Step(self.module, self.own, self.products, self.backend.captures, device)

    def _remember(self, key: Key, cache: Any) -> None:
        """A key was seen; the graphs of a cache that is gone, or was not used for long, go."""
        self.graphs[key] = None
        mark = id(cache)
        if mark not in self.ends:
            self.ends[mark] = weakref.ref(cache, _Gone(self, mark))
        while len(self.graphs) > self.most:
            self.graphs.popitem(last=False)

    def drop(self, mark: int) -> None:
        """Forget the graphs of a cache."""
        self.ends.pop(mark, None)
        for key in [key for key in self.graphs if key[0] == mark]:
            self.graphs.pop(key, None)

    def forget(self) -> None:
        """Forget every graph, and what the model was."""
        self.known = None
        self.graphs.clear()
        self.refused.clear()
        self.ends.clear()

    def __reduce__(self) -> tuple[Any, ...]:
        """A copy captures its own steps."""
        return Captured, (self.module, self.backend, self.below, self.fused, self.most)


class _Gone:
    """What is called when a cache is gone."""

    def __init__(self, forward: Captured, mark: int) -> None:
        self.forward, self.mark = weakref.ref(forward), mark

    def __call__(self, _: object) -> None:
        if (forward := self.forward()) is not None and type(forward) is Captured:
            forward.drop(self.mark)


class Uncompiled:
    """What stands for a model's `get_compiled_call`, which `generate` asks for its static caches.

    Where somebody says how to compile, that is done.
    """

    def __init__(self, model: Any) -> None:
        self.module = model

    def __call__(self, compile_config: Any = None) -> Callable[..., Any]:
        if compile_config is not None:
            made: Callable[..., Any] = type(self.module).get_compiled_call(
                self.module, compile_config
            )
            return made
        own: Callable[..., Any] = self.module.__call__
        return own
