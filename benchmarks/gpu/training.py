"""One step forward and backward: its time, its peak, and what it saves for the backward pass."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import flashnorm
from benchmarks.gpu.memory import peak
from benchmarks.gpu.timing import in_turn, wall
from flashnorm.bench.models import sharing_copy
from flashnorm.bench.records import EAGER, OURS
from flashnorm.bench.timing import in_words

TOKENS = 2048
ROUNDS, SECONDS = 5, 10.0
ABSENT = "this version of accelerate_ has no training=True"


def measure(model: nn.Module, ids: Tensor, device: str) -> dict[str, Any]:
    """Both variants on one sequence; the peak holds the gradients of the weights as well."""
    ids = ids[:TOKENS]
    models, failed = _models(model)
    found: dict[str, Any] = {"tokens": len(ids), "peak_bytes": {}, "saved_bytes": {}}
    runs: dict[str, Callable[[], float]] = {}
    for name, each in models.items():
        try:
            step(each, ids)  # in the first one accelerated modules ask their own forwards
            found["saved_bytes"][name] = saved(each, ids)
            if device != "cpu":
                found["peak_bytes"][name] = peak(lambda each=each: step(each, ids), device)
            runs[name] = wall(lambda each=each: step(each, ids), device)
        except Exception as error:
            failed[name] = in_words(error)
    timings, errors = in_turn(runs, ROUNDS, SECONDS)
    model.eval()
    found["milliseconds"] = {name: timing.to_json() for name, timing in timings.items()}
    return {**found, "failed": {**failed, **errors}}


def _models(model: nn.Module) -> tuple[dict[str, nn.Module], dict[str, str]]:
    """Eager, and ours where there is one: they share weights and so the memory of gradients."""
    plain = sharing_copy(model).train()
    if "training" not in inspect.signature(flashnorm.accelerate_).parameters:
        return {EAGER: plain}, {OURS: ABSENT}
    try:
        ours = flashnorm.accelerate_(sharing_copy(model), training=True).train()
    except Exception as error:
        return {EAGER: plain}, {OURS: in_words(error)}
    return {EAGER: plain, OURS: ours}, {}


def step(model: Any, ids: Tensor) -> None:
    """Loss, gradients of all weights, and their release."""
    model(input_ids=ids[None], labels=ids[None], use_cache=False).loss.backward()
    model.zero_grad(set_to_none=True)


def saved(model: Any, ids: Tensor) -> int:
    """Bytes that the forward pass keeps for the backward pass, without the parameters.

    Every storage counts once; the loss keeps all of them alive, so that none takes another's place.
    """
    kept: dict[int, int] = {}
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = model(input_ids=ids[None], labels=ids[None], use_cache=False).loss
    del loss
    return sum(kept.values())
