"""In-place functions return the model; what `fold_` did is asked afterwards."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn

import flashnorm
from flashnorm.rewrite import apply_plan_

WIDTH = 8
X = torch.randn(3, WIDTH)


def model(gain=0.5):
    made = nn.Sequential(nn.RMSNorm(WIDTH), nn.Linear(WIDTH, WIDTH))
    nn.init.normal_(made[0].weight, 1, 0.3) if gain != 1 else nn.init.ones_(made[0].weight)
    return made


def test_in_place_functions_return_the_model():
    made = model()
    plan = flashnorm.inspect(made, (X,))
    assert flashnorm.fold_(made, (X,)) is made
    assert flashnorm.unfold_(made) is made
    assert apply_plan_(made, plan) is made
    flashnorm.unfold_(made)
    assert flashnorm.accelerate_(made, (X,)) is made
    assert flashnorm.restore_(made) is made


def test_folding_is_the_plan_that_was_carried_out():
    made = model()
    plan = flashnorm.inspect(made, (X,))
    assert plan.folded
    done = flashnorm.folding(flashnorm.fold_(made, (X,)))
    assert done.absorptions() == plan.absorptions()
    flashnorm.fold_(made, (X,))
    assert flashnorm.folding(made) is done, "folding again changes nothing"


def test_a_fold_of_nothing_has_its_plan_with_the_reasons():
    made = flashnorm.fold_(model(gain=1), (X,))
    (site,) = flashnorm.folding(made).sites
    assert (site.gain_state, site.reason) == (
        "none",
        "its gain is one everywhere already: nothing to fold",
    )
    with pytest.raises(flashnorm.FoldError, match=r"was not folded by flashnorm\.fold_"):
        flashnorm.unfold_(made)
    nn.init.normal_(made[0].weight, 1, 0.3)
    assert flashnorm.folding(flashnorm.fold_(made, (X,))).folded


@pytest.mark.parametrize("gain", [0.5, 1])
@pytest.mark.parametrize("twin", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_keep_it(gain, twin):
    made = flashnorm.fold_(model(gain), (X,))
    assert flashnorm.folding(twin(made)) == flashnorm.folding(made)


@pytest.mark.parametrize(
    "before", [lambda m: m, lambda m: flashnorm.unfold_(flashnorm.fold_(m, X))]
)
def test_a_model_that_is_not_folded_has_none(before):
    made = before(model())
    message = r"this Sequential was not folded by flashnorm\.fold_.*inspect says what a fold would"
    with pytest.raises(flashnorm.FlashNormError, match=message):
        flashnorm.folding(made)


def test_an_unfolded_model_has_none_from_before_either():
    made = flashnorm.fold_(model(gain=1), (X,))
    nn.init.normal_(made[0].weight, 1, 0.3)
    flashnorm.unfold_(flashnorm.fold_(made, (X,)))
    with pytest.raises(flashnorm.FlashNormError, match="was not folded"):
        flashnorm.folding(made)


def test_a_fold_that_fails_leaves_none():
    made = model().half()
    with torch.no_grad():
        made[0].weight[3], made[1].weight[5, 3] = -284.0, 6e4
    with pytest.raises(flashnorm.FoldError, match="overflow"):
        flashnorm.fold_(made, (X.half(),))
    with pytest.raises(flashnorm.FlashNormError, match="was not folded"):
        flashnorm.folding(made)


def test_accelerate_with_fold_tells_its_plan_too():
    made = flashnorm.accelerate_(model(), (X,), fold=True)
    assert flashnorm.folding(made).folded
