"""A model in every way to run it, each without and with `accelerate_`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

import flashnorm
from benchmarks.gpu import timing
from benchmarks.gpu.ours import switched_off
from flashnorm.bench.models import accelerated_copy, sharing_copy
from flashnorm.bench.records import EAGER, OURS
from flashnorm.bench.variants import Variant
from flashnorm.nn import FlashRMSNorm

CAPTURED, REDUCED, TUNED, HUB = "captured", "reduce-overhead", "max-autotune", "hub kernels"
STEPS = "captured steps"  # by `capture_`
COMPILED = "compile"  # of a prefill: no CUDA graphs
FOLDED = "compile, gains folded"  # the same of norms without a gain, as a strict checkpoint has
WARM = 3  # steps before a capture
Graph = tuple[Callable[[], None], Tensor, Tensor]  # its replay, the token it reads, its logits


def ours(way: str) -> str:
    return f"{OURS}, {way}"


def is_ours(name: str) -> bool:
    return name.startswith(OURS)


# What is measured in one go, beside eager and ours; the others but for the first are ours.
GROUPS: dict[str, tuple[str, ...]] = {
    "plain": (),
    CAPTURED: (CAPTURED, ours(CAPTURED), ours(STEPS)),
    REDUCED: (REDUCED, ours(REDUCED)),
    TUNED: (TUNED, ours(TUNED)),
    HUB: (HUB,),
}
WITHOUT = {f"{ours(REDUCED)}, without {part}": part for part in ("early", "attention", "residual")}
LATE_NORM = f"{ours(FOLDED)}, without deferral"
# The last group is of ours alone: each part of it left out once.
EACH_PART = "each part"
EVERY = {**GROUPS, EACH_PART: (ours(REDUCED), *WITHOUT)}
# What is held against the same without us; and what lacks a part, against the whole.
PAIRS = (
    (EAGER, OURS),
    (COMPILED, ours(COMPILED)),
    (COMPILED, ours(FOLDED)),
    (ours(FOLDED), LATE_NORM),
    *((names[0], own) for names in EVERY.values() for own in names[1:]),
)


class Static(Variant):
    """Steps on a static cache that are not compiled."""

    def __init__(self, name: str, model: nn.Module) -> None:
        super().__init__(name, model, False)
        self.compiled = True  # in what it means for caches


class Captured(Static):
    """A step on a static cache as one CUDA graph, captured by hand: no compiler, no Python.

    The cache counts its tokens on the device, so that every replay writes the next one.
    """

    def __init__(self, name: str, model: nn.Module) -> None:
        super().__init__(name, model)
        self._graphs: dict[int, Graph] = {}
        self._current: Graph | None = None

    def start(self, prompt: Tensor, room: int) -> tuple[Any, Tensor]:
        length = len(prompt) + room
        if length not in self._graphs:
            self._graphs[length] = self._capture(prompt, room)
        self._current = self._graphs[length]
        return super().start(prompt, room)

    def _capture(self, prompt: Tensor, room: int) -> Graph:
        cache, _ = super().start(prompt, room)
        token, step = prompt[-1:].clone(), super().step
        replay, logits = timing.capture(
            lambda: [step(token, cache) for _ in range(WARM)], lambda: step(token, cache)
        )
        return replay, token, logits

    def step(self, token: Tensor, cache: Any) -> Tensor:
        assert self._current is not None, "start comes before the first step"
        replay, place, logits = self._current
        place.copy_(token)
        replay()
        return logits


class Steps(Static):
    """The same by `flashnorm.capture_`: `generate` replays graphs too, and nothing is by hand."""

    def __init__(self, name: str, model: nn.Module) -> None:
        super().__init__(name, flashnorm.capture_(model))

    def _static(self) -> dict[str, Any]:
        return {"cache_implementation": "static"}


def _without_gains(model: nn.Module) -> nn.Module:
    """A copy whose norms have no gain, as a strict fold leaves them: timed, and not compared."""
    made = sharing_copy(model)
    for path, module in list(made.named_modules()):
        if type(module).__name__.endswith("RMSNorm"):
            parent, _, name = path.rpartition(".")
            width, eps = module.weight.shape[0], module.variance_epsilon
            setattr(made.get_submodule(parent), name, FlashRMSNorm(width, eps))
    return made


def _without(part: str, name: str, way: str, model: nn.Module, device: str) -> Variant:
    """Ours in a compiled graph without one part: accelerated, compiled and called without it."""
    with switched_off(part):
        made = build(ours(way), model, device)
    call = made.call

    def called(*args: Any, **kwargs: Any) -> Any:
        with switched_off(part):
            return call(*args, **kwargs)

    made.name, made.call = name, called
    return made


def build(name: str, model: nn.Module, device: str) -> Variant:
    """The variant `name` of `model`, which is left as it is; weights are shared.

    On a CPU (a dry run) nothing is captured or compiled: the same steps run on the same caches.
    """
    if part := WITHOUT.get(name):
        return _without(part, name, REDUCED, model, device)
    if name == LATE_NORM:
        return _without("deferral", name, FOLDED, model, device)
    own, way = is_ours(name), name.removeprefix(f"{OURS}, ")
    if way == FOLDED:
        model = _without_gains(model)
    made = accelerated_copy(model) if own else sharing_copy(model)
    if way in (EAGER, OURS):
        return Variant(name, made, False)
    if way == HUB:
        made.set_use_kernels(True)  # type: ignore[operator]
        return Variant(name, made, False)
    if device == "cpu":
        return Static(name, made)
    if way == CAPTURED:
        return Captured(name, made)
    if way == STEPS:
        return Steps(name, made)
    return Variant(name, made, True, None if way in (COMPILED, FOLDED) else way)
