"""The documents of the two tasks that are shipped, made from the text in flashnorm/data.

The YAML files beside the text name these functions, so that lm_eval finds them wherever the package
is installed, without a network.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

TEXT = "founding_documents.txt"
PASSAGE = 1000  # characters, at least; but for the last
CONTEXT, NEXT = 24, 12  # words that are read, and words of each continuation
CHOICES = 4


@dataclass(frozen=True)
class Question:
    """`choices[answer]` follows `context` in the text; the others stand elsewhere in it."""

    context: str
    choices: tuple[str, ...]
    answer: int


def folder() -> Path:
    """The directory of the YAML files, for lm_eval's `include_path`."""
    return Path(str(files("flashnorm"))) / "data" / "tasks"


def text() -> str:
    """The whole text."""
    return (files("flashnorm") / "data" / TEXT).read_text("utf-8")


def passages() -> list[str]:
    """The text in order, cut between paragraphs into pieces of at least `PASSAGE` characters."""
    found, open_ = [], ""
    for paragraph in _paragraphs():
        open_ = f"{open_}\n\n{paragraph}" if open_ else paragraph
        if len(open_) >= PASSAGE:
            found.append(open_)
            open_ = ""
    return [*found, open_] if open_ else found


def questions() -> list[Question]:
    """One for every `CONTEXT + NEXT` words of a paragraph: what follows the first `CONTEXT`?

    The wrong continuations are the right ones of the questions that stand one, two and three
    quarters of all questions further on, around the end; the right one stands at each place in
    turn. Nothing is random, so every version of Python asks the same.
    """
    pairs = [pair for paragraph in _paragraphs() for pair in _pairs(paragraph.split())]
    return [_question(pairs, at) for at in range(len(pairs))]


def perplexity_documents(**_: Any) -> dict[str, Any]:
    """`passages` as lm_eval reads a dataset: {"test": rows of `text`}."""
    from datasets import Dataset

    return {"test": Dataset.from_list([{"text": passage} for passage in passages()])}


def continuation_documents(**_: Any) -> dict[str, Any]:
    """`questions` as lm_eval reads a dataset: {"test": rows of `context`, `choices`, `answer`}."""
    from datasets import Dataset

    return {"test": Dataset.from_list([asdict(question) for question in questions()])}


def _paragraphs() -> list[str]:
    return [paragraph for paragraph in text().strip().split("\n\n") if paragraph.strip()]


def _pairs(words: list[str]) -> list[tuple[str, str]]:
    """(context, continuation) of a paragraph, one after the other, without overlap."""
    step = CONTEXT + NEXT
    return [
        (" ".join(words[at : at + CONTEXT]), " ".join(words[at + CONTEXT : at + step]))
        for at in range(0, len(words) - step + 1, step)
    ]


def _question(pairs: list[tuple[str, str]], at: int) -> Question:
    context, right = pairs[at]
    apart = [len(pairs) * part // CHOICES for part in range(1, CHOICES)]
    choices = [pairs[(at + distance) % len(pairs)][1] for distance in apart]
    answer = at % CHOICES
    choices.insert(answer, right)
    return Question(context, tuple(choices), answer)
