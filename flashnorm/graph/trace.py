"""Tracing: run a model once under the recorder, on fake tensors where that works.

A fake forward needs no memory and no weights. Where the model asks a fake tensor for its value, the
same inputs are run for real. Models with a cache are traced over a prefill and one decode step.
The model is left exactly as it was found.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from itertools import count, islice
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from flashnorm.errors import TraceError
from flashnorm.graph.nouns import Graph
from flashnorm.graph.record import Recorder

Inputs = Mapping[str, Any] | Sequence[Any]
# Official setters of transformers models, and the implementation that hides nothing.
PLAIN_IMPLEMENTATIONS = {
    "set_attn_implementation": "eager",
    "set_experts_implementation": "batched_mm",
}
DecodeStep = Callable[[Inputs, Any], Iterable[Mapping[str, Any]]]


def trace(
    model: nn.Module,
    candidates: Iterable[Inputs],
    decode: DecodeStep | None = None,
    *,
    allow_real: bool = True,
) -> Graph:
    """Record the first of `candidates` that the model accepts, and a decode step after it.

    `decode(inputs, output)` yields inputs for one more step with the output's cache, best first.
    Raises TraceError, with the last failure, when no candidate runs.
    """
    if isinstance(candidates, Iterator):
        candidates = list(candidates)
    failure: Exception | None = None
    for fake in (True, False) if allow_real else (True,):
        for inputs in candidates:
            try:
                return _trace_with_decode(model, inputs, decode, fake)
            except Exception as error:
                failure = error
    raise TraceError(_explain(model, failure)) from failure


def _explain(model: nn.Module, failure: Exception | None) -> str:
    cause = "no inputs for its forward are known"
    if failure is not None:
        cause = f"{type(failure).__name__}: {_first_line(failure)}"
    return (
        f"{type(model).__name__} could not be recorded ({cause}); pass example_inputs= that its "
        "forward accepts, or a live model instead of a config"
    )


class _StepFailed(Exception):
    """A decode step did not run; its half-written cache makes the recording useless."""


class _NoMoreSteps(Exception):
    """Every way of taking one more step has failed."""


def _trace_with_decode(
    model: nn.Module, inputs: Inputs, decode: DecodeStep | None, fake: bool
) -> Graph:
    """Record a forward and the first decode step that runs, each try from the beginning."""
    failure: _StepFailed | None = None
    try:
        for number in count():
            try:
                return _trace_once(model, inputs, decode, number, fake)
            except _StepFailed as error:
                failure = error
    except _NoMoreSteps:
        graph = _trace_once(model, inputs, None, 0, fake)
    graph.notes.append(f"the cached decode step was not recorded: {failure}")
    return graph


def _trace_once(
    model: nn.Module, inputs: Inputs, decode: DecodeStep | None, number: int, fake: bool
) -> Graph:
    recorder = Recorder({id(module): path for path, module in model.named_modules()})
    with _prepared(model), ExitStack() as stack:
        mode = _fake_mode(model) if fake else None
        stack.enter_context(torch.no_grad())
        if mode is not None:
            stack.enter_context(mode)
        _declare_parameters(model, recorder, mode)
        inputs = _declare_inputs(inputs, recorder, mode, _device(model))
        stack.enter_context(recorder.watching_modules())
        stack.enter_context(recorder)
        output = _call(model, inputs)
        state: frozenset[int] = frozenset()
        if decode is not None:
            state = _trace_step(model, decode(inputs, output), number, recorder)
        _mark_outputs(output, recorder, state)
    return recorder.graph


def _trace_step(
    model: nn.Module, steps: Iterable[Mapping[str, Any]], number: int, recorder: Recorder
) -> frozenset[int]:
    """Record one more step. Returns the ids of what it took back: state of the model itself."""
    step = next(islice(steps, number, None), None)
    if step is None:
        if number:
            raise _NoMoreSteps
        return frozenset()
    try:
        output = _call(model, step)
    except Exception as error:
        raise _StepFailed(_first_line(error)) from error
    state = frozenset(id(item) for item in step.values())
    _mark_outputs(output, recorder, state)
    return state


def _first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def _call(model: nn.Module, inputs: Inputs) -> Any:
    return model(**inputs) if isinstance(inputs, Mapping) else model(*inputs)


def _device(model: nn.Module) -> torch.device:
    return next((p.device for p in model.parameters()), torch.device("cpu"))


def _fake_mode(model: nn.Module) -> FakeTensorMode:
    """The mode that the model's tensors belong to already, or a new one."""
    for tensor in model.parameters():
        if isinstance(tensor, FakeTensor):
            return tensor.fake_mode
    return FakeTensorMode(allow_non_fake_inputs=True)


