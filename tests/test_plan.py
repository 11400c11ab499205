"""A plan survives JSON, and what drives a rewrite is read off it once each."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flashnorm.errors import PlanError
from flashnorm.plan import (
    PLAN_VERSION,
    Cancelling,
    Centering,
    Consumer,
    Entry,
    Gain,
    Plan,
    Renorm,
    ScaledReader,
    Site,
    Span,
)

paths = st.text("abz019._é", max_size=20)
counts = st.integers(0, 2**31)
reals = st.floats(allow_nan=False, allow_infinity=False)
spans = st.builds(Span, counts, counts, counts)
consumers = st.builds(Consumer, paths, st.integers(-3, 3), st.lists(spans, max_size=3).map(tuple))
gains = st.builds(Gain, paths, reals, reals.filter(bool))
kinds = st.sampled_from(["rms", "layer", "dyt"])
runs = st.lists(st.tuples(counts, counts), max_size=3).map(tuple)
places = st.sampled_from(["nowhere", "output", "later"])
readers = st.builds(ScaledReader, paths, paths, places, runs, paths, counts)
renorms = st.builds(Renorm, paths, st.lists(counts, max_size=3).map(tuple))
cancellings = st.builds(Cancelling, paths, st.sampled_from(["exact", "ignore"]))
folded = st.builds(
    Site,
    path=paths,
    kind=kinds,
    width=counts,
    eps=st.none() | reals,
    gain_state=st.just("folded"),
    consumers=st.lists(consumers, max_size=3).map(tuple),
    gain=gains,
    source=paths,
    scale=st.sampled_from(["kept", "deferred", "partial", "cancelled"]),
    readers=st.lists(readers, max_size=2).map(tuple),
    renorms=st.lists(renorms, max_size=2).map(tuple),
)
others = st.builds(
    Site,
    path=paths,
    kind=kinds,
    width=counts,
    eps=st.none() | reals,
    gain_state=st.sampled_from(["kept", "none"]),
    reason=st.text(min_size=1, max_size=30),
    gain=st.none() | gains,
    source=paths,
)
plans = st.builds(
    Plan,
    sites=st.lists(folded | others, max_size=6).map(tuple),
    untied=st.lists(st.tuples(paths, paths), max_size=3).map(tuple),
    unreached=st.lists(paths, max_size=3).map(tuple),
    notes=st.lists(st.text(max_size=30), max_size=3).map(tuple),
    centerings=st.lists(st.builds(Centering, paths, counts), max_size=2).map(tuple),
    entries=st.lists(st.builds(Entry, paths, st.booleans()), max_size=2).map(tuple),
    cancellings=st.lists(cancellings, max_size=2).map(tuple),
    version=st.just(Plan(()).version),
)


@given(plans)
def test_a_plan_survives_json(plan):
    data = plan.to_json()
    assert Plan.from_json(data) == plan
    assert Plan.from_json(json.loads(json.dumps(data))) == plan
    assert json.loads(json.dumps(data)) == data, "to_json holds JSON values only"


@pytest.mark.parametrize("damage", [{"sites": [{}]}, {"entry": []}, {"sites": None}])
def test_what_is_no_plan_is_an_error(damage):
    with pytest.raises(PlanError, match="this is no plan"):
        Plan.from_json(Plan(()).to_json() | damage)


@given(plans)
def test_a_plan_is_hashable_and_to_json_leaves_it(plan):
    before = hash(plan)
    plan.to_json()
    assert hash(plan) == before == hash(Plan.from_json(plan.to_json()))


@given(plans)
def test_gains_are_those_that_fold_once_each(plan):
    found = plan.gains()
    assert len(found) == len(set(found))
    assert set(found) == {site.gain for site in plan.sites if site.gain_state == "folded"}


@given(plans)
def test_absorptions_are_all_consumers_of_folded_sites_once_each(plan):
    pairs = [(g, c) for items in plan.absorptions().values() for g, c in items]
    assert len(pairs) == len(set(pairs))
    assert set(pairs) == {(s.gain, c) for s in plan.folded for c in s.consumers}
    assert all(
        consumer.parameter == name
        for name, items in plan.absorptions().items()
        for _, consumer in items
    )


def test_a_shared_norm_is_absorbed_once():
    gain = Gain("shared.weight")
    reader = Consumer("linear.weight", 1, (Span(0, 0, 4),))
    site = Site("norm", "rms", 4, 1e-6, "folded", consumers=(reader,), gain=gain)
    again = Site("norm.again", "rms", 4, 1e-6, "folded", consumers=(reader,), gain=gain)
    plan = Plan((site, again))
    assert plan.gains() == (gain,)
    assert plan.absorptions() == {"linear.weight": ((gain, reader),)}


@pytest.mark.parametrize(("offset", "scale", "identity"), [(0, 1, 1), (1, 1, 0), (1, 2, 0)])
def test_the_identity_is_where_the_gain_is_one(offset, scale, identity):
    assert Gain("g", offset, scale).identity == identity


@pytest.mark.parametrize("version", [0, PLAN_VERSION - 1, PLAN_VERSION + 1, None])
def test_a_plan_of_another_version_is_refused(version):
    data = Plan(()).to_json() | {"version": version}
    with pytest.raises(
        ValueError, match=r"plan version .* found, \d+ expected: make the plan again"
    ):
        Plan.from_json(data)
