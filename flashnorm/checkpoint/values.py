"""What a checkpoint holds for a parameter, and the new values of small tensors.

Weights are mapped into memory and read block by block, so nothing large is held.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import reduce

import torch
from torch import Tensor

from flashnorm import algebra
from flashnorm.checkpoint.changes import Changes
from flashnorm.checkpoint.header import FLOAT_DTYPES
from flashnorm.checkpoint.provenance import Provenance
from flashnorm.checkpoint.source import Place, Source
from flashnorm.checkpoint.translate import Absorptions
from flashnorm.errors import CheckpointError, FoldError
from flashnorm.plan import Consumer, NormBias, Plan

Load = Callable[[Source, Place], Tensor]


def load_tensor(source: Source, place: Place) -> Tensor:
    """One tensor of the checkpoint: a change of it stays in memory. A large one of a file is on a
    mapping.

    Raises CheckpointError where the file has become shorter since its header was read.
    """
    dtype = FLOAT_DTYPES[place.entry.dtype]
    if not place.entry.nbytes:
        return torch.empty(place.entry.shape, dtype=dtype)
    start = len(source.shards[place.shard].raw) + place.entry.start
    data, first = source.store.span(place.shard, start, place.entry.nbytes)
    flat = torch.frombuffer(data, dtype=dtype, count=place.entry.numel, offset=first)
    return flat.view(place.entry.shape)


def read_parameter(source: Source, provenance: Provenance, load: Load = load_tensor) -> Tensor:
    """The value of a parameter as the model has it; what `load` gives where one tensor is all."""
    if len(provenance.slices) == 1 and provenance.slices[0].box.is_plain:
        return load(source, source.where[provenance.slices[0].tensor])
    tensors = {name: load(source, source.where[name]) for name in provenance.tensors}
    dtypes = {tensor.dtype for tensor in tensors.values()}
    if len(dtypes) > 1:
        raise CheckpointError(
            f"{' and '.join(provenance.tensors[:2])} make one parameter, but are stored as "
            f"{' and '.join(sorted(map(str, dtypes)))}: convert the checkpoint to one dtype first"
        )
    value = torch.empty(provenance.shape, dtype=dtypes.pop())
    for part in provenance.slices:
        value[part.place] = tensors[part.tensor][part.box.index]
    return value


class Values:
    """What a plan takes from the weights: the gains, and the new values of small tensors."""

    def __init__(self, source: Source, plan: Plan, changes: Changes) -> None:
        self._source, self._changes = source, changes
        self._absorptions = plan.absorptions()
        self._biases = plan.bias_absorptions()
        self._norm_biases = {norm_bias.parameter: norm_bias for norm_bias in plan.norm_biases()}
        self._identities = {gain.parameter: gain for gain in plan.gains()}
        self._axes = {centering.parameter: centering.axis for centering in plan.centerings}
        self._done: dict[str, Tensor] = {}
        self.gains = {
            gain: algebra.effective_gain(self._read(gain.parameter), gain) for gain in plan.gains()
        }

    def tensor(self, name: str) -> Tensor:
        """The new value of a small tensor, shaped as it is stored."""
        value = load_tensor(self._source, self._source.where[name]).clone()
        for parameter in self._changes.small[name]:
            if parameter not in self._done:
                self._done[parameter] = self._rewritten(parameter)
            for part in self._changes.mapped[parameter].slices:
                if part.tensor == name:
                    value[part.box.index] = self._done[parameter][part.place]
        return value

    def sums(self, name: str) -> bool:
        """Whether sums make a tensor, in an order that is the machine's: biases that take W β, and
        what is centered."""
        if name in self._changes.centers:
            return True
        parameters = self._changes.small.get(name, ())
        return any(one in self._biases or one in self._axes for one in parameters)

    def rewrite_(self, name: str, rows: Tensor, absorbs: Absorptions, center: int | None) -> int:
        """E1, then E3, of rows of the tensor `name`, in place.

        Returns how many elements became subnormal. Raises FoldError where the dtype overflows.
        """
        lost = 0
        for gain, consumer in absorbs:
            g, axis, spans = self.gains[gain], consumer.axis, consumer.spans
            lost += algebra.check_fold(name, rows, gain.parameter, g, axis, spans)
            algebra.fold_gain_(rows, g, axis, spans)
        if center is not None:
            algebra.center_(rows, center)
        return lost

    def _read(self, parameter: str) -> Tensor:
        return read_parameter(self._source, self._changes.mapped[parameter])

    def _rewritten(self, name: str) -> Tensor:
        """E2 first, then E13 or zero or one, E1, and E3 last; each rounds once."""
        value = self._read(name).clone()
        if pairs := self._biases.get(name):
            _add_(name, value, [self._product(*pair) for pair in pairs])
        if norm_bias := self._norm_biases.get(name):
            self._move_norm_bias_(value, norm_bias)
        if gain := self._identities.get(name):
            algebra.identity_gain_(value, gain)
        for gain, consumer in self._absorptions.get(name, ()):
            algebra.fold_gain_(value, self.gains[gain], consumer.axis, consumer.spans)
        if (axis := self._axes.get(name)) is not None:
            algebra.center_(value, axis)
        return value

    def _product(self, norm_bias: NormBias, consumer: Consumer) -> Tensor:
        weight, beta = self._read(consumer.parameter), self._read(norm_bias.parameter)
        return algebra.bias_product(weight, beta, consumer.axis, consumer.spans)

    def _move_norm_bias_(self, value: Tensor, norm_bias: NormBias) -> None:
        if norm_bias.folded:
            value.zero_()
            return
        if not algebra.can_carry(value, self.gains[norm_bias.gain]):
            raise FoldError(
                f"{norm_bias.parameter}: β/g is not finite, because the gain "
                f"{norm_bias.gain.parameter} is zero, or next to it, where the bias is not; make "
                "the plan from these very weights"
            )
        algebra.carry_bias_(value, self.gains[norm_bias.gain])


def _add_(name: str, bias: Tensor, products: list[Tensor]) -> None:
    algebra.fold_bias_(bias, reduce(torch.add, products))
    if not bool(torch.isfinite(bias).all()):
        raise FoldError(
            f"{name}: adding W β to it overflows {bias.dtype}; convert the checkpoint to bfloat16 "
            "or float32 first"
        )
