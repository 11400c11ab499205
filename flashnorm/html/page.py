"""A page: its shell, its style, and the one place where text becomes HTML.

Names of modules come from checkpoints that anybody wrote. Every value is escaped by the templates'
engine, no template marks one as safe, and the page forbids scripts and requests to itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

import flashnorm
from flashnorm.paged import Paged

TEMPLATES = Path(__file__).parent / "templates"


@dataclass(frozen=True)
class Page:
    """What stands on a page: a verdict in words, and what `template` shows of `view`.

    `state` is "good", "part" (some of it) or "bad". `lines` explain the verdict, one sentence each.
    """

    command: str
    title: str
    verdict: str
    state: str
    lines: tuple[str, ...]
    template: str
    view: dict[str, Any]


def document(records: Sequence[Paged], titles: Sequence[str]) -> str:
    """A whole page with the records one below the other. A title that is empty is the record's."""
    pages = [page_of(record, title) for record, title in zip(records, titles, strict=True)]
    return _render("document.jinja", pages=pages, whole=True)


def fragment(record: Paged) -> str:
    """The same for a place inside of another page; every style is for what is inside of it."""
    return _render("fragment.jinja", page=page_of(record, ""), whole=False)


def page_of(record: Paged, title: str) -> Page:
    """What is shown of a record."""
    page: Page = import_module(record.page_module).page(record, title)
    return page


def _render(template: str, **values: Any) -> str:
    style = Markup((TEMPLATES / "style.css").read_text("utf-8"))  # ours, and nothing of a model's
    return (
        _environment()
        .get_template(template)
        .render(style=style, version=flashnorm.__version__, **values)
    )


@cache
def _environment() -> Environment:
    return Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
