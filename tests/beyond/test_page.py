"""The table of the zoo beyond transformers, and its place in the page."""

from tests.beyond.failures import chosen
from tests.beyond.page import section
from tests.beyond.rows import Row
from tests.zoo.page import beyond, with_beyond

FOLDED = Row(
    "some:Model", "some", "some.Model", 10, {"layer": 2}, {"folded": 1, "kept": 1},
    {"norm": "its output is also added to another value"}, 1e-16, 1e-16, 2e-7, 2e-7, 1e-7, 1e-6,
    1e-7, 3, 4, restored=True,
)  # fmt: skip


def changed(**fields) -> Row:
    return Row(**{**vars(FOLDED), **fields})


def test_the_section_is_replaced_and_the_rest_stays():
    page = "# Coverage\n\ntext\n"
    once = with_beyond(page, "\n" + section([FOLDED]))
    assert once.startswith(page)
    assert beyond(page) == ""
    assert with_beyond(once, "\n" + section([FOLDED])) == once
    assert with_beyond("# Another\n", beyond(once)) == "# Another\n" + beyond(once)
    assert "| Model | some.Model | 2 layer | 1 | 1 | 0 | 1.0e-16 | 3/4 |" in once


def test_a_row_says_what_became_of_a_class():
    assert FOLDED.state == "exact"
    assert changed(error=1e-9).state == "wrong"
    assert changed(error=1e-9, noise=1e-8).state == "noise"
    assert changed(apart=1e-5).state == "wrong"
    assert changed(apart=1e-5, shaken=1e-5).state == "exact"
    assert changed(restored=False).state == "wrong"
    assert changed(norms={}).state == "no norm"
    assert changed(error=None, category="cannot be folded").state == "error"


def test_failures_are_raised_in_models_of_many_libraries():
    keys = chosen()
    assert len(keys) >= 40
    assert len({key.partition(":")[0] for key in keys}) >= 8
    assert "torch:TransformerEncoder pre-norm" in keys
