"""Everything that a plan changes in a checkpoint, by tensor."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field

from flashnorm.checkpoint.mapping import REMEDY, Mapped
from flashnorm.checkpoint.provenance import Provenance
from flashnorm.checkpoint.translate import Absorptions, tensor_absorptions, tensor_centerings
from flashnorm.errors import CheckpointError
from flashnorm.plan import Plan


@dataclass(frozen=True)
class Copy:
    """A new tensor: the copy of another for a weight that is tied no more, and what it absorbs."""

    tensor: str
    source: str
    absorbs: Absorptions


@dataclass(frozen=True)
class Changes:
    """What happens to the tensors of a checkpoint; those that are not named stay as they are.

    `absorbs` and `centers` (the axis of the mean) are for weights, which are rewritten block by
    block. `small` names the tensors that are written anew, each with the parameters in it that
    change: gains, norm biases, and biases that take something. `twins` are pairs of tensors that
    are taken for one tied weight, so they must hold the same.
    """

    mapped: Mapped
    absorbs: dict[str, Absorptions] = field(default_factory=dict)
    centers: dict[str, int] = field(default_factory=dict)
    small: dict[str, tuple[str, ...]] = field(default_factory=dict)
    removed: frozenset[str] = frozenset()
    copies: tuple[Copy, ...] = ()
    twins: tuple[tuple[str, str], ...] = ()

    @property
    def touched(self) -> set[str]:
        """Every tensor whose values are read as numbers."""
        copied = {copy.source for copy in self.copies}
        return {*self.absorbs, *self.centers, *self.small, *copied}


def plan_changes(plan: Plan, mapped: Mapped, *, strict: bool) -> Changes:
    """What `plan` means for a checkpoint. Raises CheckpointError where it is not exact there."""
    absorptions, tied = plan.absorptions(), dict(plan.untied)
    copied = {new: old for new, old in plan.untied if not _is_stored(mapped, new, old)}
    small = _small_parameters(plan, mapped)
    for name in {*small, *absorptions, *(c.parameter for c in plan.centerings)} - copied.keys():
        _check_single(name, mapped, tied)
    for name, pairs in absorptions.items():
        _check_fit(name, mapped[copied.get(name, name)], pairs, mapped)
    return Changes(
        mapped,
        tensor_absorptions(
            (name, mapped[name], pairs)
            for name, pairs in absorptions.items()
            if name not in copied and name not in small
        ),
        tensor_centerings(
            (c, mapped[c.parameter]) for c in plan.centerings if c.parameter not in small
        ),
        _owners(small, mapped),
        _removed(plan, mapped) if strict else frozenset(),
        tuple(_copies(copied, absorptions, mapped)),
        tuple(_twins(tied, copied, mapped)),
    )


def _is_stored(mapped: Mapped, new: str, old: str) -> bool:
    """Whether the checkpoint holds a tensor of its own for a tied weight."""
    return new in mapped.provenances and mapped[new].tensors != mapped[old].tensors


def _small_parameters(plan: Plan, mapped: Mapped) -> tuple[str, ...]:
    names = [gain.parameter for gain in plan.gains()]
    names += [b.parameter for b in plan.norm_biases()] + list(plan.bias_absorptions())
    names += [c.parameter for c in plan.centerings if len(mapped[c.parameter].shape) == 1]
    return tuple(dict.fromkeys(names))


def _check_single(name: str, mapped: Mapped, tied: dict[str, str]) -> None:
    others = [n for n in mapped.twins.get(name, ()) if name not in tied and tied.get(n) != name]
    if others:
        raise CheckpointError(
            f"the checkpoint stores the tied weight {name} twice, as "
            f"{mapped[name].tensors[0]} and {mapped[others[0]].tensors[0]}; {REMEDY}"
        )


def _check_fit(name: str, provenance: Provenance, pairs: Absorptions, mapped: Mapped) -> None:
    """The parameter must have the shape that the plan was made for."""
    for gain, consumer in pairs:
        width = provenance.shape[consumer.axis] if -1 < consumer.axis < len(provenance.shape) else 0
        numel = math.prod(mapped[gain.parameter].shape)
        if any(
            s.start + s.length > width or s.gain_start + s.length > numel for s in consumer.spans
        ):
            raise CheckpointError(
                f"{name} of shape {list(provenance.shape)} cannot absorb the gain {gain.parameter} "
                f"of {numel} elements along axis {consumer.axis} as the plan says: make the plan "
                "from this checkpoint, with flashnorm.inspect"
            )


def _owners(small: tuple[str, ...], mapped: Mapped) -> dict[str, tuple[str, ...]]:
    """For each tensor the parameters that change in it."""
    found: dict[str, list[str]] = defaultdict(list)
    for name in small:
        for tensor in mapped[name].tensors:
            found[tensor].append(name)
    return {tensor: tuple(names) for tensor, names in found.items()}


def _removed(plan: Plan, mapped: Mapped) -> frozenset[str]:
    """Tensors that hold nothing but gains of one and norm biases of zero."""
    names = [gain.parameter for gain in plan.gains()]
    names += [b.parameter for b in plan.norm_biases() if b.folded]
    left: dict[str, int] = {}
    for name in dict.fromkeys(names):
        for part in mapped[name].slices:
            left[part.tensor] = left.get(part.tensor, math.prod(part.box.sizes)) - part.box.numel
    for tensor, count in left.items():
        if count:
            raise CheckpointError(
                f"the tensor {tensor} holds more than gains that fold, so strict mode cannot "
                "remove it: fold without strict"
            )
    return frozenset(left)


def _copies(
    copied: dict[str, str], absorptions: dict[str, Absorptions], mapped: Mapped
) -> Iterator[Copy]:
    for new, old in copied.items():
        provenance = mapped[old]
        if len(provenance.slices) != 1 or not provenance.slices[0].box.is_plain:
            raise CheckpointError(
                f"{new} cannot be copied from {old}, which the checkpoint does not store as it is; "
                f"{REMEDY}"
            )
        tensor = provenance.slices[0].tensor
        absorbs = tensor_absorptions([(new, provenance, absorptions.get(new, ()))])
        yield Copy(new, tensor, absorbs.get(tensor, ()))


def _twins(
    tied: dict[str, str], copied: dict[str, str], mapped: Mapped
) -> Iterator[tuple[str, str]]:
    for new, old in tied.items():
        if new not in copied:
            yield from zip(mapped[new].tensors, mapped[old].tensors, strict=True)
