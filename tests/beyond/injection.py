"""Failures raised while a model is inspected, folded and accelerated, and what they leave behind.

Two kinds of places: operations (of the recorder, and of torch under a mode of our own) and lines of
the package, as a KeyboardInterrupt comes.
"""

from __future__ import annotations

import copy
import random
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import flashnorm
from flashnorm.graph.record import Recorder

from .snapshot import Snapshot
from .specimen import Specimen, made

RECORDED = "recorded"
PACKAGE = str(Path(flashnorm.__file__).parent)
ACTIONS: dict[str, Callable[[nn.Module, Any], Any]] = {
    "inspect": lambda model, inputs: flashnorm.inspect(model, inputs),
    "fold_": lambda model, inputs: flashnorm.fold_(model, inputs, center=True, cancel=True),
    "accelerate_": lambda model, inputs: flashnorm.accelerate_(model, inputs, fold=True),
}


class Injected(Exception):
    """Raised by nobody else."""


class InjectedRuntime(RuntimeError):
    """Of a kind that libraries catch."""


FAILURES: tuple[type[BaseException], ...] = (Injected, InjectedRuntime, KeyboardInterrupt)


@dataclass(frozen=True)
class Place:
    """The `number`-th event of a kind raises; `lasting`: so does every later recorded operation.

    What lasts is a forward that fails whichever way it is tried. A torch that fails whatever it is
    asked for would leave nobody a way back.
    """

    kind: str  # "operation" or "line"
    number: int
    failure: type[BaseException]
    lasting: bool


@dataclass(frozen=True)
class Violation:
    """What a failure left changed."""

    specimen: str
    action: str
    place: Place
    where: str
    raised: str
    differences: tuple[str, ...]


class Counter:
    """Counts events of one kind, and raises at a place."""

    def __init__(self, place: Place | None = None) -> None:
        self.count, self.place, self.where = 0, place, ""
        self.seen: dict[str, list[int]] = {}

    def event(self, where: str) -> None:
        self.count += 1
        place = self.place
        if place is None:
            self.seen.setdefault(where, []).append(self.count)
            return
        if self.count < place.number:
            return
        if self.count == place.number or (place.lasting and where.startswith(RECORDED)):
            self.where = self.where or where
            raise place.failure(f"injected at {place.kind} {place.number}")


class _Operations(TorchDispatchMode):
    """Sees the operations that no inner mode takes for itself."""

    def __init__(self, counter: Counter) -> None:
        super().__init__()
        self._counter = counter

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self._counter.event(str(func))
        return func(*args, **(kwargs or {}))


@contextmanager
def _on_operations(counter: Counter) -> Iterator[None]:
    """The operations of the recorder, and those outside it."""
    recorded = Recorder.__torch_dispatch__

    def dispatch(self: Any, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        counter.event(f"{RECORDED} {func}")
        return recorded(self, func, types, args, kwargs)

    Recorder.__torch_dispatch__ = dispatch  # type: ignore[method-assign]
    try:
        with _Operations(counter):
            yield
    finally:
        Recorder.__torch_dispatch__ = recorded  # type: ignore[method-assign]


@contextmanager
def _on_lines(counter: Counter) -> Iterator[None]:
    """The lines of the package, in this thread, where Ctrl-C interrupts."""
    handler = signal.getsignal(signal.SIGINT)

    def local(frame: FrameType, event: str, _: Any) -> Any:
        if event == "line" and signal.getsignal(signal.SIGINT) is handler:
            name = frame.f_code.co_filename.removeprefix(PACKAGE)
            counter.event(f"{name}:{frame.f_lineno} {frame.f_code.co_name}")
        return local

    def enter(frame: FrameType, event: str, _: Any) -> Any:
        return local if frame.f_code.co_filename.startswith(PACKAGE) else None

    before = sys.gettrace()
    sys.settrace(enter)
    try:
        yield
    finally:
        sys.settrace(before)


WATCHES = {"operation": _on_operations, "line": _on_lines}


def attempt(
    action: str, model: nn.Module, inputs: Any, counters: dict[str, Counter]
) -> BaseException | None:
    """Do it under a watch for each kind; returns what was raised."""
    torch.manual_seed(0)
    try:
        with ExitStack() as stack:
            for kind, counter in counters.items():
                stack.enter_context(WATCHES[kind](counter))
            ACTIONS[action](model, inputs)
    except (Exception, KeyboardInterrupt) as error:
        return error
    return None


def events(action: str, specimen: Specimen) -> dict[str, dict[str, list[int]]]:
    """The numbers of the events of each kind, by where they are; empty where the action fails."""
    model, inputs = made(specimen)
    counters = {kind: Counter() for kind in WATCHES}
    error = attempt(action, model, inputs, counters)
    return {} if error is not None else {kind: c.seen for kind, c in counters.items()}


def places(seen: dict[str, dict[str, list[int]]], number: int, seed: int) -> list[Place]:
    """`number` random places, in turn of both kinds and of all failures.

    First where, then which time: most events belong to the recording, and most harm could be done
    by the few that come after it.
    """
    generator, found = random.Random(seed), []
    kinds = [kind for kind in seen if seen[kind]]
    for index in range(number if kinds else 0):
        kind = kinds[index % len(kinds)]
        failure = FAILURES[index // len(kinds) % len(FAILURES)]
        lasting = failure is not KeyboardInterrupt and generator.random() < 0.5
        numbers = seen[kind][generator.choice(sorted(seen[kind]))]
        found.append(Place(kind, generator.choice(numbers), failure, lasting))
    return found


@dataclass
class Trial:
    """What `inject` found: `tried` places, of which `raised` ended the action."""

    tried: int
    raised: int
    violations: list[Violation]


def inject(specimen: Specimen, action: str, number: int, seed: int = 0) -> Trial:
    """Fail at random places of one action; after each the model and the process are as before.

    What a failure did not end (a second way was found) is compared for `inspect` only: the others
    have then done what they were asked for.
    """
    seen = events(action, specimen)
    trial = Trial(0, 0, [])
    model = None
    for place in places(seen, number, seed):
        if model is None:
            model, inputs = made(specimen)
            state = torch.get_rng_state()
        found = _one(specimen, action, place, model, inputs)
        trial.tried += 1
        trial.raised += found.raised != "nothing"
        if found.differences:
            trial.violations.append(found)
        if found.differences or (found.raised == "nothing" and action != "inspect"):
            model = None
            torch.set_rng_state(state)
    return trial


def _one(specimen: Specimen, action: str, place: Place, model: nn.Module, inputs: Any) -> Violation:
    torch.manual_seed(0)
    given = copy.deepcopy(inputs)
    before = Snapshot.of(model, given)
    counter = Counter(place)
    error = attempt(action, model, given, {place.kind: counter})
    raised = "nothing" if error is None else f"{type(error).__name__}: {error}"[:200]
    differences: tuple[str, ...] = ()
    if error is not None or action == "inspect":
        error = None  # its traceback holds frames, and they what they worked on
        differences = tuple(before.differences(Snapshot.of(model, given))[:20])
    return Violation(specimen.key, action, place, counter.where, raised, differences)
