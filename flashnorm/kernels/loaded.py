"""Which kernels have run before: in a capture nothing can be compiled, and no code be loaded."""

from __future__ import annotations

import logging
from collections.abc import Callable, Hashable

from flashnorm.errors import FlashNormError

_log = logging.getLogger("flashnorm")


class Loaded:
    """Kinds of calls whose kernels were run once, and those of which that failed."""

    def __init__(self) -> None:
        self._kinds: set[Hashable] = set()
        self._failed: set[Hashable] = set()

    def __contains__(self, kind: Hashable) -> bool:
        return kind in self._kinds

    def knows(self, kind: Hashable) -> bool:
        """Whether a kernel of this kind was tried."""
        return kind in self._kinds or kind in self._failed

    def load(self, kind: Hashable, run: Callable[[], object]) -> None:
        """Run a kernel for nothing else than that, unless it was tried before.

        The caller has code of its own for this call: where the kernel fails (no compiler, no
        memory) that is said, and later captures of the kind run that code too.
        """
        if self.knows(kind):
            return
        try:
            run()
        except FlashNormError:  # somebody forbids what came next
            raise
        except Exception as error:
            self._failed.add(kind)
            first = (str(error).splitlines() or [""])[0]
            _log.warning("a kernel cannot be loaded: %s: %s", type(error).__name__, first)
        else:
            self._kinds.add(kind)
