"""The page of `flashnorm run`: what became of the models, above a page for each."""

from __future__ import annotations

from flashnorm.engines.run import Ran
from flashnorm.html.page import Page
from flashnorm.paged import Paged
from flashnorm.runtime.accelerate import Acceleration


def page(ran: Ran, title: str) -> Page:
    """The same lines as on stderr."""
    done, count = len(ran.accelerations), len(ran.models)
    return Page(
        "run",
        title or " ".join(ran.command),
        f"{done} of {count} models were accelerated" if count else "no model was loaded",
        "good" if count and done == count else "part",
        tuple(line.removeprefix("flashnorm: ") for line in str(ran).splitlines()),
        "lines.jinja",
        {},
    )


def records(ran: Ran) -> tuple[list[Paged], list[str]]:
    """The run itself and every accelerated model, and their titles."""
    models = [model for model in ran.models if not model["problem"]]
    found = [Acceleration.from_json(data) for data in ran.accelerations]
    return [ran, *found], ["", *(model["source"] or model["model"] for model in models)]
