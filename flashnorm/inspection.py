"""`inspect`: the plan of anything that names a model."""

from __future__ import annotations

from typing import Any

from torch import nn

from flashnorm.checkpoint.inspection import inspect_stored
from flashnorm.deprecated import takes_old_options
from flashnorm.plan import Plan
from flashnorm.planner import inspect_module


@takes_old_options
def inspect(
    model: Any, example_inputs: Any = None, *, untie: bool = False, center: bool = False
) -> Plan:
    """The plan of a model: every norm, whether its gain folds, into what, and if not why.

    `model` is a live `torch.nn.Module`, a local directory, a bare config.json, a GGUF file or a hub
    id. Of a path only the config is read, and the gains themselves where the weights are at hand:
    parameters stay fake, so a model of any size takes seconds. `example_inputs`, a dict or tuple
    for the model's forward, or a list of several of them, is needed for modules that are not from
    transformers; all are recorded, and what any of them reads counts. `untie` plans a
    copy of a tied head's weight, so that the final gain folds as well; `center` plans to center
    what LayerNorms read, so that they need no mean (E3).

    Raises TraceError where the model cannot be recorded, FlashNormError where a path does not
    exist, CheckpointError where it holds no model that can be read.
    Source: FlashNorm, arXiv 2407.09577.
    """
    if isinstance(model, nn.Module):
        return inspect_module(model, example_inputs, untie=untie, center=center)
    return inspect_stored(model, example_inputs, untie=untie, center=center)
