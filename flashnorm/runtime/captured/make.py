"""`capture_`: the decode steps of an accelerated model are captured, and replayed by `generate`."""

from __future__ import annotations

import sys
from dataclasses import replace
from typing import TypeVar

from torch import Tensor, nn

from flashnorm.errors import FlashNormError
from flashnorm.kernels import dispatch
from flashnorm.kernels.backend import Backend
from flashnorm.runtime.accelerate import RECORD
from flashnorm.runtime.captured.forward import Captured, Uncompiled
from flashnorm.runtime.growing import Growing

Model = TypeVar("Model", bound=nn.Module)
CALLED = "get_compiled_call"  # what `generate` asks for where a cache is static


def capture_(model: Model, *, graphs: int = 4) -> Model:
    """Let an accelerated model decode on static caches by replaying a graph, in place.

        logits, cache = graph(token, positions, mask, cache)

    A step of one new token per sequence, on a `StaticCache` that has been filled, is run once as it
    is, captured as one CUDA graph by the second call like it, and replayed from then on: launches
    take no Python, no norm is a kernel of its own, and products are added to their residual in one.
    `generate(cache_implementation="static")` needs no other argument, and does not compile unless
    it is given a `CompileConfig`. There is a graph for each cache, batch and form of the arguments;
    `graphs` are kept, those used last, and each holds the memory that a step takes. Those of a
    cache that is gone are freed.

    Weights may be changed in place: a graph reads them where they lie. Everything else that could
    make it another step (weights that are replaced, hooks, adapters, a changed module, class or
    config, training, gradients, modes, tracing, inference mode) is noticed before each step, and
    the model's own code runs; so it does for a prefill, another cache, a full one, and for steps
    that cannot be captured because they wait for the device, or the host counts for them.
    `flashnorm.kernels.dispatch.fallbacks()` counts the reasons. The logits of a step are a copy:
    the graph writes its own again.

    `restore_` takes it away. Copies of the model capture for themselves. Raises FlashNormError
    where the model was not accelerated, is captured already or has a package, where its devices
    capture nothing (a CPU), or where it is no decoder of transformers.
    """
    undo = vars(model).get(RECORD)
    if undo is None:
        raise FlashNormError("this model was not accelerated: call accelerate_ before capture_")
    if graphs < 1:
        raise FlashNormError(f"one graph or more have to be kept, not {graphs}")
    backend = _backend(model)
    below = vars(model).get("forward")
    if type(below) is Captured:
        raise FlashNormError("the steps of this model are captured already")
    if below is not None and type(below) is not Growing:
        raise FlashNormError(
            "the model's forward is another one than its own (a package, or a wrapper), so that "
            "its steps cannot be captured"
        )
    forward = Captured(model, backend, below, undo.alone, graphs)
    undo.forwards.insert(0, (model, forward))
    undo.held.append((CALLED, Uncompiled(model)))
    undo.acceleration = replace(
        undo.acceleration, captures=f"on static caches, by replaying up to {graphs} graphs"
    )
    vars(model)["forward"] = forward
    vars(model)[CALLED] = undo.held[-1][1]
    return model


def _backend(model: nn.Module) -> Backend:
    """What captures the steps of a model. Raises FlashNormError where nothing does."""
    transformers = sys.modules.get("transformers")
    if not transformers or not isinstance(model, transformers.PreTrainedModel):
        raise FlashNormError("only the steps of models from transformers can be captured")
    if model.config.is_encoder_decoder or not model.can_generate():
        raise FlashNormError("only models that continue text have steps to capture: decoders")
    held: list[Tensor] = [*model.parameters(), *model.buffers()]
    backend = dispatch.backend_of(*held)
    if isinstance(backend.captures, str):
        raise FlashNormError(f"no step can be captured: {backend.captures}")
    if len(devices := {str(t.device) for t in held}) != 1:
        raise FlashNormError(f"the model is on several devices: {', '.join(sorted(devices))}")
    return backend
