"""The documentation site: it builds without a warning, and needs nothing from elsewhere."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest

from flashnorm.cli import app

from .pages import DOCS, ROOT
from .public import NO_ENTRY, public

pytest.importorskip("mkdocs", reason="the site is built by it: the extra docs")
pytest.importorskip("material", reason="the theme of the site: the extra docs")
pytest.importorskip("mkdocstrings", reason="the reference is made by it: the extra docs")

# By the tag: the attribute of what a browser loads by itself.
LOADED = {
    "script": "src",
    "link": "href",
    "img": "src",
    "iframe": "src",
    "source": "src",
    "video": "src",
    "object": "data",
    "use": "href",
}
BACKENDS = ("Backend", "Bound", "Policy", "CompiledPolicy", "Limits", "Attention", "Experts")


class Page(HTMLParser):
    """What a browser loads for a page, where its links lead, and the places that links may name."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.loaded: list[str] = []
        self.links: list[str] = []
        self.places: set[str] = set()
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = {name: value or "" for name, value in attrs}
        self.places.add(given.get("id", ""))
        if tag in LOADED and given.get("rel") != "canonical":
            self.loaded.append(given.get(LOADED[tag], ""))
        if tag == "a":
            self.links.append(given.get("href", ""))


def build(root: Path, out: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "-d", str(out)]
    return subprocess.run(
        command,
        cwd=root,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=300,
    )


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    out = tmp_path_factory.mktemp("site")
    done = build(ROOT, out)
    assert done.returncode == 0, done.stderr
    assert "WARNING" not in done.stderr + done.stdout
    return out


@pytest.fixture(scope="module")
def pages(site):
    return {file: Page(file.read_text("utf-8")) for file in site.rglob("*.html")}


def test_it_builds_without_a_warning(site):
    assert (site / "index.html").is_file()


def test_every_page_is_in_the_navigation(site, pages):
    """From any page, by the navigation; MkDocs itself fails where a page is missing in it."""
    linked = set(pages[site / "index.html"].links)
    of_docs = [page.relative_to(DOCS).with_suffix(".html") for page in DOCS.rglob("*.md")]
    assert len(of_docs) > 20
    assert {str(page) for page in of_docs} <= linked


def test_nothing_is_loaded_from_elsewhere(site, pages):
    assert len(pages) > 60
    loaded = {place for page in pages.values() for place in page.loaded}
    assert any(place.endswith(".js") for place in loaded)
    assert {place for place in loaded if re.match(r"(?:[a-z]+:)?//", place)} == set()
    styles = "".join(file.read_text("utf-8") for file in site.rglob("*.css"))
    assert re.findall(r"(?:@import|url\()\s*['\"]?(?:https?:)?//", styles) == []


def test_links_of_built_pages_lead_to_files(site, pages):
    """Those too that no Markdown has: what the theme and the reference made."""
    for file, page in pages.items():
        for link in page.links if file.name != "404.html" else []:  # whose links begin at a server
            place, _, _ = link.partition("#")
            if place and not re.match(r"[a-z]+:", place):
                path = (file.parent / place).resolve()
                assert path.is_file() or (path / "index.html").is_file(), f"{file}: {link}"


def entries(pages) -> set[str]:
    """The names that have an entry in the reference."""
    return {
        place
        for file, page in pages.items()
        for place in page.places
        if file.parent.name == "reference" and place.startswith("flashnorm.")
    }


def test_every_public_name_has_an_entry(pages):
    wanted = {name for name in public() if name.removeprefix("flashnorm.") not in NO_ENTRY}
    assert len(wanted) > 50
    assert wanted - entries(pages) == set()
    wanted = {f"flashnorm.kernels.backend.{name}" for name in BACKENDS}
    assert wanted - entries(pages) == set()


def test_every_command_and_option_has_an_entry(site):
    from typer.main import get_command

    text = (site / "reference" / "commands.html").read_text("utf-8")
    commands = get_command(app).commands
    assert len(commands) >= 9
    for name, command in commands.items():
        _, _, section = text.partition(f'<h2 id="flashnorm-{name}">')
        section = section.partition("<h2")[0]
        assert section, name
        options = [o for p in command.params if not getattr(p, "hidden", False) for o in p.opts]
        for option in options:
            assert (option if option.startswith("-") else "") in section, f"{name} {option}"
    for code in (0, 1, 2, 130, 141):
        assert f"<td>{code}</td>" in text


@pytest.fixture
def copied(tmp_path):
    """The documentation in a folder of its own, to be broken."""
    for name in ("docs", "benchmarks", "examples"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("mkdocs.yml", "README.md", "LICENSE", "CHANGELOG.md", "CONTRIBUTING.md"):
        shutil.copy(ROOT / name, tmp_path)
    (tmp_path / "flashnorm").symlink_to(ROOT / "flashnorm")
    return tmp_path


BROKEN = {
    "docs/fold.md": "[a](nowhere.md), [a](start.md#lost), [a](../benchmarks/gone.md)",
    "docs/new.md": "# A page that the navigation does not have",
}


def break_(root: Path, page: str, text: str) -> None:
    file = root / page
    before = file.read_text("utf-8") if file.exists() else ""
    file.write_text(f"{before}\n\n{text}\n", "utf-8")


def test_broken_links_and_a_page_without_a_place_fail_the_build(copied):
    for page, text in BROKEN.items():
        break_(copied, page, text)
    done = build(copied, copied / "out")
    assert done.returncode != 0
    assert all(word in done.stderr for word in ("nowhere.md", "#lost", "gone.md", "new.md"))


def test_a_name_that_is_gone_fails_the_build(copied):
    break_(copied, "docs/reference/nn.md", "::: flashnorm.nn.Nowhere")
    done = build(copied, copied / "out")
    assert done.returncode != 0
    assert "flashnorm.nn.Nowhere" in done.stderr
