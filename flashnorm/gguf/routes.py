"""From the tensors of a GGUF file to the parameters of a model, by transformers' own code.

What that code is given are float32 arrays; whether they hold numbers or marks is its caller's.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from flashnorm.compat.gguf_names import conversions, parameter_names, processor
from flashnorm.compat.transformers_names import conversion_rules, load_state, router
from flashnorm.errors import CheckpointError
from flashnorm.gguf.file import File, Stored
from flashnorm.skeleton import place_

Array = np.ndarray[Any, Any]


class Routes:
    """How the tensors of a file become the parameters of `model`, whose parameters are float32."""

    def __init__(self, file: File, model: Any, described: dict[str, Any]) -> None:
        """described: what transformers reads of the file's metadata, by the names of a config."""
        self.model, self.names = model, set(model.state_dict())
        rules = conversions(file.architecture, model.config)
        self.processor: Any = None
        self.mapping: dict[str, str] = {}
        if rules is None:
            self.processor = processor(file.architecture, described)
            self.mapping = parameter_names(
                model, self.processor, [stored.name for stored in file.tensors]
            )
            rules = conversion_rules(model)
        self.rules = rules
        self._route = router(model, rules)

    def groups(self, tensors: Sequence[Stored]) -> list[list[Stored]]:
        """Tensors that are read together, because they make one parameter."""
        found: dict[str, list[Stored]] = {}
        for stored in tensors:
            found.setdefault(self._target(stored.name), []).append(stored)
        return list(found.values())

    def _target(self, name: str) -> str:
        if self.processor is None:
            return self._route(name)[0]
        stem = name.removesuffix(".weight")
        return self.mapping.get(name) or self.mapping.get(stem) or name

    def run(self, arrays: Mapping[str, Array]) -> dict[str, Tensor]:
        """The parameters that these tensors make, by name; empty where the model has none.

        Raises CheckpointError where a tensor does not fit.
        """
        made, computed = {}, {}
        for key, tensor in self._processed(arrays).items():
            name, computes = self._route(key)
            if not computes:
                name = key if name not in self.names and key in self.names else name
                made.update({name: tensor} if name in self.names else {})
            else:
                computed[key] = tensor
        return made | (self._computed(computed) if computed else {})

    def _processed(self, arrays: Mapping[str, Array]) -> dict[str, Tensor]:
        """By the names of a checkpoint."""
        if self.processor is None:
            return {name: _tensor(values) for name, values in arrays.items()}
        parsed: dict[str, dict[str, Tensor]] = {"tensors": {}}
        for name, values in arrays.items():
            made = self.processor.process(
                weights=values,
                name=name,
                tensor_key_mapping=self.mapping,
                parsed_parameters=parsed,
            )
            if made.name in self.mapping:
                parsed["tensors"][self.mapping[made.name]] = _tensor(made.weights)
        return parsed["tensors"]

    def _computed(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """What the model's own rules make of tensors. Its parameters are as before afterwards."""
        names = {self._route(key)[0] for key in state}
        before = dict(self.model.named_parameters(remove_duplicate=False))
        info = load_state(self.model, state, self.rules)
        after = dict(self.model.named_parameters(remove_duplicate=False))
        changed = {name: after[name] for name in after if after[name] is not before[name]}
        for name in changed:
            place_(self.model, name, before[name])
        if info.conversion_errors or info.mismatched_keys or names - {*changed}:
            wrong = sorted(map(str, info.conversion_errors or info.mismatched_keys or names))
            raise CheckpointError(f"transformers cannot make {wrong[0]} of {', '.join(state)}")
        return {name: tensor.detach() for name, tensor in changed.items()}


def _tensor(values: Array) -> Tensor:
    """The same memory, but where an axis runs backwards: torch has no such tensors."""
    if min(values.strides, default=0) < 0:
        values = np.ascontiguousarray(values)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        return torch.from_numpy(values)
