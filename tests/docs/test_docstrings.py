"""Docstrings of public names say what the reference is read for."""

from __future__ import annotations

import inspect
import re

import pytest

import flashnorm

from .public import NO_ENTRY, public

# What takes tensors says their shapes and dtypes; all that is called says what it raises.
TENSORS = [name for name in public() if name.startswith(("flashnorm.functional.", "flashnorm.nn."))]
CALLED = [name for name in public() if name.count(".") == 1 and name.split(".")[1] not in NO_ENTRY]


def described(name: str) -> str:
    """The docstring of a name, with those of its methods, and of the class that it leads to."""
    room, _, last = name.removeprefix("flashnorm.").rpartition(".")
    thing = getattr(getattr(flashnorm, room) if room else flashnorm, last)
    said = [inspect.getdoc(thing) or ""]
    if inspect.isclass(thing):
        said += [inspect.getdoc(value) or "" for key, value in vars(thing).items() if key[0] != "_"]
    return " ".join("\n".join(said).split())


@pytest.mark.parametrize("name", TENSORS)
def test_what_takes_tensors_says_shapes_dtypes_and_errors(name):
    text = described(name)
    assert re.search(r"\[[^\]]*[knmhT1]\]|\[outputs, features\]|\[out_features", text), text
    assert re.search(r"dtype|float32", text), text
    if name != "flashnorm.functional.QuantizedWeight":
        assert re.search(r"[Rr]aise[sd]?\b", text), text


@pytest.mark.parametrize("name", CALLED)
def test_what_is_called_says_what_it_raises(name):
    thing = getattr(flashnorm, name.split(".")[1])
    text = described(name)
    assert text
    if inspect.isfunction(thing):
        assert re.search(r"\b[Rr]aises\b", text), text
