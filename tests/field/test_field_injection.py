"""Whatever fails, a model and the process are as they were; to look at it touches nothing."""

import copy

import pytest
import torch

import flashnorm
from tests.beyond.injection import ACTIONS, Place, attempt, events, inject, places
from tests.beyond.injection import Counter as Events
from tests.beyond.plain import SPECIMENS, TRANSFORMERS
from tests.beyond.snapshot import Snapshot
from tests.beyond.specimen import Specimen, made, run

BY_NAME = {specimen.name: specimen for specimen in (*SPECIMENS, *TRANSFORMERS)}
NUMBER = 6


def changed(specimen: Specimen, action: str, number: int = NUMBER) -> list[str]:
    """Every place that left something behind, and what."""
    trial = inject(specimen, action, number)
    assert trial.tried == number
    assert trial.raised
    return [
        f"{v.place.failure.__name__} at {v.where} ({v.raised}): {v.differences[0]}"
        for v in trial.violations
    ]


@pytest.mark.parametrize("action", ACTIONS)
@pytest.mark.parametrize("specimen", SPECIMENS, ids=lambda s: s.name)
def test_field_a_failure_anywhere_leaves_everything_as_it_was(specimen, action):
    assert changed(specimen, action) == []


@pytest.mark.parametrize("action", ACTIONS)
@pytest.mark.parametrize("name", ["llama"])
def test_field_a_failure_anywhere_leaves_a_model_of_transformers_as_it_was(name, action):
    assert changed(BY_NAME[name], action, 3) == []


@pytest.mark.slow
@pytest.mark.parametrize("action", ACTIONS)
@pytest.mark.parametrize("specimen", TRANSFORMERS, ids=lambda s: s.name)
def test_field_a_failure_anywhere_leaves_any_model_of_transformers_as_it_was(specimen, action):
    assert changed(specimen, action, 20) == []


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("specimen", SPECIMENS, ids=lambda s: s.name)
def test_field_inspect_leaves_everything_as_it_was(specimen, training):
    model, inputs = made(specimen)
    model.train(training)
    given = copy.deepcopy(inputs)
    before = Snapshot.of(model, given)
    flashnorm.inspect(model, given)
    assert before.differences(Snapshot.of(model, given)) == []


@pytest.mark.parametrize("name", ["gpt2", "bert", "gemma2"])
def test_field_inspect_leaves_a_model_of_transformers_as_it_was(name):
    model, inputs = made(BY_NAME[name])
    before = Snapshot.of(model, inputs)
    flashnorm.inspect(model, inputs)
    assert before.differences(Snapshot.of(model, inputs)) == []


@pytest.mark.parametrize("action", ACTIONS)
def test_field_a_configuration_that_cannot_be_filled_again_survives(action):
    model, inputs = made(BY_NAME["frozen config"])
    config, expected = model.config, run(model, inputs)
    ACTIONS[action](model, inputs)
    assert model.config is config
    assert config["width"] == 16
    assert config["names"] == ["a", "b"]
    (found,), (before,) = run(model, inputs), expected
    # Folding rounds every weight once, and kernels add in another order.
    assert torch.allclose(found, before, rtol=1e-5, atol=1e-5)


def test_field_what_is_accelerated_and_restored_is_as_it_was():
    model, inputs = made(BY_NAME["blocks"])
    before = Snapshot.of(model)
    flashnorm.restore_(flashnorm.accelerate_(model, inputs))
    assert before.differences(Snapshot.of(model)) == []


# The harness itself: what it has to see, it sees.
def test_a_snapshot_sees_values_identities_keys_and_flags():
    model, _ = made(BY_NAME["counting"])
    for change in (
        lambda: model.head.weight.data.mul_(1.5),
        lambda: setattr(model, "state", model.state.clone()),
        lambda: model.seen.append(1),
        lambda: model.cache["inner"].update(last=2),
        lambda: model.head.weight.requires_grad_(False),
        lambda: model.block.train(),
        lambda: torch.rand(1),
        lambda: model.head.register_forward_hook(print),
    ):
        before = Snapshot.of(model)
        assert before.differences(Snapshot.of(model)) == []
        change()
        assert before.differences(Snapshot.of(model))


@pytest.mark.parametrize("kind", ["operation", "line"])
def test_an_injected_failure_comes_where_it_should(kind):
    seen = events("inspect", BY_NAME["blocks"])[kind]
    count = max(number for numbers in seen.values() for number in numbers)
    assert count > 50
    model, inputs = made(BY_NAME["blocks"])
    counter = Events(Place(kind, count // 2, KeyboardInterrupt, lasting=False))
    assert isinstance(attempt("inspect", model, inputs, {kind: counter}), KeyboardInterrupt)
    assert counter.count == count // 2
    assert places({kind: seen}, 20, 0) == places({kind: seen}, 20, 0) != places({kind: seen}, 20, 1)


class At(Events):
    """Interrupts a line at its `time`-th turn."""

    def __init__(self, wanted: str, time: int) -> None:
        super().__init__()
        self.wanted, self.time = wanted, time

    def event(self, where: str) -> None:
        self.time -= where == self.wanted
        if where == self.wanted and not self.time:
            raise KeyboardInterrupt(where)


@pytest.mark.parametrize("function", ["_quiet", "uninterrupted"])
def test_field_an_interruption_leaves_no_log_muted(function):
    """Whichever line of what mutes the log of a first try is interrupted."""
    specimen = BY_NAME["blocks"]
    attempt("inspect", *made(specimen), {})  # what is done once is done
    lines = events("inspect", specimen)["line"]
    turns = {where: len(n) for where, n in lines.items() if where.endswith(f" {function}")}
    assert len(turns) > 4
    for where, time in {(where, time) for where, n in turns.items() for time in (1, n)}:
        model, inputs = made(specimen)
        before = Snapshot.of(model, inputs)
        raised = str(attempt("inspect", model, inputs, {"line": At(where, time)}))
        assert raised == where
        assert before.differences(Snapshot.of(model, inputs)) == [], where
