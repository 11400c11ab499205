"""Which of two compiled graphs of a model runs a step: by its tokens, and by what was measured.

Both graphs take the arguments of the traced one, and give its results.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from statistics import median
from typing import Any, NamedTuple

from torch import Tensor
from torch.fx import Graph

from flashnorm.engines.vllm_spelling import value_of

Compiled = Callable[..., Any]
TOKENS = (1, 2, 4, 8, 16, 32)  # of the steps that are measured
# In turns, and in a row: the first run finds the weights of the other graph in the caches.
ROUNDS, RUNS = 3, 4
SECONDS = 60.0  # of all, where no other process waits for as many runs
FASTER = 1.01  # less than that is noise


class Tokens(NamedTuple):
    """Where the number of tokens stands in the arguments of a graph.

    symbol: its name in the graph; at, dim: the first tensor that has it, and where; sizes: by
    the place of an argument, in which dimension it stands, or None where the argument is it.
    """

    symbol: str
    at: int
    dim: int
    sizes: dict[int, int | None]

    def of(self, args: Sequence[Any]) -> int:
        """How many tokens a step has."""
        return int(args[self.at].shape[self.dim])

    def first(self, args: Sequence[Any], count: int) -> list[Any]:
        """The arguments of a step of the first few tokens."""
        return [self._first(at, each, count) for at, each in enumerate(args)]

    def _first(self, at: int, each: Any, count: int) -> Any:
        if at not in self.sizes:
            return each
        dim = self.sizes[at]
        return count if dim is None else each.narrow(dim, 0, count)


def tokens_of(graph: Graph) -> Tokens | None:
    """Where the number of tokens stands, in a graph whose only open number that is."""
    sizes: dict[int, int | None] = {}
    symbols = set()
    placeholders = [node for node in graph.nodes if node.op == "placeholder"]
    for at, node in enumerate(placeholders):
        for dim, size in _sizes(value_of(node)):
            if at in sizes:  # in two of its dimensions
                return None
            symbols.add(size)
            sizes[at] = dim
    tensors = [(at, dim) for at, dim in sizes.items() if dim is not None]
    if len(symbols) != 1 or not tensors:
        return None
    return Tokens(symbols.pop(), *tensors[0], sizes)


def _sizes(value: Any) -> Iterator[tuple[int | None, str]]:
    """The symbols in a value, and where they stand."""
    if isinstance(value, Tensor):
        for dim, size in enumerate(value.shape):
            if not isinstance(size, int):
                yield dim, str(size)
    elif hasattr(value, "node") and not isinstance(value, int):
        yield None, str(value)


class Few(NamedTuple):
    """A compiled graph with our calls, for steps of few tokens.

    handlers: by the place of an argument, what it was when the graph was compiled: where it is
    another one, the model's weights are no longer those that the graph holds.
    """

    compiled: Compiled
    tokens: Tokens
    handlers: dict[int, Tensor]


class Steps:
    """A graph for steps of few tokens, and one as it was for the others.

    most: up to how many tokens the first one runs; None where that is measured, as soon as a step
    changes nothing (is_idle), in so many seconds. counts: the numbers of tokens that it runs.
    """

    def __init__(
        self,
        few: Few,
        theirs: Compiled,
        most: int | None,
        is_idle: Callable[[], bool],
        say: Callable[..., None],
        seconds: float = SECONDS,
    ) -> None:
        self._few: Few | None = few
        self._seconds = seconds
        self._theirs, self._tokens = theirs, few.tokens
        self.counts = frozenset(range(1, 1 + (most or 0)))
        self._measured = most is not None
        self._is_idle, self._say = is_idle, say

    def __call__(self, *args: Any) -> Any:
        """One step, by the graph that is faster for so many tokens."""
        if not self._measured and self._is_idle():
            self._measure(args)
        if self._few is not None and self._tokens.of(args) in self.counts:
            if all(args[at] is handler for at, handler in self._few.handlers.items()):
                return self._few.compiled(*args)
            self._say("flashnorm: the weights were replaced: vLLM's own kernels run from here on")
            self._let_go()
        return self._theirs(*args)

    def _let_go(self) -> None:
        """The graph of few tokens, and the weights that it holds."""
        self._few, self.counts = None, frozenset()

    def _measure(self, args: Sequence[Any]) -> None:
        self._measured = True
        ratios = dict(self._ratios(args, time.monotonic() + self._seconds))
        self.counts = faster(ratios)
        told = ", ".join(f"{count}: {ratio:.2f}x" for count, ratio in ratios.items())
        self._say("flashnorm: steps of %s run on its kernels (%s)", spelled(self.counts), told)
        if not self.counts:
            self._let_go()

    def _ratios(self, args: Sequence[Any], until: float) -> Iterator[tuple[int, float]]:
        """By tokens of a step, how many times as fast our graph is, until time is up."""
        for count in TOKENS:
            if count > self._tokens.of(args) or time.monotonic() > until:
                return
            yield count, self._ratio(self._tokens.first(args, count))

    def _ratio(self, args: Sequence[Any]) -> float:
        assert self._few is not None
        times: dict[Any, list[float]] = {self._theirs: [], self._few.compiled: []}
        for _ in range(ROUNDS):
            for compiled, taken in times.items():
                taken += list(_seconds(compiled, args))[1:]
        theirs, ours = (median(taken) for taken in times.values())
        return theirs / ours


def _seconds(compiled: Compiled, args: Sequence[Any]) -> Iterator[float]:
    for _ in range(RUNS):
        start = time.perf_counter()
        compiled(*args)
        yield time.perf_counter() - start


def faster(ratios: dict[int, float]) -> frozenset[int]:
    """The numbers of tokens for which all that was measured around them was faster."""
    found, before = set(), True
    for count, ratio in ratios.items():
        wins = ratio >= FASTER
        first = max((c for c in ratios if c < count), default=0) + 1
        if wins:
            found |= set(range(first, count + 1)) if before else {count}
        before = wins
    return frozenset(found)


def spelled(counts: frozenset[int]) -> str:
    """Numbers of tokens, in words."""
    if not counts:
        return "no number of tokens"
    runs: list[list[int]] = []
    for count in sorted(counts):
        if runs and count == runs[-1][1] + 1:
            runs[-1][1] = count
        else:
            runs.append([count, count])
    return ", ".join(str(a) if a == b else f"{a} to {b}" for a, b in runs) + " tokens"
