"""The picture of a model: which modules are one block, and which blocks are drawn once."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flashnorm.html.blocks import LONGEST_CYCLE, TOP, blocks, cycles, inside
from flashnorm.patterns import block, skeleton


@pytest.mark.parametrize(
    ("path", "where"),
    [
        ("m.layers.3.att.norm", "m.layers.3"),
        ("m.stages.1.blocks.2.norm", "m.stages.1.blocks.2"),
        ("m.stages.1.downsample.norm", "m.stages.1"),
        ("layers.0.ffn.0", "layers.0"),
        ("0.norm", "0"),
        ("m.norm", "m"),
        ("norm", ""),
        ("3", ""),
        ("", ""),
    ],
)
def test_a_block_is_the_innermost_number_that_something_follows(path, where):
    assert block(path) == where
    assert inside(path, where) == path[len(where) :].removeprefix(".")


def drawn(kinds: str):
    """The groups of a model whose layers are of these kinds, as (names, count) and repeats."""
    paths = [f"l.{at}.{kind}" for at, kind in enumerate(kinds)]
    found = blocks(paths, lambda path: path)
    made = cycles(found, lambda b: tuple(skeleton(str(item)) for item in b.items), lambda b: [])
    return [([(group.name, group.count) for group in each.groups], each.repeats) for each in made]


@pytest.mark.parametrize(
    ("kinds", "expected"),
    [
        ("aaaa", [([("l.{0-3}", 4)], 1)]),
        ("abb", [([("l.0", 1)], 1), ([("l.{1-2}", 2)], 1)]),
        ("aabaab", [([("l.{0-1,3-4}", 4), ("l.{2,5}", 2)], 2)]),
        ("abab", [([("l.{0,2}", 2), ("l.{1,3}", 2)], 2)]),
        ("abababab", [([("l.{0,2,4,6}", 4), ("l.{1,3,5,7}", 4)], 4)]),
        ("abcd", [([(f"l.{at}", 1)], 1) for at in range(4)]),
    ],
)
def test_alike_layers_are_drawn_once(kinds, expected):
    assert drawn(kinds) == expected


@given(st.text("ab", max_size=30))
def test_every_layer_is_drawn_and_counted(kinds):
    made = drawn(kinds)
    assert sum(count for groups, _ in made for _, count in groups) == len(kinds)
    assert all(len(groups) <= LONGEST_CYCLE for groups, _ in made)
    assert len(made) <= max(1, len(kinds))


def test_what_is_in_no_layer_is_at_the_top():
    found = blocks(["norm", "head"], lambda path: path)
    (cycle,) = cycles(found, lambda b: b.path, lambda b: [])
    assert [(group.name, group.count) for group in cycle.groups] == [(TOP, 1)]
