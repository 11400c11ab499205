"""The pages in a real browser: they are drawn, fit a phone, say nothing and ask for nothing."""

from __future__ import annotations

from pathlib import Path

import pytest

from flashnorm.plan import Plan

from . import records
from .browser import Browser, find, rows_that_differ
from .records import ATTACK

PROGRAM = find()
pytestmark = pytest.mark.skipif(
    PROGRAM is None,
    reason="no chromium or google-chrome on the PATH, and FLASHNORM_BROWSER names none",
)
PHONE, DESK = 390, 1100
LONG = "a_name_that_is_very_long_" * 8
BACKGROUND = "getComputedStyle(document.querySelector('.flashnorm-page')).backgroundColor"
WIDTH = "document.documentElement.scrollWidth"


@pytest.fixture(scope="module")
def browser():
    assert PROGRAM is not None
    opened = Browser(PROGRAM)
    yield opened
    opened.close()


@pytest.fixture
def page(tmp_path):
    def save(text: str) -> Path:
        file = tmp_path / "page.html"
        file.write_text(text, "utf-8")
        return file

    return save


@pytest.mark.parametrize("kind", list(records.every()))
@pytest.mark.parametrize("width", [PHONE, DESK])
def test_a_page_is_drawn_light_and_dark(browser, page, kind, width):
    file = page(records.every()[kind].to_html("some name"))
    backgrounds = []
    for dark in (False, True):
        browser.open(file, dark=dark, width=width)
        assert browser.console == []
        assert browser.requests == [file.as_uri()]
        assert rows_that_differ(browser.screenshot()) > 150
        assert browser.value(WIDTH) <= width
        backgrounds.append(browser.value(BACKGROUND))
    assert backgrounds == ["rgb(246, 247, 249)", "rgb(13, 17, 23)"]


@pytest.mark.parametrize("name", [ATTACK, LONG], ids=["attack", "long"])
@pytest.mark.parametrize("kind", list(records.every()))
def test_hostile_and_long_names_are_only_text(browser, page, kind, name):
    file = page(records.every(name)[kind].to_html(name))
    for width in (PHONE, DESK):
        browser.open(file, width=width)
        browser.value("for (const each of document.querySelectorAll('details')) each.open = true")
        assert browser.console == []
        assert browser.requests == [file.as_uri()]
        assert browser.value(WIDTH) <= width
        assert name in browser.value("document.title + document.body.innerText")


def test_reasons_come_when_they_are_pointed_at_or_focused(browser, page):
    browser.open(page(records.plan().to_html()))
    seen = (
        "[...document.querySelectorAll('.tip')].filter(e => e.offsetHeight).map(e => e.innerText)"
    )
    assert browser.value(seen) == []
    browser.hover(".row .chip.tipped")
    (tip,) = browser.value(seen)
    assert "goes into it along axis 1" in tip
    browser.value("document.querySelector('.row.kept .name').focus()")
    assert any("reads it twice" in tip for tip in browser.value(seen))


def test_a_tip_fits_a_phone(browser, page):
    browser.open(page(records.plan(prefix=LONG).to_html()), width=PHONE, height=700)
    for selector in (".row.kept .name", ".row .chip.tipped"):
        box = browser.value(
            f"(() => {{const e = document.querySelector({selector!r}); e.focus();"
            "const r = e.querySelector('.tip').getBoundingClientRect();"
            "return [r.left, r.right, r.top, r.bottom]})()"
        )
        assert 0 <= box[0] < box[1] <= PHONE
        assert 0 <= box[2] < box[3] <= 700


@pytest.mark.parametrize("width", [PHONE, DESK])
def test_every_arrow_ends_at_its_reader(browser, page, width):
    browser.open(page(records.plan().to_html()), width=width)
    places = browser.value(
        "[...document.querySelectorAll('.row')].map(row => ['.head', '.chip'].map(name =>"
        "[...row.querySelectorAll(name)].map(e => e.getBoundingClientRect()).map("
        "r => (r.top + r.bottom) / 2)))"
    )
    assert max(len(arrows) for arrows, _ in places) == 2
    for arrows, readers in places:
        assert arrows == pytest.approx(readers, abs=2)


def test_fragments_change_nothing_of_the_page_that_holds_them(browser, page):
    """A notebook: two of them, beside elements that look as they did without."""
    around = (
        "<h1>t</h1><p class='card name'>p</p><table><tr><td>x</td></tr></table><details></details>"
    )
    look = (
        "[...document.querySelectorAll('body > h1, body > p, body > table td, body > details')]"
        ".map(e => {const s = getComputedStyle(e); return [s.font, s.color, s.margin, s.padding,"
        " s.backgroundColor, s.border, s.textAlign].join()})"
    )
    browser.open(page(f"<!DOCTYPE html><body>{around}"))
    before = browser.value(look)
    both = "".join(record._repr_html_() for record in (records.plan(), records.failing()))
    browser.open(page(f"<!DOCTYPE html><body>{around}{both}"))
    assert browser.value(look) == before
    assert browser.value("document.querySelectorAll('.flashnorm-page').length") == 2
    assert browser.console == []


def test_a_blank_page_a_message_and_a_request_would_be_seen(browser, page):
    """What the tests above hold pages to can fail."""
    browser.open(page("<!DOCTYPE html>"))
    assert rows_that_differ(browser.screenshot()) <= 2
    bad = "<script>console.log('said'); none()</script><img src='http://127.0.0.1:9/x.png'>"
    browser.open(page(f"<!DOCTYPE html>{bad}<p style='width:2000px'>wide"), width=DESK)
    assert "['said']" in browser.console
    assert "Uncaught" in browser.console
    assert "http://127.0.0.1:9/x.png" in browser.requests
    assert browser.value(WIDTH) > DESK


def test_a_script_that_came_through_would_not_run(browser, page):
    """The page forbids it to itself, should a name ever be written unescaped."""
    text = Plan(()).to_html().replace("</body>", "<script>document.title = 'ran'</script></body>")
    browser.open(page(text))
    assert browser.value("document.title") != "ran"
    assert any("Content Security Policy" in line for line in browser.console)
