"""What is measured, in which order, and what it may take: a run may be cut at any moment.

The seconds are of one H100, at a guess until a card has been measured; what a stage leaves is the
next one's. The order is that of what is asked for first.
"""

from __future__ import annotations

from functools import partial

from benchmarks.gpu import (
    attending,
    correctness,
    environment,
    models,
    operations,
    packed,
    scaled,
    tune,
)
from benchmarks.gpu.records import Run, Settings, Stage


def stages(settings: Settings) -> list[Stage]:
    """All that was asked for, in order."""
    first, *others = settings.models
    found = [
        Stage("ceilings", 10, "what can this card do: bytes and operations", environment.pieces),
        Stage("checks", 30, "is every kernel right, in bf16", correctness.some),
        *(
            [Stage("tune", 120, "which way and tile is fastest (`--tune` only)", tune.pieces)]
            * settings.tune
        ),
        _decode(first, 150),
        Stage(
            "few-rows", 120, "norm + linear at 1 and 16 rows, against max-autotune", operations.few
        ),
        Stage(
            f"prefill-{first}",
            25,
            "a prompt of 2048 and of 8192 tokens",
            partial(models.prefill, name=first),
        ),
        *(_decode(name, 120) for name in others),
        Stage(
            f"memory-{first}",
            16,
            "the peaks of a prefill and of a training step",
            partial(models.memory, name=first),
        ),
        Stage(
            f"parts-{first}",
            75,
            "a decoded token without each part of ours",
            partial(models.parts, name=first),
        ),
        Stage("attention", 20, "attention of one token, by heads and cache", attending.pieces),
        Stage("many-rows", 60, "norm + linear at 64 rows and more", operations.many),
        Stage(
            f"prefill-{first}-compiled",
            85,
            "the prompt of 2048 beside torch.compile",
            partial(models.compiled_prefill, name=first),
        ),
        Stage("packed", 96, "int8, int4 and FP8 weights at 1 and 16 rows", packed.pieces),
        Stage("scaled", 48, "FP8 and INT8 with the norm in the scale", scaled.pieces),
        Stage("float32", 10, "norm + linear at one row in float32", operations.single),
        Stage("all-checks", 240, "is every kernel right, in every dtype", correctness.all_of),
    ]
    asked = settings.stages
    return [stage for stage in found if not asked or stage.name.startswith(asked)]


def _decode(name: str, seconds: float) -> Stage:
    return Stage(
        f"decode-{name}",
        seconds,
        "a decoded token, in every way to run it",
        partial(models.decode, name=name),
    )


def failures(run: Run) -> int:
    """How many rows say that something of ours is wrong."""
    found = (attending, correctness, operations, models, packed, scaled)
    return sum(len(module.failures(run)) for module in found)
