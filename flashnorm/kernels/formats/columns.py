"""Four bits in words of 32, held as [in, out]: GPTQ's and AWQ's files.

    W[j, i] = (q − zero) · scale,  zero 8 where none is given

gptq4: words [n / 8, k]; a word has features 8r .. 8r + 7 of an output, the first in the lowest
bits. awq4: words [n, k / 8]; a word has outputs 8c + 0, 2, 4, 6, 1, 3, 5, 7 of a feature.
"""

from __future__ import annotations

import torch
from torch import Tensor

from flashnorm.kernels.formats.groups import NIBBLE_ZERO, scaled, unfit_scales
from flashnorm.kernels.weights import Weight, WeightFormat, register

EACH = 8  # numbers in a word
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  # the output that the lowest, second, .. four bits are of


def _bits(words: Tensor) -> Tensor:
    """[.., 8] numbers of words [..], the lowest bits first."""
    return torch.stack([(words >> 4 * i) & 15 for i in range(EACH)], -1)


def _gptq(weight: Weight) -> Tensor:
    q = _bits(weight.values).permute(1, 0, 2).flatten(1)
    return scaled(weight, q[: weight.outputs, : weight.features], NIBBLE_ZERO)


def _awq(weight: Weight) -> Tensor:
    place = torch.tensor(AWQ_ORDER, device=weight.values.device).argsort()
    q = _bits(weight.values)[..., place].flatten(1).T
    return scaled(weight, q[: weight.outputs, : weight.features], NIBBLE_ZERO)


def _unfit(weight: Weight, rows: int, columns: int) -> str:
    words = weight.values
    if words.dtype != torch.int32 or words.dim() != 2 or not words.is_contiguous():
        return f"words are {words.dtype}, or are not dense"
    if words.shape[0] < rows or words.shape[1] < columns:
        return f"words are {list(words.shape)}; not [{rows}, {columns}]"
    return unfit_scales(weight)


def _gptq_unfit(weight: Weight) -> str:
    return _unfit(weight, -(-weight.features // EACH), weight.outputs)


def _awq_unfit(weight: Weight) -> str:
    return _unfit(weight, weight.features, -(-weight.outputs // EACH))


def _gptq_cut(words: Tensor, start: int, stop: int) -> Tensor:
    return words[:, start:stop]


def _awq_cut(words: Tensor, start: int, stop: int) -> Tensor:
    if start % EACH:
        raise ValueError(f"a part of the outputs begins at {start}, within a word")
    return words[:, start // EACH : -(-stop // EACH)]


GPTQ4 = register(WeightFormat("gptq4", _gptq, _gptq_unfit, 20, _gptq_cut))
AWQ4 = register(WeightFormat("awq4", _awq, _awq_unfit, 21, _awq_cut))
