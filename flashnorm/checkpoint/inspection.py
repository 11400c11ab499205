"""The plan of a model by its name: the forward that its config builds, and its gains as stored."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from flashnorm.checkpoint.origin import PathName, open_origin
from flashnorm.checkpoint.source import Source
from flashnorm.graph.ambient import on_cpu
from flashnorm.plan import Plan
from flashnorm.planner import plan_model
from flashnorm.settled import asked_values, with_values, without_folds

QUANTIZED = (
    "its readers are quantized ({}): a gain per input channel does not fit their scales; fold "
    "before quantizing. Deferral, which needs no fold, still applies"
)


@on_cpu()
def inspect_stored(
    source: PathName,
    example_inputs: Any = None,
    *,
    untie: bool = False,
    center: bool = False,
    stored: Source | None = None,
) -> Plan:
    """The plan of what `source` names: a directory, a config.json, a GGUF file or a hub id.

    `stored` are the weights where they were opened already; they may lie elsewhere.
    """
    origin = open_origin(source, stored)
    plan = plan_model(
        origin.fake_model(), example_inputs, untie=untie, center=center, allow_real=False
    )
    plan = replace(plan, notes=(*origin.notes, *plan.notes))
    if origin.quantized:
        return without_folds(plan, QUANTIZED.format(origin.quantized))
    said = origin.ahead(asked_values(plan))
    return with_values(replace(plan, notes=(*said, *plan.notes)), origin.gain)
