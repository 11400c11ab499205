"""The table of a plan: alike norms in one row, and figures that add up."""

from __future__ import annotations

from io import StringIO

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from flashnorm.patterns import merged, ranges
from flashnorm.plan import Consumer, Gain, Plan, Site, Span
from flashnorm.report import rows, show, totals

WIDTH = 8


def site(path, *readers, gain_state="folded", reason="", offset=0.0, weight=None, eps=1e-6):
    spans = (Span(0, 0, WIDTH),)
    consumers = tuple(Consumer(f"{name}.weight", 1, spans) for name in readers)
    parameter = Gain(weight or f"{path}.weight", offset)
    return Site(path, "rms", WIDTH, eps, gain_state, reason, consumers, parameter)


def layers(count, start=0):
    return [
        site(f"m.layers.{i}.norm", f"m.layers.{i}.att.a", f"m.layers.{i}.att.b", f"m.layers.{i}.r")
        for i in range(start, start + count)
    ]


def text(plan, width=120, **options):
    console = Console(file=StringIO(), width=width, color_system=None)
    console.print(show(plan, **options))
    return console.file.getvalue()


def test_layers_share_a_row_with_their_count():
    head = site("m.norm", "head")
    found = rows(Plan((*layers(30), head)))
    assert [(row.path, row.count) for row in found] == [("m.layers.{0-29}.norm", 30), ("m.norm", 1)]
    assert [row.into for row in found] == ["att: a b, r", "head"]
    assert "m.layers.{0-29}.norm ×30" in text(Plan((*layers(30), head)))


def test_every_site_has_its_row_on_demand():
    plan = Plan((*layers(3),))
    assert [row.path for row in rows(plan, every=True)] == [s.path for s in plan.sites]
    assert "m.layers.1.norm " in text(plan, every=True)


@pytest.mark.parametrize(
    "other",
    [
        site("m.layers.7.norm", "m.layers.7.att.a", "m.layers.7.r"),
        site("m.layers.7.norm", gain_state="kept", reason="it is read twice"),
        site("m.layers.7.norm", "m.layers.7.att.a", "m.layers.7.att.b", "m.layers.7.r", eps=1e-5),
        site("m.layers.7.norm", "m.layers.7.att.a", "m.layers.7.att.b", "m.layers.7.r", offset=1.0),
    ],
    ids=["readers", "kept", "eps", "convention"],
)
def test_norms_that_differ_keep_their_own_row(other):
    found = rows(Plan((*layers(3), other, *layers(2, start=8))))
    assert [(r.path, r.count) for r in found] == [
        ("m.layers.{0-2,8-9}.norm", 5),
        ("m.layers.7.norm", 1),
    ]


def test_norms_kept_for_other_reasons_keep_their_own_row():
    reasons = ["it is read twice", "the model returns its output", "it is read twice"]
    sites = [site(f"m.layers.{i}.norm", gain_state="kept", reason=r) for i, r in enumerate(reasons)]
    assert [(row.path, row.reason) for row in rows(Plan((*sites,)))] == [
        ("m.layers.{0,2}.norm", reasons[0]),
        ("m.layers.1.norm", reasons[1]),
    ]


def test_reasons_that_differ_in_the_layer_are_counted_together():
    sites = [
        site(
            f"m.layers.{i}.norm",
            gain_state="kept",
            reason=f"it is added in 'm.layers.{i}' at m.py:7",
        )
        for i in (0, 1, 3)
    ]
    found = totals(Plan((*sites, site("m.norm", gain_state="none", reason="the norm has no gain"))))
    assert found.kept == (("it is added in 'm.layers.{0-1,3}' at m.py:7", 3),)
    assert found.none == (("the norm has no gain", 1),)


def test_elements_of_a_shared_gain_count_once():
    plan = Plan(
        (
            site("a", "x", weight="shared"),
            site("b", "y", weight="shared"),
            site("c", gain_state="kept", reason="why"),
            site("d", gain_state="none", reason="one already"),
        )
    )
    found = totals(plan)
    assert (found.norms, found.folded) == (4, 2)
    assert (found.folded_elements, found.elements) == (WIDTH, 2 * WIDTH)
    assert "2 of 4 norms fold (50.0%)" in text(plan)
    assert "8 of 16 gain elements become one (50.0%)" in text(plan)


def test_the_summary_says_all_that_holds_for_the_model():
    plan = Plan(
        (site("a", "x"),),
        untied=(("head.weight", "embed.weight"),),
        unreached=("expert.5.weight", "expert.6.weight"),
        notes=("something [b]odd[/b]",),
    )
    shown = text(plan)
    assert "untied: head.weight gets a copy of embed.weight of its own" in shown
    assert "recorded passes: 2 parameters, the first is expert.5.weight" in shown
    assert "note: something [b]odd[/b]" in shown


def test_no_norms():
    assert text(Plan((), notes=("nothing here",))) == (
        "no normalization was found\nnote: nothing here\n"
    )


def test_a_root_norm_has_a_name():
    assert "(the model itself)" in text(Plan((site("", "x"),)))


@pytest.mark.parametrize("width", [60, 80, 120, 200])
def test_nothing_is_cut_off(width):
    reason = "its output is also added to another value, such as the residual (at m.py:319)"
    long = site("model.layers.3.post_something_long_layer_norm", gain_state="kept", reason=reason)
    shown = text(Plan((long, *layers(12))), width=width)
    assert max(map(len, shown.splitlines())) <= width
    squeezed = "".join(shown.split())
    for word in (*reason.split(), "×12", "att:"):
        assert word in squeezed


@given(st.sets(st.integers(0, 300), min_size=1))
def test_ranges_name_each_number_once(values):
    named = []
    for part in ranges(values).split(","):
        first, _, last = part.partition("-")
        named += range(int(first), int(last or first) + 1)
    assert named == sorted(values)


@pytest.mark.parametrize(
    ("texts", "wanted"),
    [
        (["a.0.b", "a.1.b"], "a.{0-1}.b"),
        (["0.norm", "2.norm"], "{0,2}.norm"),
        (["a.1.b.7", "a.2.b.7"], "a.{1-2}.b.7"),
        (["a1.b at f.py:3"], "a1.b at f.py:3"),
        (["read by 'x.4' and 0.5"], "read by 'x.4' and 0.5"),
    ],
)
def test_only_numbers_of_paths_are_merged(texts, wanted):
    assert merged(texts) == wanted
