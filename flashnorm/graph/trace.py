"""Tracing: run a stand-in of a model under the recorder, on fake tensors where that works.

A fake forward needs no memory and no weights. Where the model asks a fake tensor for its value, the
same inputs are run for real. Models with a cache are traced over a prefill and one decode step.
The model itself is only read (`standin`), so whatever happens it is as it was.
"""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from itertools import count, islice
from threading import get_ident
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from flashnorm.compat.torch_names import FakeTensor, FakeTensorMode
from flashnorm.errors import TraceError
from flashnorm.graph.ambient import undisturbed
from flashnorm.graph.ir import Graph
from flashnorm.graph.packed import Packed
from flashnorm.graph.record import ForeignWrite, Recorder
from flashnorm.graph.standin import Copies, evaluating
from flashnorm.graph.tensors import Tensors, overlaps, place
from flashnorm.transaction import uninterrupted

Inputs = Mapping[str, Any] | Sequence[Any]
# Official setters of transformers models, and the implementation that hides nothing.
PLAIN_IMPLEMENTATIONS = {
    "set_attn_implementation": "eager",
    "set_experts_implementation": "batched_mm",
}
DecodeStep = Callable[[nn.Module, Inputs, Any], Iterable[Mapping[str, Any]]]
Prepare = Callable[[nn.Module], None]


def trace(
    model: nn.Module,
    candidates: Iterable[Inputs],
    decode: DecodeStep | None = None,
    *,
    allow_real: bool = True,
    prepare: Prepare | None = None,
) -> Graph:
    """Record the first of `candidates` that the model accepts, and a decode step after it.

    `decode(model, inputs, output)` yields inputs for one more step with the output's cache, best
    first. `prepare` may change the stand-in before it runs. Raises TraceError, with the failure
    that says most, when no candidate runs.
    """
    if isinstance(candidates, Iterator):
        candidates = list(candidates)
    failures: list[Exception] = []
    real = allow_real and not any(p.is_meta or isinstance(p, FakeTensor) for p in _tensors(model))
    with undisturbed({type(module) for module in model.modules()}):
        for fake in (True, False) if real else (True,):
            failures = failures if fake else []
            for inputs in candidates:
                session = _Session(model, inputs, decode, prepare, fake)
                try:
                    return session.record()
                except Exception as error:
                    failures.append(error)
    failure = _most_telling(failures)
    raise TraceError(_explain(model, failure)) from failure


def _tensors(model: nn.Module) -> Iterator[Tensor]:
    yield from model.parameters()
    yield from model.buffers()


def _most_telling(failures: Sequence[Exception]) -> Exception | None:
    """The first that is not about the arguments: the best inputs come first."""
    return next((f for f in failures if not isinstance(f, TypeError)), next(iter(failures), None))


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


class _Session:
    """All tries to record one set of inputs, each on a stand-in of its own."""

    def __init__(
        self,
        model: nn.Module,
        inputs: Inputs,
        decode: DecodeStep | None,
        prepare: Prepare | None,
        fake: bool,
    ) -> None:
        self.model, self.inputs, self.decode, self.prepare = model, inputs, decode, prepare
        self.fake = fake
        self.copied = False  # whether parameters are copied for a real run

    def record(self) -> Graph:
        """Record a forward and the first decode step that runs, each try from the beginning."""
        failure: _StepFailed | None = None
        try:
            for number in count():
                try:
                    return self._once(self.decode, number)
                except _StepFailed as error:
                    failure = error
        except _NoMoreSteps:
            graph = self._once(None, 0)
        graph.notes.append(f"the cached decode step was not recorded: {failure}")
        return graph

    def _once(self, decode: DecodeStep | None, number: int) -> Graph:
        try:
            return self._run(decode, number)
        except ForeignWrite:
            if self.fake or self.copied:
                raise
            self.copied = True  # it writes into its own weights: then they need memory of their own
            return self._run(decode, number)

    @torch.inference_mode(False)
    @torch.no_grad()
    def _run(self, decode: DecodeStep | None, number: int) -> Graph:
        mode = _fake_mode(self.model) if self.fake else None
        tensors = Tensors(self.model, mode, self.copied)
        copies = Copies(tensors)
        packed = Packed(self.model, copies, mode)
        model = evaluating(copies.of(self.model))
        inputs = copies.of(self.inputs)
        recorder = Recorder(tensors.owned())
        packed.install(recorder)
        _declare_state(self.model, copies, recorder, packed)
        with _quiet(), ExitStack() as stack:
            _reach_everything(model)
            if self.prepare is not None:
                self.prepare(model)
            recorder.watch(model)
            if mode is not None:
                stack.enter_context(mode)
            inputs = _declare_inputs(inputs, recorder, mode, tensors.device)
            if _has_fast_paths(model):
                stack.enter_context(_SlowPath())
            stack.enter_context(recorder)
            output = _call(model, inputs)
            state: frozenset[int] = frozenset()
            if decode is not None:
                state = _trace_step(model, decode(model, inputs, output), number, recorder)
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


