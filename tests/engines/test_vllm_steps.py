"""Which of two graphs runs a step: by its tokens, by what was measured, and by whose weights."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest
import torch

from flashnorm.engines import vllm_steps
from flashnorm.engines.vllm_steps import Few, Steps, Tokens, faster, spelled

AT = Tokens("s0", 1, 1, {0: None, 1: 1})
HANDLER = torch.tensor(7)


class Clock:
    """Time that passes where a graph runs, as much as it is told for so many tokens."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, ours: float) -> None:
        self.now = 0.0
        self.ours = ours
        self.ran: list[tuple[str, int]] = []
        monkeypatch.setattr(vllm_steps.time, "perf_counter", lambda: self.now)
        monkeypatch.setattr(vllm_steps.time, "monotonic", lambda: self.now)

    def graph(self, name: str) -> Any:
        def run(count: int, x: torch.Tensor, handler: torch.Tensor) -> str:
            assert x.shape == (3, count)
            self.ran.append((name, count))
            self.now += 0.1 * (1 + count / 32 if name == "theirs" else self.ours * (1 + count / 8))
            return name

        return run


def args(count: int, handler: torch.Tensor = HANDLER) -> tuple[Any, ...]:
    return count, torch.zeros(3, count), handler


def steps(
    clock: Clock, most: int | None, idle: bool = True, seconds: float = 1e9
) -> tuple[Steps, list[str]]:
    said: list[str] = []
    few, say = Few(clock.graph("ours"), AT, {2: HANDLER}), lambda f, *a: said.append(f % a)
    return Steps(few, clock.graph("theirs"), most, lambda: idle, say, seconds), said


def test_up_to_as_many_tokens_as_were_asked_for(monkeypatch):
    made, said = steps(Clock(monkeypatch, 1), 4)
    assert [made(*args(count)) for count in (1, 4, 5, 600)] == ["ours", "ours", "theirs", "theirs"]
    assert said == []


def test_up_to_as_many_tokens_as_were_faster(monkeypatch):
    clock = Clock(monkeypatch, 0.7)
    made, said = steps(clock, None)
    assert made(*args(600)) == "theirs"  # the step that warms up
    assert made.counts == frozenset({1, 2, 3, 4})
    assert [made(*args(count)) for count in (1, 4, 5, 600)] == ["ours", "ours", "theirs", "theirs"]
    assert said[0].startswith("flashnorm: steps of 1 to 4 tokens run on its kernels (1: 1.31x, 2: ")
    measured = {count for _, count in clock.ran[:-5]}
    assert measured == set(vllm_steps.TOKENS)


def test_nothing_is_measured_while_sequences_are_there(monkeypatch):
    made, _ = steps(Clock(monkeypatch, 0.1), None, idle=False)
    assert [made(*args(1)) for _ in range(3)] == ["theirs"] * 3


def test_what_is_never_faster_is_let_go_with_its_weights(monkeypatch):
    made, said = steps(Clock(monkeypatch, 2.0), None)
    held = weakref.ref(made._few.compiled)
    made(*args(64))
    gc.collect()
    assert held() is None
    assert made(*args(1)) == "theirs"
    assert "no number of tokens" in said[0]


def test_time_and_tokens_bound_what_is_measured(monkeypatch):
    made, _ = steps(Clock(monkeypatch, 0.1), None)
    made(*args(3))  # 4 tokens cannot be cut from 3
    assert made.counts == frozenset({1, 2})
    large, _ = steps(Clock(monkeypatch, 0.1), None, seconds=1.0)
    large(*args(64))
    assert large.counts == frozenset({1})


def test_other_weights_end_it(monkeypatch):
    made, said = steps(Clock(monkeypatch, 0.1), 8)
    assert made(*args(1)) == "ours"
    assert made(*args(1, HANDLER.clone())) == "theirs"
    assert made(*args(1)) == "theirs"  # for good
    assert "replaced" in said[0]


@pytest.mark.parametrize(
    ("ratios", "counts"),
    [
        ({}, []),
        ({1: 1.2}, [1]),
        ({1: 1.2, 2: 1.1, 4: 1.05, 8: 0.9}, [1, 2, 3, 4]),
        ({1: 0.9, 2: 1.1, 4: 1.1}, [2, 3, 4]),
        ({1: 1.1, 2: 1.0, 4: 1.1, 8: 1.2}, [1, 4, 5, 6, 7, 8]),
    ],
)
def test_what_lies_between_two_that_win(ratios, counts):
    assert sorted(faster(ratios)) == counts


def test_numbers_in_words():
    assert spelled(frozenset()) == "no number of tokens"
    assert spelled(frozenset({1, 4, 5, 6, 9})) == "1, 4 to 6, 9 tokens"
