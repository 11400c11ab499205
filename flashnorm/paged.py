"""What can be looked at in a browser and in a notebook: the door to the room of pages."""

from __future__ import annotations

from importlib import import_module
from typing import Any


class Paged:
    """A record with a page: `class Plan(Paged, pages="flashnorm.html.inspected")` names its maker.

    Pages come after everything that they show, so that their module is loaded by its name, and only
    when one is asked for.
    """

    def __init_subclass__(cls, *, pages: str = "", **options: Any) -> None:
        super().__init_subclass__(**options)
        if pages:
            cls.page_module = pages

    page_module: str = ""

    def to_html(self, title: str = "") -> str:
        """One HTML page that needs nothing else: no script, no network, light and dark.

        title: the name that is shown above it; the record's own if left. The same record gives the
        same text, whenever and wherever it is asked.
        """
        return str(import_module("flashnorm.html.page").document([self], [title]))

    def _repr_html_(self) -> str:
        """The same for notebooks, as a fragment whose styles stay inside of it."""
        return str(import_module("flashnorm.html.page").fragment(self))
