"""What MkDocs runs while it builds the site: pages from outside of docs/, and the command line.

Files of the repository link to each other as they lie, so that the links work where the files are
read as they are. Here every file that a page links to becomes a part of the site: README.md is its
first page, what is outside of docs/ lies below repo/. A link to nothing stays as it is, and fails
the build.
"""

from __future__ import annotations

import posixpath
import re
import sys
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files, InclusionLevel

sys.path.insert(0, str(Path(__file__).parent))
from commands import reference

ROOT = Path(__file__).parents[2]
OUTSIDE = "repo/"
COMMANDS = "<!-- commands -->"  # in whose place the reference of the command line stands
FAR_TOO_LONG = "coverage.md"  # a table of every model; searched, it would hide everything else
LINK = re.compile(r"(?<=\]\()(?![a-z]+:|#)([^)\s#]+)")


def on_files(files: Files, config: Any) -> Files:
    """Add every file that is linked to, and those that these link to."""
    files.append(File.generated(config, "index.md", content=text_of("README.md")))
    waiting = [place for file in files if (place := repository_place(file.src_uri)).endswith(".md")]
    seen = set(waiting)
    while waiting:
        for place in linked(waiting.pop()) - seen:
            seen.add(place)
            if not place.startswith("docs/"):
                files.append(generated(place, config))
            if place.endswith(".md") or (ROOT / place).is_dir():
                waiting.append(place)
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Point links at the places that files have in the site; put the commands where they belong."""
    if page.file.src_uri == FAR_TOO_LONG:
        page.meta["search"] = {"exclude": True}
    own = repository_place(page.file.src_uri)

    def moved(link: re.Match[str]) -> str:
        place = resolved(own, link[1])
        return link[1] if place is None else relative(site_place(place), page.file.src_uri)

    markdown = LINK.sub(moved, markdown)
    return markdown.replace(COMMANDS, reference()) if COMMANDS in markdown else markdown


def generated(place: str, config: Any) -> File:
    """A file or a folder outside of docs/ as a file of the site that the navigation leaves out."""
    path, uri, kept = ROOT / place, site_place(place), InclusionLevel.NOT_IN_NAV
    if path.is_dir():
        return File.generated(config, uri, content=listing(path), inclusion=kept)
    return File.generated(config, uri, abs_src_path=str(path), inclusion=kept)


def listing(folder: Path) -> str:
    """A page with a link to every file of a folder that is text to read."""
    names = sorted(file.name for file in folder.iterdir() if file.suffix in (".md", ".png"))
    return "\n".join([f"# {folder.name}", "", *(f"- [{name}]({name})" for name in names), ""])


def linked(place: str) -> set[str]:
    """The places in the repository that a page or a listing links to."""
    path = ROOT / place
    text = listing(path) if path.is_dir() else text_of(place)
    found = (resolved(place, link) for link in LINK.findall(text))
    return {other for other in found if other is not None}


def resolved(own: str, link: str) -> str | None:
    """What a link on the page at `own` leads to, from the root of the repository; None: nothing."""
    folder = own if (ROOT / own).is_dir() else posixpath.dirname(own)
    place = posixpath.normpath(posixpath.join(folder, link))
    path = ROOT / place
    if place.startswith("..") or not path.exists():
        return None
    if path.is_dir() and (path / "README.md").exists():
        return f"{place}/README.md"
    return place


def site_place(place: str) -> str:
    """Where a file of the repository is in the site."""
    if place == "README.md":
        return "index.md"
    if place.startswith("docs/"):
        return place.removeprefix("docs/")
    return f"{OUTSIDE}{place}/index.md" if (ROOT / place).is_dir() else f"{OUTSIDE}{place}"


def repository_place(uri: str) -> str:
    """The inverse of `site_place`."""
    if uri == "index.md":
        return "README.md"
    if not uri.startswith(OUTSIDE):
        return f"docs/{uri}"
    place = uri.removeprefix(OUTSIDE)
    folder = posixpath.dirname(place)
    return folder if place.endswith("/index.md") and (ROOT / folder).is_dir() else place


def relative(uri: str, own: str) -> str:
    return posixpath.relpath(uri, posixpath.dirname(own) or ".")


def text_of(place: str) -> str:
    return (ROOT / place).read_text("utf-8")
