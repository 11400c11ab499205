"""Every further type: built tiny, folded, exact; and the list of those that are not is true."""

import copy

import pytest
import torch
import transformers

import flashnorm
from tests.zoo.classes import NoModel, further_types, model_class
from tests.zoo.coverage import EXACT, SLOW, recorded
from tests.zoo.fold import fold_outcome, needed_refusals, outputs, relative, specimen
from tests.zoo.further import NotTiny

ROWS = {row.name: row for row in recorded() if row.group == "further"}
COVERED = [name for name, row in ROWS.items() if row.traced]


def marked(names):
    """What takes long is left to the slow tests; how long, the coverage run has measured."""
    return [
        pytest.param(name, marks=pytest.mark.slow) if ROWS[name].fold_seconds > SLOW else name
        for name in names
    ]


# A weight that moves by one part in 2⁵² moves an output by half of the digits at most, or it is a
# step of a discontinuous model, of which an error would say nothing.
SMOOTH = 2.0**-26


def check(outcome):
    assert outcome.noise < SMOOTH
    assert outcome.error < EXACT
    assert all(site.reason for site in outcome.plan.sites if site.gain_state != "folded")
    assert all(site.consumers for site in outcome.plan.folded)


@pytest.mark.parametrize("name", marked(COVERED))
def test_fold_is_exact(name):
    outcome = fold_outcome(name, with_inputs=True, everything=True)
    check(outcome)
    assert bool(outcome.plan.sites) == bool(ROWS[name].sites)


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in COVERED if ROWS[name].default_inputs])
def test_fold_on_default_inputs_is_exact(name):
    check(fold_outcome(name, with_inputs=False))


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in COVERED if ROWS[name].refused_gains])
def test_refusals_are_needed(name):
    unneeded = [gain for gain, needed in needed_refusals(name).items() if not needed]
    assert set(unneeded) <= set(ROWS[name].unneeded)


def test_every_type_has_a_row():
    """Of the transformers that the page was made with: another one has other types."""
    text = (recorded.__globals__["DOCS"] / "coverage.md").read_text()
    if f"transformers {transformers.__version__} " not in text:
        pytest.skip("the page was made with another transformers")
    assert set(ROWS) == set(further_types())
    assert all(row.cause and row.category for row in ROWS.values() if not row.sites)


@pytest.mark.parametrize("name", [name for name, row in ROWS.items() if not row.model])
def test_a_type_without_a_class_has_none(name):
    row = ROWS[name]
    if row.category not in (NoModel.part, NoModel.package):
        assert model_class(name)
        return
    with pytest.raises(NoModel) as failure:
        specimen(name)
    assert failure.value.category == row.category


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", [name for name, row in ROWS.items() if row.category in NotTiny.categories()]
)
def test_a_type_that_is_not_covered_cannot_be(name):
    with pytest.raises(NotTiny):
        specimen(name)


def test_a_model_that_installs_hooks_when_asked_is_left_as_it_was():
    """Image features are taken by hooks; twice installed they would count every layer twice."""
    model, inputs = specimen("llava")
    before = outputs(model, inputs)
    hooks = [len(module._forward_hooks) for module in model.modules()]
    flashnorm.inspect(model, copy.deepcopy(inputs))
    assert [len(module._forward_hooks) for module in model.modules()] == hooks
    assert relative(outputs(model, inputs), before) == 0


@pytest.mark.parametrize(
    ("name", "argument"),
    [("vit", "pixel_values"), ("speech_to_text", "input_features"), ("wav2vec2", "input_values")],
)
def test_default_inputs_reach_what_is_not_text(name, argument):
    model, inputs = specimen(name)
    assert argument in inputs
    assert flashnorm.inspect(model.float()).folded


def test_outputs_that_differ_in_shape_are_not_equal():
    one = [torch.ones(2)]
    assert relative(one, one) == 0
    assert relative(one, [torch.ones(3)]) == relative(one, []) == float("inf")
    assert relative([torch.tensor([1.0, float("nan")])], [torch.ones(2)]) == float("inf")
