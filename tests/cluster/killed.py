"""A fold on a cluster that dies in the middle: python -m tests.cluster.killed SRC DST ADDRESS."""

from __future__ import annotations

import os
import signal
import sys

from flashnorm import fold_checkpoint
from flashnorm.checkpoint import target
from tests.checkpoint.helpers import llama_plan

from .nodes import LAYERS
from .slow import SlowValues


def progress(done, total, name):
    if done > total // 3:
        os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    target.Values = SlowValues  # type: ignore[misc]
    source, place, address = sys.argv[1:]
    plan = llama_plan(LAYERS)
    options = {"engine": "ray", "ray_address": address or None}
    fold_checkpoint(source, place, plan=plan, progress=progress, **options)