def _declare_parameters(model: nn.Module, recorder: Recorder, mode: FakeTensorMode | None) -> None:
    """Enter every parameter into the graph; put fakes (or copies of buffers) into the model."""
    graph = recorder.graph
    first: dict[int, str] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        known = first.setdefault(id(parameter), name)
        if known != name:
            graph.aliases[known] += (name,)
            continue
        graph.aliases[name] = (name,)
        graph.parameters[name] = recorder.add(parameter, "parameter", name)
    stand_ins: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for key, held in module._parameters.items():
            if held is None or mode is None:
                continue
            if id(held) not in stand_ins:
                stand_ins[id(held)] = cast(nn.Parameter, _as_fake(held, mode))
                recorder.alias(stand_ins[id(held)], recorder.value_of(held))
            module._parameters[key] = stand_ins[id(held)]
        for key, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[key] = buffer.clone() if mode is None else _as_fake(buffer, mode)


def _as_fake(tensor: Tensor, mode: FakeTensorMode) -> Tensor:
    if isinstance(tensor, FakeTensor):
        return tensor
    return mode.from_tensor(tensor)


def _declare_inputs(
    inputs: Inputs, recorder: Recorder, mode: FakeTensorMode | None, device: torch.device
) -> Inputs:
    def declare(item: Any) -> Any:
        if isinstance(item, Tensor):
            moved = item.to(device) if mode is None else _as_fake(item, mode).to(device)
            recorder.add(moved, "input")
            return moved
        if isinstance(item, Mapping):
            return {key: declare(part) for key, part in item.items()}
        if isinstance(item, (tuple, list)):
            return type(item)(declare(part) for part in item)
        return item

    if isinstance(inputs, Mapping):
        return {key: declare(item) for key, item in inputs.items()}
    return tuple(declare(item) for item in inputs)


def _mark_outputs(output: Any, recorder: Recorder, state: frozenset[int], depth: int = 6) -> None:
    """What the caller gets: every tensor that can be reached from the output, but for `state`."""
    if depth == 0 or id(output) in state or isinstance(output, (str, bytes, type, nn.Module)):
        return
    if isinstance(output, Tensor):
        recorder.graph.outputs.add(recorder.value_of(output))
        return
    if isinstance(output, Mapping):
        parts: Iterable[Any] = output.values()
    elif isinstance(output, (tuple, list, set)):
        parts = output
    else:
        parts = vars(output).values() if hasattr(output, "__dict__") else ()
    for part in parts:
        _mark_outputs(part, recorder, state, depth - 1)


@contextmanager
def _prepared(model: nn.Module) -> Iterator[None]:
    """Evaluation mode and implementations that reach everything; afterwards all is as before."""
    saved = [(module, dict(module.__dict__), _held(module)) for module in model.modules()]
    try:
        with _plain_implementations(model):
            model.eval()
            yield
    finally:
        for module, attributes, held in saved:
            module.__dict__.clear()
            module.__dict__.update(attributes)
            for current, before in held:
                current.clear()
                current.update(before)


def _held(module: nn.Module) -> list[tuple[dict[Any, Any], dict[Any, Any]]]:
    """A module's parameters, buffers, parts and hooks: each dict, and what it holds now.

    A forward may install hooks when it is first asked for something; twice would be once too many.
    """
    return [(held, dict(held)) for held in vars(module).values() if isinstance(held, dict)]


@contextmanager
def _plain_implementations(model: nn.Module) -> Iterator[None]:
    """Ask for plain attention, and for experts that all run whatever the router says."""
    configs = {id(c): c for m in model.modules() if (c := getattr(m, "config", None)) is not None}
    saved = [(c, dict(c.__dict__)) for c in configs.values() if hasattr(c, "__dict__")]
    level, fastpath = logging.root.manager.disable, torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)  # one opaque operation for a whole layer
    # A fake forward that fails is tried for real; its log would only alarm.
    logging.disable(logging.ERROR)
    try:
        for name, plain in PLAIN_IMPLEMENTATIONS.items():
            if setter := getattr(model, name, None):
                with suppress(Exception):
                    setter(plain)
        yield
    finally:
        logging.disable(level)
        torch.backends.mha.set_fastpath_enabled(fastpath)
        for config, attributes in saved:
            config.__dict__.clear()
            config.__dict__.update(attributes)
