"""What becomes of the tensors of an adapter when its base is folded: E14, and E1 and E3 for copies.

The delta of a target is `scaling · B A` on top of W. The fold of the base maps W to
`center(W diag(g))`, which is linear, so the delta becomes `scaling · center(B) A diag(g)`: every
axis of W runs along one of the factors, and what happens to the axis happens to that factor.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from flashnorm import algebra
from flashnorm.adapters.base import Base
from flashnorm.adapters.tensors import (
    TOKENS,
    AdapterTensor,
    AdapterTensors,
    Lora,
    misfit,
    module_path,
)
from flashnorm.errors import CheckpointError, FoldError
from flashnorm.plan import Consumer, Gain, Plan

Step = Callable[[Tensor], Any]  # in place
MERGE = "merge the adapter into the original base and fold the result"


@dataclass
class Edit:
    """The steps that one tensor goes through, in order.

    `checks` holds what `algebra.check_fold` asks of every gain: name, values, axis, spans.
    """

    steps: list[Step] = field(default_factory=list)
    checks: list[tuple[str, Tensor, int, Any]] = field(default_factory=list)

    def apply(self, name: str, tensor: Tensor) -> tuple[Tensor, int]:
        """The new tensor, rounded once to its dtype, and how many elements became subnormal.

        Raises FoldError where it would leave the range of its dtype.
        """
        lost = sum(algebra.check_fold(name, tensor, *check) for check in self.checks)
        work = tensor.clone() if len(self.steps) == 1 else tensor.to(torch.float64, copy=True)
        for step in self.steps:
            step(work)
        done = work.to(tensor.dtype)
        if bool((torch.isfinite(tensor) & ~torch.isfinite(done)).any()):
            raise FoldError(f"{name}: its fold overflows {tensor.dtype}; store it as float32 first")
        return done, lost


@dataclass
class Edits:
    """The edits by key, and those of biases that B gets: by target, each from zeros on."""

    by_key: dict[str, Edit] = field(default_factory=lambda: defaultdict(Edit))
    biases: dict[str, Edit] = field(default_factory=dict)


@dataclass(frozen=True)
class Case:
    """An adapter, its base and a plan. `read` gives a tensor of the adapter.

    `canonical` maps the names of parameters to those that the plan uses.
    """

    config: dict[str, Any]
    tensors: AdapterTensors
    plan: Plan
    base: Base
    canonical: Mapping[str, str]
    read: Callable[[AdapterTensor], Tensor]

    def gain(self, gain: Gain) -> Tensor:
        """The gain of the original base: [n]."""
        return algebra.effective_gain(self.base.value(gain.parameter), gain)

    def targets(self, name: str) -> list[Lora]:
        """The pairs of factors that act on a parameter."""
        return [lora for lora in self.tensors.loras if lora.parameter == name]

    def copies(self, name: str) -> list[AdapterTensor]:
        """The tensors that take the place of a parameter."""
        return [part for part in self.tensors.copies if part.parameter == name]

    def along(self, name: str, axis: int) -> Iterator[AdapterTensor]:
        """The tensors that act on a parameter along one of its axes: of a target just one."""
        for lora in self.targets(name):
            found = [part for part in (lora.a, lora.b) if axis in part.axes]
            if len(found) != 1:
                raise CheckpointError(
                    f"{lora.module}: the fold changes axis {axis} of {name}, along which neither "
                    f"A nor B runs; {MERGE}"
                )
            yield found[0]
        for part in self.copies(name):
            if axis not in part.axes:
                raise CheckpointError(f"{part.entry.name} holds some rows of {name} only; {MERGE}")
            yield part

    def check_reads(self, lora: Lora, consumer: Consumer) -> None:
        """Raise unless A gets what the parameter multiplies: the output of the norm before it."""
        if lora.kind == "parameter":
            return
        inside = any(
            f"{site.path}.".startswith(f"{lora.module}.")
            for site in self.plan.folded
            if consumer in site.consumers
        )
        if inside or consumer.axis not in lora.a.axes:
            raise CheckpointError(
                f"{lora.module}: its weight reads a norm that its factor A does not read; {MERGE}"
            )


def refuse_copies(case: Case) -> None:
    """Raise CheckpointError for tensors that stand beside what the fold does, not under it.

    Those are gains of the adapter's own, rows of an embedding whose tied head gets weights of its
    own, and whatever goes around a module whose values are centered as they pass.
    """
    gains = {gain.parameter for gain in case.plan.gains()}
    tied = {old for _, old in case.plan.untied}
    for part in case.tensors.copies:
        if part.parameter in gains:
            raise CheckpointError(
                f"the adapter holds a gain of its own, {part.parameter}, but the plan folds the "
                f"base's; {MERGE}"
            )
        if part.parameter in tied and len(part.axes) < len(part.entry.shape):
            raise CheckpointError(
                f"{part.entry.name} holds rows of {part.parameter}, from which the plan unties the "
                f"head; {MERGE}"
            )
    passes = {entry.path for entry in case.plan.entries}
    around = [lora.target for lora in case.tensors.loras if lora.kind != "parameter"]
    around += [p.entry.name for p in case.tensors.copies if len(p.axes) < len(p.entry.shape)]
    for name in around:
        if module_path(name).removesuffix(TOKENS) in passes:
            raise CheckpointError(
                f"{name} acts beside a module whose values are centered as they pass; {MERGE}"
            )


def fold_gains(case: Case, edits: Edits) -> None:
    """E14: `A* = A diag(g)` where A runs along the axis that absorbs, else B; E1 for copies."""
    for name, pairs in case.plan.absorptions().items():
        for gain, consumer in pairs:
            for lora in case.targets(name):
                case.check_reads(lora, consumer)
            for part in case.along(name, consumer.axis):
                _fold_gain(case, edits.by_key[part.entry.name], part, gain, consumer)


def _fold_gain(case: Case, edit: Edit, part: AdapterTensor, gain: Gain, consumer: Consumer) -> None:
    vector, axis, spans = case.gain(gain), part.axes[consumer.axis], consumer.spans
    size = part.entry.shape[axis]
    if any(s.start + s.length > size or s.gain_start + s.length > vector.numel() for s in spans):
        shape = case.base.parameter(part.parameter).shape
        raise CheckpointError(misfit(part.entry, part.parameter, shape))
    edit.steps.append(partial(algebra.fold_gain_, gain=vector, axis=axis, spans=spans))
    edit.checks.append((gain.parameter, vector, axis, spans))


def center(case: Case, edits: Edits) -> None:
    """E3: `B* = B − mean over out`, as the base's writers are centered, and so for B's bias."""
    for centering in case.plan.centerings:
        name, axis = centering.parameter, centering.axis
        for part in case.along(name, axis):
            step = partial(algebra.center_, axis=part.axes[axis])
            edits.by_key[part.entry.name].steps.append(step)
        for lora in case.targets(name):
            if axis in lora.b.axes:
                _center_bias(edits, lora)


def _center_bias(edits: Edits, lora: Lora) -> None:
    step = partial(algebra.center_, axis=0)
    if lora.bias:
        edits.by_key[lora.bias.entry.name].steps.append(step)
    elif lora.target in edits.biases:
        edits.biases[lora.target].steps.append(step)
