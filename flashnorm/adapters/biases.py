"""Where the bias of a norm goes into its readers (E2), what an adapter on them has to add.

The reader computes `W (z + β) + c`, and with the adapter `scaling · B A (z + β)` more. The folded
base holds `c* = c + W β`, so `scaling · B A β` is left over. It goes into the bias of B, which PEFT
multiplies by the scaling (`lora_bias`), or, where the adapter holds c itself, into that one.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial

import torch
from torch import Tensor

from flashnorm import algebra
from flashnorm.adapters.config import scaling
from flashnorm.adapters.edits import MERGE, Case, Edit, Edits, Step
from flashnorm.adapters.tensors import Lora, module_path
from flashnorm.errors import CheckpointError, FoldError
from flashnorm.plan import Consumer, NormBias

BiasPairs = Iterable[tuple[NormBias, Consumer]]


def add_biases(case: Case, edits: Edits) -> None:
    """E2 and E13, computed from the values as they were; the first steps of every tensor."""
    for name, pairs in case.plan.bias_absorptions().items():
        held = case.copies(name)
        for part in held:
            total = _total(case, pairs, part.entry.shape[0])
            edits.by_key[part.entry.name].steps.append(partial(algebra.fold_bias_, product=total))
        if not held:
            _add_to_factors(case, edits, name, pairs)
    for norm_bias in case.plan.norm_biases():
        for part in case.copies(norm_bias.parameter):
            edits.by_key[part.entry.name].steps.append(_moved(case, norm_bias))
    if edits.biases:
        _complete(case, edits)


def _total(case: Case, pairs: BiasPairs, size: int) -> Tensor:
    """`W β + scaling · B A β` over the norms that a bias takes from: [out]."""
    total = torch.zeros(size, dtype=torch.float64)
    for norm_bias, consumer in pairs:
        beta = _value(case, norm_bias.parameter)
        weight = _value(case, consumer.parameter)
        total += algebra.bias_product(weight, beta, consumer.axis, consumer.spans)
        targets = case.targets(consumer.parameter)
        if len(targets) > 1:
            raise CheckpointError(
                f"{targets[0].module} and {targets[1].module} share a weight whose bias the "
                f"adapter holds; {MERGE}"
            )
        for lora in targets:
            factor = scaling(case.config, lora.module, lora.a.entry.shape[0])
            total += factor * _delta_product(case, lora, consumer, beta)
    return total


def _value(case: Case, name: str) -> Tensor:
    """A parameter as the adapter holds it, or else the base."""
    for part in case.copies(name):
        if len(part.axes) < len(part.entry.shape):
            raise CheckpointError(f"{part.entry.name} holds some rows of {name} only; {MERGE}")
        return case.read(part)
    return case.base.value(name)


def _delta_product(case: Case, lora: Lora, consumer: Consumer, beta: Tensor) -> Tensor:
    """`B A β`: [out], in float64."""
    case.check_reads(lora, consumer)
    inner = algebra.bias_product(case.read(lora.a), beta, 1, consumer.spans)
    return algebra.matrix_vector(case.read(lora.b), inner)


def _add_to_factors(case: Case, edits: Edits, name: str, pairs: BiasPairs) -> None:
    """The base's own bias holds W β; what is left goes into the bias of B."""
    for norm_bias, consumer in pairs:
        for part in (*case.copies(consumer.parameter), *case.copies(norm_bias.parameter)):
            raise CheckpointError(
                f"the adapter holds {part.parameter}, but not {name}, into which the fold of the "
                f"base puts the product of a norm's bias with it; {MERGE}"
            )
        beta = case.base.value(norm_bias.parameter)
        for lora in case.targets(consumer.parameter):
            product = _delta_product(case, lora, consumer, beta)
            edit = (
                edits.by_key[lora.bias.entry.name]
                if lora.bias
                else edits.biases.setdefault(lora.target, Edit())
            )
            edit.steps.append(partial(algebra.fold_bias_, product=product))


def _complete(case: Case, edits: Edits) -> None:
    """PEFT gives all targets a bias or none."""
    needs = next(iter(edits.biases))
    for lora in case.tensors.loras:
        if lora.kind != "module":
            raise CheckpointError(
                f"{module_path(needs)}: the bias of its norm is folded, so B needs a bias "
                f"(lora_bias), which PEFT does not allow beside the target {lora.module}; {MERGE}"
            )
        if not lora.bias:
            edits.biases.setdefault(lora.target, Edit())


def _moved(case: Case, norm_bias: NormBias) -> Step:
    """What becomes of a norm's bias that the adapter holds: nothing is left of it, or β/g (E13)."""
    if norm_bias.folded:
        return Tensor.zero_
    gain = case.gain(norm_bias.gain)

    def carry(bias: Tensor) -> None:
        if not algebra.can_carry(bias, gain):
            raise FoldError(
                f"{norm_bias.parameter} of the adapter cannot be kept as β/g, because the gain "
                f"{norm_bias.gain.parameter} is zero, or next to it, where the bias is not (E13)"
            )
        algebra.carry_bias_(bias, gain)

    return carry
