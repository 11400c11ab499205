"""The original base of an adapter: its modules and parameters by name, and the values that a fold
needs. No weight is loaded but those asked for.
"""

from __future__ import annotations

import os
from collections import defaultdict
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flashnorm.adapters.config import PathName
from flashnorm.checkpoint.origin import Origin, open_origin
from flashnorm.errors import CheckpointError
from flashnorm.marker import folded_by
from flashnorm.plan import Plan
from flashnorm.reading import read_json

if TYPE_CHECKING:
    from torch import Tensor, nn


@dataclass
class Base:
    """A base model by name. Parameters are fake; `value` reads one from the checkpoint."""

    name: str
    origin: Origin
    _values: dict[str, Tensor] = field(default_factory=dict)

    @cached_property
    def model(self) -> nn.Module:
        return self.origin.fake_model()

    @cached_property
    def parameters(self) -> dict[str, nn.Parameter]:
        return dict(self.model.named_parameters(remove_duplicate=False))

    @cached_property
    def buffers(self) -> set[str]:
        return {name for name, _ in self.model.named_buffers(remove_duplicate=False)}

    def module(self, path: str) -> nn.Module:
        """The module at `path`; raises CheckpointError where the base has none."""
        try:
            return self.model.get_submodule(path)
        except AttributeError:
            raise CheckpointError(
                f"the adapter acts on {path}, which {type(self.model).__name__} does not have as "
                "built from the config of the base; give the base that it was trained on, or load "
                "the adapter with PEFT and save it again where it names modules of an older "
                "transformers"
            ) from None

    def parameter(self, name: str) -> nn.Parameter:
        """The fake parameter `name`; raises CheckpointError where the base has none."""
        if name not in self.parameters:
            self.module(name.rpartition(".")[0])
            raise CheckpointError(
                f"the adapter acts on the parameter {name}, which {type(self.model).__name__} as "
                "built from the config of the base does not have"
            )
        return self.parameters[name]

    def value(self, name: str) -> Tensor:
        """One parameter as it is stored; raises CheckpointError where it is not at hand."""
        if name not in self._values:
            found = self.origin.gain(name)  # reads any parameter, not gains alone
            if found is None:
                raise CheckpointError(
                    f"the values of {name} are not at hand in {self.name}: give the directory of "
                    "the original base with its safetensors"
                )
            self._values[name] = found
        return self._values[name]

    def canonical(self, plan: Plan) -> dict[str, str]:
        """For every parameter name the one that the plan uses for it: shared ones have several.

        A tied parameter to which the plan gives values of its own is not shared any more.
        """
        own = {new for new, _ in plan.untied}
        spoken = [name for name in mentioned(plan) if name not in own]
        groups: dict[int, list[str]] = defaultdict(list)
        for name, parameter in self.parameters.items():
            groups[id(parameter)].append(name)
        found = {name: name for name in self.parameters}
        for name in spoken:
            for alias in groups[id(self.parameters[name])]:
                if alias not in own:
                    found[alias] = name
        return found


def open_base(base: PathName | None, config: dict[str, Any]) -> Base:
    """The base that `base` names, or else the local directory that the adapter's config names."""
    stored = config.get("base_model_name_or_path") or ""
    if not isinstance(stored, str):
        raise CheckpointError(f"the adapter names {stored!r} as its base, which is no text")
    if base is None and not (stored and Path(stored).is_dir()):
        raise CheckpointError(
            f"the adapter names {stored!r} as its base, which is no local directory: say where the "
            "original base is (--base, base=)"
        )
    name = os.fspath(stored if base is None else base)
    origin = open_origin(name)
    if key := folded_by(origin.config.to_dict()):
        raise CheckpointError(
            f"{name} was folded already, as {key} in its config says: give the original base, "
            "whose gains the adapter was trained with"
        )
    return Base(name, origin)


def check_plan(plan: Plan, base: Base) -> None:
    """Raise CheckpointError where the plan names parameters that the base does not have."""
    known = {*base.parameters, *(new for new, _ in plan.untied)}
    for name in mentioned(plan):
        if name not in known:
            raise CheckpointError(
                f"the plan names the parameter {name}, which {base.name} does not have: make the "
                "plan from this base (flashnorm inspect --json)"
            )


def mentioned(plan: Plan) -> list[str]:
    """Every parameter that the plan changes, once."""
    names = [gain.parameter for gain in plan.gains()]
    names += [b.parameter for b in plan.norm_biases()]
    names += [*plan.absorptions(), *plan.bias_absorptions()]
    names += [centering.parameter for centering in plan.centerings]
    return list(dict.fromkeys(names))


def check_folded(folded: Path, plan: Plan) -> None:
    """Raise CheckpointError unless `folded` is a base that was folded by this very plan."""
    try:
        config = read_json(folded / "config.json")
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{folded} holds no config.json that can be read: {error}") from error
    mark = config.get("flashnorm") if isinstance(config, dict) else None
    found = mark.get("folded") if isinstance(mark, dict) else None
    wanted = sorted(gain.parameter for gain in plan.gains())
    if found != wanted:
        what = "carries no marker of flashnorm" if found is None else "was folded by another plan"
        raise CheckpointError(
            f"{folded} {what}: give the base that was folded by the plan of this adapter (with "
            "--untie, if it was folded with it)"
        )
