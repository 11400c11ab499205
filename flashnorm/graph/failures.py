"""How a rule fails: on purpose, with a reason for the plan, or by a bug of ours.

Where a bug shows, the plan keeps what the rule was asked about, because nothing is known of it. The
tests set FLASHNORM_RAISE_BUGS=1, with which it is raised, so that no rule is wrong in silence.
"""

from __future__ import annotations

import os

RAISE_BUGS = "FLASHNORM_RAISE_BUGS"


class Blocked(Exception):
    """A gain cannot pass an operation; the text says why, in plain words."""


class UnknownSpelling(Blocked):
    """What an operation does cannot be told from the way it is written; the text says of what."""


def bug(error: Exception) -> str:
    """What a plan says of an error that no rule raises on purpose; raises it under the switch."""
    if os.environ.get(RAISE_BUGS) == "1":
        raise error
    return f"{type(error).__name__}: {error}"
