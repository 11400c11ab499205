"""Options under the names that they had: they still work for one release, and say so."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import wraps
from typing import ParamSpec, TypeVar

from flashnorm.warning import warn

Given = ParamSpec("Given")
Result = TypeVar("Result")

# The old name of an option, and the name that it has.
RENAMED = {"centre": "center", "eps": "epsilon"}


def takes_old_options(function: Callable[Given, Result]) -> Callable[Given, Result]:
    """Let a function take its options by their old names too, with a FutureWarning."""
    known = inspect.signature(function).parameters
    renamed = {old: new for old, new in RENAMED.items() if new in known}

    @wraps(function)
    def called(*args: Given.args, **options: Given.kwargs) -> Result:
        for old in renamed.keys() & options.keys():
            options[renamed[old]] = _moved(function.__name__, old, renamed[old], options)
        return function(*args, **options)

    return called


def _moved(function: str, old: str, new: str, options: dict[str, object]) -> object:
    """The value that was given under the old name, taken out of the options."""
    if new in options:
        raise TypeError(f"{function}() got {new} twice: {old} is the name that it had")
    warn(old_name(f"{old}=", f"{new}="), FutureWarning)
    return options.pop(old)


def old_name(old: str, new: str) -> str:
    """What the warning says."""
    return f"{old} is called {new} now, and the old name goes with the next release"
