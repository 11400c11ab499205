"""A decode step as a shared library: traced with everything that it reads as an input.

    logits [B, 1, V] = step(parameters, ids [B, 1], visible [B, T], positions [B, 1], lengths,
                            keys [B, H, T, D], values [B, H, T, D])

Keys, values and lengths are those of a `StaticCache`, written in place as by its own code.
"""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from flashnorm.compat.torch_names import aot_compiler
from flashnorm.errors import FlashNormError
from flashnorm.kernels.backend import Packaging
from flashnorm.kernels.exporting import operators_kept
from flashnorm.runtime.package.sums import take_up_

LIBRARY = "step.so"
_OPERATORS = ("aten", "_operator", "flashnorm", "prims", "math")


class Step(nn.Module):
    """A model's forward for one token per sequence, with the tensors of its cache as arguments."""

    def __init__(self, model: nn.Module, cache: Any) -> None:
        super().__init__()
        self.model, self.cache = model, cache

    def forward(
        self,
        ids: Tensor,
        visible: Tensor,
        positions: Tensor,
        lengths: list[Tensor],
        keys: list[Tensor],
        values: list[Tensor],
    ) -> Tensor:
        for layer, n, k, v in zip(self.cache.layers, lengths, keys, values, strict=True):
            layer.cumulative_length, layer.keys, layer.values = n, k, v
        found: Tensor = self.model(
            input_ids=ids,
            attention_mask=visible,
            position_ids=positions,
            past_key_values=self.cache,
            use_cache=True,
            return_dict=True,
        ).logits
        return found


@dataclass(frozen=True)
class Traced:
    """A graph, and the names of the parameters and buffers that come first among its inputs."""

    graph: Any
    names: tuple[str, ...]


def trace(model: nn.Module, cache: Any, inputs: tuple[Any, ...]) -> Traced:
    """The graph of one step. Raises FlashNormError where the model's code has no single graph."""
    try:
        with operators_kept(), torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that the tracer sees the cache's attributes set
            program = torch.export.export(Step(model, cache), inputs, strict=True)
    except Exception as error:
        raise FlashNormError(
            f"the decode step of this model is no single graph, so it cannot be packaged: "
            f"{type(error).__name__}: {_first_line(error)}"
        ) from error
    names = []
    for given in program.graph_signature.input_specs:
        kind, target = given.kind.name, given.target
        if kind in ("PARAMETER", "BUFFER") and target and target.startswith("model."):
            names.append(target.removeprefix("model."))
        elif kind != "USER_INPUT":
            raise FlashNormError(
                f"the decode step of this model holds a tensor of its own ({target}), so it cannot "
                "be packaged: make it a buffer"
            )
    _check_operators(program.graph_module)
    return Traced(program.graph_module, tuple(names))


def _first_line(error: Exception) -> str:
    return next((line for line in str(error).splitlines() if line.strip()), "")


def _check_operators(graph: Any) -> None:
    """Raise FlashNormError for operators that a library would need Python for."""
    for node in graph.graph.nodes:
        if node.op != "call_function":
            continue
        space = getattr(node.target, "namespace", None) or node.target.__module__
        if space not in _OPERATORS or str(node.target) == "flashnorm.norm_linear.default":
            raise FlashNormError(f"a package cannot call {node.target}, which the model does")


def compile_(traced: Traced, inputs: Sequence[Tensor], packaging: Packaging, to: Path) -> None:
    """Write the library of a traced step. Raises FlashNormError where the compiler fails."""
    take_up_(traced.graph.graph, packaging)
    traced.graph.recompile()
    options = {
        "aot_inductor.output_path": str(to.parent / "build" / LIBRARY),
        "aot_inductor.custom_ops_to_c_shims": packaging.entries(),
        "freezing": False,
        **packaging.options(),
    }
    try:
        with torch.no_grad():
            made = aot_compiler()(traced.graph, tuple(inputs), options=options)
        shutil.move(str(made), to)
    except Exception as error:
        raise FlashNormError(
            f"the decode step could not be compiled: {type(error).__name__}: {_first_line(error)}"
        ) from error
    finally:
        shutil.rmtree(to.parent / "build", ignore_errors=True)
