"""A fresh process that loads one variant, decodes and prefills: what it needs of memory.

    python -m flashnorm.bench.child '{"source": ..., "dtype": ..., "variant": ..., ...}'

Prints one line of JSON, in bytes.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import torch

from flashnorm.bench.memory import forget_peak, peak_resident, resident
from flashnorm.bench.models import accelerate, open_model, package_length, token_ids
from flashnorm.bench.records import OURS, OURS_COMPILED, PACKAGED
from flashnorm.bench.variants import Variant


def measure(request: dict[str, Any]) -> dict[str, int]:
    """Peak of loading and decoding, what is resident then, and the growth over one prefill."""
    torch.set_num_threads(request["threads"])
    name, context = request["variant"], request["context"]
    model = open_model(request["source"], request["dtype"], request["packed"])
    ids = token_ids(request["source"], model, max(context, request["prefill"]))
    if name in (OURS, OURS_COMPILED, PACKAGED):
        accelerate(model, package_length(context + request["tokens"]) if name == PACKAGED else 0)
    variant = Variant(name, model, compiled=False)
    with torch.no_grad():
        variant.generate(ids[:context], request["tokens"])
        kept = resident()  # before the peak is asked for, which may grow by that
        found = {"peak_rss": peak_resident(), "resident": kept}
        forget_peak()
        before = resident()
        variant.prefill(ids[: request["prefill"]])
    return {**found, "prefill_rss": max(0, peak_resident() - before)}


if __name__ == "__main__":
    print(json.dumps(measure(json.loads(sys.argv[1]))))