def _fake_mode(model: nn.Module) -> FakeTensorMode:
    """The mode that the model's tensors belong to already, or a new one."""
    for tensor in _tensors(model):
        if isinstance(tensor, FakeTensor):
            return tensor.fake_mode
    return FakeTensorMode(allow_non_fake_inputs=True)


def _declare_state(model: nn.Module, copies: Copies, recorder: Recorder, packed: Packed) -> None:
    """Enter parameters, buffers and modules into the graph; other names are aliases.

    Two parameters over the same memory are one, whatever objects they are.
    """
    graph = recorder.graph
    first: dict[Any, str] = {}
    hidden = packed.hidden()
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if name in hidden:
            continue
        stand_in = copies.of(parameter)
        known = first.setdefault(place(parameter), name)
        if known != name:
            graph.aliases[known] += (name,)
            recorder.alias(stand_in, graph.parameters[known])
        else:
            graph.aliases[name] = (name,)
            graph.parameters[name] = recorder.add(stand_in, "parameter", name)
        if stand_in is not parameter:
            recorder.alias(parameter, graph.parameters[known])
    packed.declare(recorder)
    for name, buffer in model.named_buffers():
        if name in hidden or name in packed.buffers():
            continue
        graph.buffers[name] = recorder.value_of(copies.of(buffer))
    first_paths = {id(module): path for path, module in model.named_modules()}
    for path, module in model.named_modules(remove_duplicate=False):
        graph.modules[path] = first_paths[id(module)]
    for tensor, other in overlaps(model):
        recorder.share(tensor, other)


def _declare_inputs(
    inputs: Inputs, recorder: Recorder, mode: FakeTensorMode | None, device: torch.device
) -> Inputs:
    def declare(item: Any) -> Any:
        if isinstance(item, Tensor):
            fake = mode is not None and not isinstance(item, FakeTensor)
            moved = (mode.from_tensor(item) if fake else item).to(device)  # type: ignore[union-attr]
            recorder.add(moved, "input")
            recorder.own(moved)
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


def _reach_everything(model: nn.Module) -> None:
    """Ask a stand-in for plain attention, and for experts that all run whatever the router says."""
    for name, plain in PLAIN_IMPLEMENTATIONS.items():
        if setter := getattr(model, name, None):
            with suppress(Exception):
                setter(plain)


def _has_fast_paths(model: nn.Module) -> bool:
    kinds = (nn.MultiheadAttention, nn.TransformerEncoderLayer, nn.TransformerEncoder)
    return any(isinstance(module, kinds) for module in model.modules())


class _SlowPath(TorchFunctionMode):
    """Changes nothing; torch's own layers do not run as one opaque operation while it is there."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


class _Silence:
    """Lives as long as the frame that holds it."""


@contextmanager
def _quiet() -> Iterator[None]:
    """A fake forward that fails is tried for real; its log, in this thread, would only alarm."""
    thread, silence = get_ident(), _Silence()
    lasts = weakref.ref(silence)  # a filter that an interruption leaves behind lets all pass

    def is_heard(_: logging.LogRecord) -> bool:
        return lasts() is None or get_ident() != thread

    loggers = [logging.getLogger(name) for name in ("torch", "transformers")]
    loggers += [logging.getLogger("torch._subclasses.fake_tensor")]
    handlers = [handler for logger in loggers for handler in logger.handlers]
    muted: list[logging.Filterer] = [loggers[-1], *handlers]
    try:
        for each in muted:
            each.addFilter(is_heard)
        yield
    finally:
        with uninterrupted():
            for each in muted:
                each.removeFilter(is_heard)
