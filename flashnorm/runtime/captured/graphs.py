"""A step as a graph: captured in passes, until nobody reads what was left out."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from flashnorm.compat.transformers_names import WINDOW_COUNT
from flashnorm.errors import FlashNormError
from flashnorm.kernels.backend import Captures
from flashnorm.runtime import lazy
from flashnorm.runtime.captured.arguments import with_own
from flashnorm.runtime.captured.caches import Counts, Fixed, untouched
from flashnorm.runtime.captured.products import Product, installed

PASSES = 3  # with results left out; the one after them computes everything where it is asked for
STORES = "its forward stores attributes, which a graph would not"
OUTPUT = "it returns something else than logits and its cache"
WAITS = "it asks for the tokens of a window, which the host counts (give masks and positions)"
WRITES = "it writes into its arguments"

POSITIONS = "position_ids"

Forward = Callable[..., Any]


class Graph:
    """One step of a model on one cache.

    own: the tensors that it reads its arguments from; logits: where it leaves them. Where the host
    counts the tokens of a cache, it is given their number as positions.
    """

    def __init__(
        self, replay: Callable[[], None], own: dict[str, Tensor], output: type, logits: Tensor
    ) -> None:
        self.replay, self.own, self.output, self.logits = replay, own, output, logits
        self.counts = Counts()

    def run(self, given: dict[str, Tensor], held: Fixed) -> Any:
        for name, tensor in self.own.items():
            if name in given:
                tensor.copy_(given[name])
            else:
                position = held.counted()
                assert position is not None
                tensor.fill_(position)
        self.replay()
        held.stepped()
        self.counts.stepped(held)
        # The next replay writes there again.
        return self.output(logits=self.logits.clone(), past_key_values=held.cache())


class Step:
    """What is captured: a model's forward with its arguments, and who does it."""

    def __init__(
        self,
        model: nn.Module,
        forward: Forward,
        products: Sequence[Product],
        captures: Captures,
        device: torch.device,
    ) -> None:
        self.model, self.forward, self.products = model, forward, products
        self.captures, self.device = captures, device

    def load(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The model's own step, which runs every kernel once that a capture will need."""
        with installed(self.products), lazy.within(lazy.Pass(object, loading=True)):
            return self.forward(*args, **kwargs)

    @torch.no_grad()
    def capture(
        self,
        given: dict[str, Tensor],
        position: int | None,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Graph | str:
        """The step as a graph, or why it cannot be one. The cache is as it was.

        position: what the host has counted, and the model is to be given.
        """
        own = {name: tensor.clone() for name, tensor in given.items()}
        if position is not None:
            own[POSITIONS] = torch.full((1, 1), position, device=self.device)
        args, kwargs = with_own(own, args, kwargs)
        early: frozenset[int] | None = frozenset()
        for left in range(PASSES, -1, -1):
            step = lazy.Pass(self.captures.position, early if left else None)
            first: list[Exception] = []
            try:
                replay, (output, logits) = self._pass(step, args, kwargs, first)
            except Exception as error:  # whatever it is, the model's own code can run
                return _said(first[0] if first else error)
            if not step.late:
                return Graph(replay, own, output, logits)
            assert early is not None
            early |= step.late
        raise AssertionError("the last pass leaves nothing out")

    def _pass(
        self,
        step: lazy.Pass,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        first: list[Exception],
    ) -> tuple[Callable[[], None], tuple[type, Tensor]]:
        """One capture; `first` gets what went wrong in the step: what ends a capture says more."""
        cache = kwargs["past_key_values"]
        tensors = [t for t in (*args, *kwargs.values()) if isinstance(t, Tensor)]

        def run() -> tuple[type, Tensor]:
            versions = [t._version for t in tensors]
            try:
                found = self.forward(*args, **kwargs)
                if versions != [t._version for t in tensors]:
                    raise FlashNormError(WRITES)
                return _output(found, cache)
            except Exception as error:
                first.append(error)
                raise

        with _as_it_was(self.model), untouched(cache), installed(self.products), lazy.within(step):
            return self.captures.capture(run, self.device)


@torch.no_grad()
def counts_itself(model: Any, forward: Forward, device: torch.device) -> bool:
    """Whether a model that is given no positions takes those that its cache has counted.

    It is asked for three tokens, with and without.
    """
    from transformers import StaticCache

    own, other = (StaticCache(config=model.config, max_cache_len=4) for _ in range(2))
    for i in range(3):
        token = torch.full((1, 1), i, device=device)
        said = {"input_ids": token, "use_cache": True, "return_dict": True}
        try:
            a = forward(**said, past_key_values=own).logits
            b = forward(**said, past_key_values=other, **{POSITIONS: token}).logits
        except Exception:  # it takes none, or has no such token
            return False
        if not torch.equal(a, b):
            return False
    return True


def _output(found: Any, cache: Any) -> tuple[type, Tensor]:
    names = set(found) if isinstance(found, Mapping) else set()
    if names != {"logits", "past_key_values"} or found["past_key_values"] is not cache:
        raise FlashNormError(OUTPUT)
    logits = lazy.value(found["logits"])
    if type(logits) is not Tensor:
        raise FlashNormError(OUTPUT)
    return type(found), logits


def _said(error: BaseException) -> str:
    """What went wrong, in one line."""
    if isinstance(error, FlashNormError):
        return str(error)
    if isinstance(error, AttributeError) and error.name == WINDOW_COUNT:
        return WAITS
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"


@contextmanager
def _as_it_was(model: nn.Module) -> Iterator[None]:
    """A context after which every module has its attributes; raises where one has others."""
    before = [(vars(module), dict(vars(module))) for module in model.modules()]
    try:
        yield
        if not all(_same(held, values) for held, values in before):
            raise FlashNormError(STORES)
    finally:
        for held, values in before:
            if not _same(held, values):
                held.clear()
                held.update(values)


def _same(held: dict[str, Any], values: dict[str, Any]) -> bool:
    return held.keys() == values.keys() and all(held[n] is v for n, v in values.items())
