"""What a Llama layer keeps for its gradient: the bars, counted and not timed."""

from __future__ import annotations

from functools import cache

import pytest

from benchmarks import training

# Of one layer whose feed-forward width is 4 n and whose keys and values are n/4 wide, in rows of
# n numbers per token: q, k, v and the attention's result.
ATTENTION = 1 + 1 / 4 + 1 / 4 + 1
FFN = 4


@cache
def rows(variant: str) -> float:
    return training.per_layer(variant)


def per_head_and_norm(statistics: int) -> float:
    """Numbers in float32: the softmax's for every head, and s for every norm."""
    return (training.HEADS + statistics) * 4 / (training.WIDTH * 2)


def test_it_is_what_the_layer_is_made_of():
    """Two norms' x, the attention, gate and up."""
    assert rows("flashnorm") == 2 + ATTENTION + 2 * FFN + per_head_and_norm(2)


def test_the_models_of_others_are_counted_right():
    """x and z of each norm; gate, silu(gate), up and their product."""
    assert rows("rms_norm") == 4 + ATTENTION + 4 * FFN + per_head_and_norm(2)
    assert rows("liger") == 4 + ATTENTION + 3 * FFN + per_head_and_norm(2)
    assert rows("dividing") == 2 + ATTENTION + 4 * FFN + per_head_and_norm(2)


@pytest.mark.parametrize("variant", ["eager", "rms_norm", "rms_norm, composite"])
def test_at_least_12_percent_under_what_models_run(variant):
    assert rows("flashnorm") <= 0.88 * rows(variant)


@pytest.mark.parametrize("variant", ["liger", "dividing", "dividing, liger's GLU"])
def test_no_more_than_other_kernels(variant):
    assert rows("flashnorm") <= rows(variant)


@pytest.mark.parametrize("variant", ["rms_norm", "dividing", "liger", "flashnorm"])
def test_all_of_them_have_the_gradients_of_the_model(variant):
    """No farther from float32 than the eager model in bf16, but for what a largest value varies."""
    assert training.error(variant) <= 1.5 * training.error("eager")


def test_the_peak_of_a_step_is_lower():
    assert training.peak("flashnorm") <= 0.88 * training.peak("rms_norm")
