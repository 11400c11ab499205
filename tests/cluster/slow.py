"""Values that take their time, so that a test meets workers in the middle of a shard."""

from __future__ import annotations

import os
import time
from pathlib import Path

from flashnorm.checkpoint.values import Values

PAUSE = "FLASHNORM_TEST_PAUSE"  # seconds before each block, in workers and here
MARKS = "FLASHNORM_TEST_MARKS"  # a directory in which the process of each block is written down


class SlowValues(Values):
    """The same values."""

    def rewrite_(self, name, rows, absorbs, center):
        (Path(os.environ[MARKS]) / f"{os.getpid()}").touch()
        time.sleep(float(os.environ[PAUSE]))
        return super().rewrite_(name, rows, absorbs, center)
