"""The fuzzer can fail: with a rule of the analysis broken it finds a counterexample."""

from dataclasses import replace

import pytest
import torch

from flashnorm import planner
from flashnorm.graph import absorb, contractions, rules, streams, unreached
from flashnorm.plan import Span
from tests.fuzz.draft import draft
from tests.fuzz.oracle import Options, judge

MODELS = 400


def sums_pass(monkeypatch):
    """A sum with a value that carries no gain, such as the residual, is not refused."""
    unified = rules._unified

    def lax(flow, node, first, second):
        try:
            return unified(flow, node, first, second)
        except rules.Blocked:
            value = first if first in flow.indices else second
            return flow.indices[value].expand(flow.graph.values[node.outputs[0]].shape)

    monkeypatch.setattr(rules, "_unified", lax)


def products_pass(monkeypatch):
    """A product with a function of itself is not refused."""

    def lax(flow, node):
        indexed = [v for v in node.inputs if v in flow.indices]
        return [flow.indices[indexed[0]].expand(flow.graph.values[node.outputs[0]].shape)]

    monkeypatch.setitem(rules.RULES, "mul", lax)


def slices_begin_at_zero(monkeypatch):
    """Which columns of a weight are read is not looked at."""
    column = contractions.column

    def lax(view, axis):
        number, positions = column(view, axis)
        return number, torch.arange(len(positions))

    monkeypatch.setattr(contractions, "column", lax)


def gains_begin_at_zero(monkeypatch):
    """Which element of a gain meets a column is not looked at."""
    spans = absorb._spans

    def lax(flow, gain, indices):
        return tuple(Span(s.start, 0, s.length) for s in spans(flow, gain, indices))

    monkeypatch.setattr(absorb, "_spans", lax)


def nothing_is_in_doubt(monkeypatch):
    """Parameters that were not read do not matter."""
    monkeypatch.setattr(planner, "refuse_unreached", lambda *given: None)
    monkeypatch.setattr(planner, "refuse_unreached_readers", lambda *given: None)


def readers_are_read_once(monkeypatch):
    """What else reads a weight is not looked at."""
    read = absorb._read

    def lax(flow, name, column, use):
        if use.indices is not None and not use.other:
            read(flow, name, column, use)

    monkeypatch.setattr(absorb, "_read", lax)


def streams_are_not_in_doubt(monkeypatch):
    """Parameters that were not read do not matter to a stream (centering)."""
    monkeypatch.setattr(streams, "_refuse_unreached", lambda found: None)


def nothing_is_elsewhere(monkeypatch):
    """Norms that are shared with a module that did not run are not looked at."""
    monkeypatch.setattr(unreached.Unreached, "elsewhere", lambda *given, **named: "")


def first_names_stay_tied(monkeypatch):
    """Only what has another name gets a copy when it is untied."""
    copies = absorb.copies

    def lax(graph, changed):
        return tuple(pair for pair in copies(graph, changed) if pair[0] in changed)

    monkeypatch.setattr(absorb, "copies", lax)


def streams_have_one_reader(monkeypatch):
    """What else reads a stream than LayerNorms is not looked at (centering)."""
    monkeypatch.setattr(streams.Streams, "refuse", lambda self, value, reason: None)


# Each with the first seed that notices it: from there on it takes a moment, from zero a minute.
MUTATIONS = {
    sums_pass: 7,
    products_pass: 36,
    slices_begin_at_zero: 51,
    gains_begin_at_zero: 29,
    nothing_is_in_doubt: 3,
    readers_are_read_once: 2,
    streams_have_one_reader: 29,
    streams_are_not_in_doubt: 1142,
    nothing_is_elsewhere: 3,
    first_names_stay_tied: 1070,
}


@pytest.mark.parametrize("mutation", MUTATIONS)
def test_a_broken_rule_is_found(mutation, monkeypatch):
    mutation(monkeypatch)
    first = MUTATIONS[mutation]
    found = (seed for seed in range(first, first + MODELS) if _wrong(seed))
    assert next(found, None) is not None, f"{MODELS} models did not notice it"


def _wrong(seed):
    options = replace(Options.of(seed), accelerate=False, force=False, fail=False)
    return judge(draft(seed), seed, options).wrong == "fold_"
