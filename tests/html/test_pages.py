"""What stands on the pages: everything of a record, escaped, and nothing that needs more."""

from __future__ import annotations

import re
from dataclasses import replace
from html.parser import HTMLParser

import pytest

from flashnorm.html.page import TEMPLATES, document, page_of
from flashnorm.plan import Plan
from flashnorm.runtime.accelerate import Acceleration

from . import records
from .records import ATTACK

KINDS = list(records.every())
VOID = {"meta", "link", "br", "img"}
ROOT = ".flashnorm-page"


class Read(HTMLParser):
    """A page as a reader sees it: its text, its tags, and whether they close in order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.open: list[str] = []
        self.words: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []
        self.text = re.sub(r"\s+", " ", " ".join(self.words))

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in VOID and not (tag in ("circle", "rect", "path") and self.closes()):
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs

    def closes(self):
        return (self.get_starttag_text() or "").endswith("/>")

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open[-1:] != ["style"]:
            self.words.append(data)


def sentences(record) -> list[str]:
    """The names and reasons that a page must have."""
    if isinstance(record, Plan):
        sites = record.sites
        reasons = [(s.reason, s.bias_reason, s.centering_reason, s.scale_reason) for s in sites]
        found = [s.path for s in sites] + [each for four in reasons for each in four]
        return [*found, *record.notes, *record.unreached, *(new for new, _ in record.untied)]
    if isinstance(record, Acceleration):
        parts = (*record.parts, *record.training)
        found = [part.path for part in parts] + [part.reason for part in parts]
        return [*found, record.kernels, record.package, record.captures]
    if hasattr(record, "checks"):
        greedy = record.greedy.texts if record.greedy else ()
        found = [record.reference, record.candidate, record.inputs, *record.notes, *greedy]
        layers = [layer.path for layer in record.layers]
        return [*found, *layers, *(check.detail for check in record.checks)]
    measured = record.measured
    failures = [f for m in measured for f in m.failures]
    return [
        *record.notes,
        *(text for f in failures for text in (f.variant, f.step, f.error)),
        *(row.variant for m in measured for row in m.rows),
        *(f"{row.timing.median * 1e3:.2f}" for m in measured for row in m.rows),
        *(engine.engine for m in measured for engine in m.engines),
        str(record.machine["cpu"]),
    ]


def said(text: str, page: Read) -> bool:
    return re.sub(r"\s+", " ", text).strip() in page.text


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["a", ATTACK, "x" * 300], ids=["plain", "attack", "long"])
def test_every_name_and_reason_is_on_the_page(kind, name):
    record = records.every(name)[kind]
    for text in (record.to_html(), record._repr_html_()):
        page = Read(text)
        assert [words for words in sentences(record) if not said(words, page)] == []


@pytest.mark.parametrize("kind", KINDS)
def test_names_are_text_and_nothing_else(kind):
    """A page about hostile names has the tags and attributes of one about harmless ones."""
    plain = Read(records.every("a")[kind].to_html())
    hostile = records.every(ATTACK)[kind]
    attacked = Read(hostile.to_html(ATTACK))
    assert attacked.tags == plain.tags
    assert [name for name, _ in attacked.attributes] == [name for name, _ in plain.attributes]
    assert {"script", "img", "iframe", "object"} & set(attacked.tags) == set()
    assert not [name for name, _ in attacked.attributes if name.startswith("on")]
    assert ATTACK in attacked.text.replace("  ", " ")
    assert "49" not in hostile.to_html(ATTACK).split("{{7*7}}")[0][-9:]
    assert "<script" not in hostile._repr_html_()


@pytest.mark.parametrize("kind", KINDS)
def test_a_page_needs_nothing_else(kind):
    page = Read(records.every()[kind].to_html())
    fetched = [v for n, v in page.attributes if n in ("src", "href", "action", "srcset", "data")]
    assert fetched == ["data:,"]
    assert page.tags.count("script") == 0
    style = (TEMPLATES / "style.css").read_text("utf-8")
    assert "url(" not in style
    assert "@import" not in style
    policy = [value for _, value in page.attributes if value and "default-src" in value]
    assert policy == ["default-src 'none'; style-src 'unsafe-inline'; img-src data:"]


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_record_makes_the_same_page(kind):
    first, second = (records.every()[kind].to_html("t") for _ in range(2))
    assert first == second


def test_styles_stay_inside_and_pages_share_a_notebook():
    """Every selector is for what is inside; no id could be there twice."""
    style = (TEMPLATES / "style.css").read_text("utf-8")
    outside = re.sub(r"@media[^{]*\{", "", style)
    selectors = [
        one for rule in re.findall(r"([^{}]+)\{[^{}]*\}", outside) for one in rule.split(",")
    ]
    assert len(selectors) > 100
    assert [one for one in selectors if not one.strip().startswith(ROOT)] == []
    for record in records.every().values():
        text = record._repr_html_()
        assert 'class="flashnorm-page"' in text
        assert not re.search(r"\sid=", text)
        assert not {"html", "head", "body", "title", "h1", "h2", "main"} & set(Read(text).tags) - {
            "title"
        }
        assert text.count("<style>") == 1


def test_a_notebook_says_what_the_page_says():
    for record in records.every().values():
        whole, part = Read(record.to_html()), Read(record._repr_html_())
        title = f"{page_of(record, '').title}: flashnorm {page_of(record, '').command}"
        assert whole.text.replace(title, "").split() == part.text.split()


def test_several_records_are_on_one_page():
    one, other = records.acceleration("m.a"), records.acceleration("m.b")
    page = Read(document([one, other], ["first", "second"]))
    assert page.tags.count("article") == 2
    assert page.tags.count("style") == 1
    assert all(said(each, page) for each in ("first", "second", "m.a.0.up", "m.b.0.up"))


# Verdicts.


@pytest.mark.parametrize(
    ("record", "verdict", "state"),
    [
        (records.plan(), "6 of 10 norms fold", "part"),
        (Plan((records.site("m.a", "m.b"),)), "1 of 1 norms fold", "good"),
        (Plan(()), "no normalization was found", "part"),
        (records.report(), "Equal: float64 error 3.0e-15, bound 1.0e-12", "good"),
        (records.failing(), "NOT equal: float64 error 2.00e-03, bound 1.00e-12", "bad"),
        (records.bench(2.0), "2.00 times as fast as eager at decoding", "good"),
        (records.bench(1.01), "As fast as eager at decoding", "part"),
        (records.bench(0.5), "Slower: 0.50 times as fast as eager", "bad"),
        (records.acceleration(), "11 of 14 modules run on kernels", "part"),
        (Acceleration((), "none", "", False), "no norm and no linear layer was found", "part"),
    ],
)
def test_the_verdict_is_said_in_words(record, verdict, state):
    page = page_of(record, "")
    assert page.verdict.startswith(verdict)
    assert page.state == state
    assert said(page.verdict, Read(record.to_html()))


def test_a_failing_check_other_than_float64_is_the_verdict():
    good = records.report()
    far = replace(good.half, candidate=records.deviation(1.0))
    page = page_of(replace(good, half=far), "")
    assert page.verdict.startswith("NOT equal: bfloat16 error 50.000 times the original's")


def test_an_interrupted_benchmark_says_so():
    page = page_of(records.bench(complete=False), "")
    assert page.lines[0] == "Interrupted: this is what was measured until then."
    assert "Interrupted" not in records.bench().to_html()


def test_a_benchmark_says_where_it_wins_and_loses():
    lines = page_of(records.bench(2.0), "").lines
    assert lines[:2] == (
        "A token takes flashnorm 4.00 ms, eager 8.00 ms (bf16).",
        "Times as fast at a prefill: 2.00 of 1 tokens, 2.00 of 16 tokens.",
    )


# Pictures.


def classes(text: str, name: str) -> list[str]:
    return re.findall(rf'class="({name}[^"]*)"', text)


def test_a_norm_has_an_arrow_to_every_reader_and_its_states_in_words():
    text = records.plan().to_html()
    row = text.split('<li class="row folded">')[1].split('<li class="row')[0]
    assert re.findall(r'class="label">([^<]*)<', row) == ["att.q", "att.k"]
    assert row.count('class="head"') == 2
    assert re.findall(r'class="sign">([^<]*)<', row) == ["g", "β", "s"] * 2
    assert "1 + 1 · m.layers.{0-2}.norm.weight" in row
    badges = re.findall(r'class="badge (\w+)">([^<]*)<', text)
    assert ("other", "bias stays as β/g") in badges
    assert ("centered", "mean not needed") in badges
    assert ("cancelled", "scale undone") in badges
    assert ("cancelled", "scale taken out") in badges


def test_states_differ_in_shape():
    text = records.plan().to_html()
    shapes = {
        state: re.search(rf'<svg class="mark {state}".*?</svg>', text, re.DOTALL)[0]
        for state in ("folded", "kept", "none")
    }
    bare = {re.sub(r'class="[^"]*"', "", shape) for shape in shapes.values()}
    assert len(bare) == 3


def test_layers_that_are_alike_are_drawn_once():
    few, many = (records.plan(count).to_html() for count in (3, 30))
    assert few.count('<li class="row') == many.count('<li class="row') == 4
    assert "×30" in many


@pytest.mark.parametrize(
    "change",
    [
        {"scale_reason": "another reason"},
        {"source": "another.py:8"},
        {"quantized": ("m.layers.1.up.weight",)},
        {"readers": ()},
        {"reason": "only this one"},
    ],
    ids=lambda change: next(iter(change)),
)
def test_a_layer_of_which_anything_differs_is_drawn_by_itself(change):
    """What is said of layers that are drawn once holds for each of them."""
    plan = records.plan(3)
    sites = list(plan.sites)
    place = next(at for at, site in enumerate(sites) if site.path == "m.layers.1.post")
    sites[place] = replace(sites[place], **change)
    cycles = page_of(replace(plan, sites=tuple(sites)), "").view["cycles"]
    names = [group.name for cycle in cycles for group in cycle.groups]
    assert names == ["m.layers.0", "m.layers.1", "m.layers.2", "m"]


def test_a_layer_that_alone_loses_its_scale_is_drawn_by_itself():
    plan = records.plan(3)
    cycles = page_of(replace(plan, cancellings=plan.cancellings[:1]), "").view["cycles"]
    names = [group.name for cycle in cycles for group in cycle.groups]
    assert names == ["m.layers.0", "m.layers.{1-2}", "m"]


def test_the_first_wrong_module_is_shown():
    record = records.failing()
    page = page_of(record, "")
    assert page.lines[0] == "The first module that differs is m.1.a: 4.0e-04."
    (first,) = [m for m in page.view["layers"]["modules"] if m["first"]]
    assert first["path"] == "m.1.a"
    wrong = [m["wrong"] for m in page.view["layers"]["modules"]]
    assert wrong == [False, True, True, True, True]  # what is no number is not within a bound
    heights = [m["height"] for m in page.view["layers"]["modules"]]
    assert heights[0] == 0
    assert heights[2] == heights[3] == 120
    assert 0 < heights[1] < heights[4] < 120
    text = record.to_html()
    assert text.count('<rect class="wrong"') == 4
    assert re.search(r'<tr class="wrong first"><th scope="row">m\.1\.a<', text)


def test_errors_stand_on_a_scale_with_their_bounds():
    figures = page_of(records.report(), "").view["figures"]
    assert [each["ok"] for each in figures["bounded"]] == [True, True]
    assert all(0 < each["at"] < each["bound"] < 100 for each in figures["bounded"])
    figures = page_of(records.failing(), "").view["figures"]
    assert figures["bounded"][0]["at"] > figures["bounded"][0]["bound"]


def test_bars_are_as_long_as_their_figures():
    view = page_of(records.bench(2.0), "").view["measured"][0]
    for picture in (*view["decode"], *view["prefill"]):
        slow, fast = picture.bars
        assert slow.width == pytest.approx(2 * fast.width, rel=1e-3)
        assert slow.low < slow.width < slow.high == 97.0
        assert fast.more == "2.00×"
    memory = view["memory"][0]
    assert [bar.words for bar in memory.bars] == ["1,000.0", "800.0"]
    assert memory.bars[1].width == pytest.approx(0.8 * memory.bars[0].width, rel=1e-3)
    assert [len(each.bars) for each in view["memory"]] == [2, 1, 1, 1]


def test_own_code_is_drawn_with_its_reason():
    text = records.acceleration().to_html()
    row = text.split('<li class="row own">')[1].split("</li>")[0]
    assert "it is called with three arguments in m.layers.{0-2}" in re.sub(r"\s+", " ", row)
    assert "own code" in row


def test_an_acceleration_survives_json():
    found = records.acceleration()
    assert Acceleration.from_json(found.to_json()) == found


# Colours.


def luminance(colour: str) -> float:
    pairs = [colour[at : at + 2] for at in (1, 3, 5)]
    if len(colour) == 4:
        pairs = [each * 2 for each in colour[1:]]
    parts = [int(pair, 16) / 255 for pair in pairs]
    parts = [c / 12.92 if c <= 0.03928 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
    return 0.2126 * parts[0] + 0.7152 * parts[1] + 0.0722 * parts[2]


TEXTS = [("ink", "card"), ("ink", "back"), ("ink", "track"), ("ink", "none-back")]
TEXTS += [("soft", "card"), ("soft", "back"), ("soft", "folded-back")]
TEXTS += [("ink", "bad-back"), ("bad", "bad-back"), ("none", "card"), ("bad", "card")]
TEXTS += [
    (name, on)
    for name in ("folded", "kept", "cancelled", "centered")
    for on in ("card", f"{name}-back")
]


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize(("text", "back"), TEXTS)
def test_text_stands_out(scheme, text, back):
    """The contrast that WCAG 2 AA asks for: 4.5."""
    style = (TEMPLATES / "style.css").read_text("utf-8")
    light, _, dark = style.partition("prefers-color-scheme:dark")
    found = dict(re.findall(r"--([\w-]+):(#\w+)", light if scheme == "light" else dark))
    one, other = sorted((luminance(found[text]), luminance(found[back])))
    assert (other + 0.05) / (one + 0.05) >= 4.5


# Sizes.


def test_a_large_model_makes_a_page_of_reasonable_size():
    """61 layers of four norms, as long in their names as those of a model of 671B parameters."""
    long = "model.layers.{}.self_attention_with_a_name"
    sites = []
    for at in range(61):
        where = long.format(at)
        readers = [f"{where}.experts.shared_reader_{each}" for each in range(4)]
        why = {
            "scale": "kept",
            "scale_reason": f"it is also read by cat in '{where}' at cache.py:1",
        }
        sites += [records.site(f"{where}.norm_number_{each}", *readers, **why) for each in range(4)]
    assert 50_000 < len(Plan(tuple(sites)).to_html()) < 300_000
