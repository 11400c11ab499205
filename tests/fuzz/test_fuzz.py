"""A slice of the random models: about two minutes of one core; CONTRIBUTING.md has the rest."""

import pytest

from tests.fuzz.disk import examine_disk
from tests.fuzz.draft import draft
from tests.fuzz.examine import counterexample
from tests.fuzz.oracle import Options, judge
from tests.fuzz.program import build
from tests.fuzz.tally import Tally

CHUNKS, MODELS = 8, 150


@pytest.mark.parametrize("chunk", range(CHUNKS))
def test_no_random_model_is_changed(chunk):
    tally = Tally()
    for seed in range(chunk * MODELS, (chunk + 1) * MODELS):
        verdict = judge(draft(seed), seed, Options.of(seed))
        assert not verdict.wrong, counterexample(seed, verdict)
        tally.add(verdict)
    assert tally.models >= 0.9 * MODELS
    assert tally.folded >= 0.08 * tally.norms
    assert tally.forced >= 20
    assert tally.settled >= 0.6


@pytest.mark.parametrize("chunk", range(2))
def test_no_random_checkpoint_is_changed(chunk):
    verdicts = [examine_disk(seed) for seed in range(6 * chunk, 6 * chunk + 6)]
    assert not [v.detail for v in verdicts if v.wrong]
    assert sum(v.folded for v in verdicts) >= 6


def test_a_seed_always_gives_the_same_model():
    assert draft(11).source == draft(11).source != draft(12).source
    first, second = build(draft(11), 11).state_dict(), build(draft(11), 11).state_dict()
    assert all(first[name].equal(second[name]) for name in first)
