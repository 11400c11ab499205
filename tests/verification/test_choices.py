"""Choices are recorded, followed where they tie, and left alone where they do not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from flashnorm.verification.choices import Choices
from flashnorm.verification.precision import float64_truth

SCORES = torch.tensor([[0.1, 0.5, 0.5 - 1e-9], [0.9, 0.1, 0.3]], dtype=torch.float64)
TURNED = SCORES + torch.tensor([[0, 0, 2e-9], [0, 0, 0]], dtype=torch.float64)
OTHER = SCORES + torch.tensor([[0, 0, 0], [-0.8, 0, 0]], dtype=torch.float64)

CHOOSE: list[Callable[[Tensor], Any]] = [
    lambda scores: scores.topk(1, dim=-1)[1].squeeze(-1),
    lambda scores: scores.max(dim=-1)[1],
    lambda scores: scores.max(dim=-1, keepdim=True)[1].squeeze(-1),
    lambda scores: scores.argmax(-1),
    lambda scores: scores.T.argmax(0),
]


@pytest.mark.parametrize("choose", CHOOSE)
def test_a_tie_is_followed_and_a_decision_is_not(choose: Callable[[Tensor], Any]) -> None:
    first = Choices()
    with float64_truth(first):
        assert choose(SCORES).tolist() == [1, 0]
    second = first.follower(1e-6)
    with float64_truth(second):
        assert choose(TURNED).tolist() == [1, 0]
    assert second.turned == 1
    third = first.follower(1e-6)
    with float64_truth(third):
        assert choose(OTHER).tolist() == [1, 2]
    assert third.turned == 0


def test_the_values_follow_the_indices() -> None:
    first = Choices()
    with float64_truth(first):
        SCORES.topk(2)
    with float64_truth(first.follower(1e-6)):
        values, indices = TURNED.topk(2)
    assert torch.equal(values, TURNED.gather(-1, indices))
    assert indices[0].tolist() == [1, 2]


def test_another_course_of_events_is_not_followed() -> None:
    first = Choices()
    with float64_truth(first):
        SCORES.topk(1)
    second = first.follower(1.0)
    with float64_truth(second):
        assert TURNED.topk(2)[1][0].tolist() == [2, 1]
        assert TURNED.topk(1)[1][0].tolist() == [2]
        assert int(TURNED.argmax()) == 3
    assert second.turned == 0
