"""Weights that share x, laid out one behind the other: a library multiplies them at once.

    [W_1; W_2; ..] xᵀ = [W_1 xᵀ; W_2 xᵀ; ..]

The parameters stay what they are, by identity, name, shape and value: their memory becomes views of
one buffer. Whoever gives one of them other memory undoes it for that group, which is looked at
anew in every call.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import nn

from flashnorm.kernels.backend import has_memory
from flashnorm.kernels.weights import joined
from flashnorm.runtime.bound import Kernel


def lay_out_(kernels: Iterable[Kernel], moved: list[nn.Parameter]) -> None:
    """Move the weights of each kernel, and their biases, into one buffer, unless they were moved.

    moved: grows by the parameters. A group is for a moment in memory twice; whatever fails, every
    parameter has its values.
    """
    for kernel in kernels:
        for group in _groups(kernel):
            known = {id(parameter) for parameter in moved}
            if known.isdisjoint(map(id, group)) and joined(group) is None:
                moved += group
                _join_(group)


def _groups(kernel: Kernel) -> Iterator[list[nn.Parameter]]:
    """The weights, and the biases, of products with whole matrices of several modules."""
    if len(kernel.products) < 2:
        return
    parts = [product.rows for product in kernel.products]
    if kernel.packed or any(rows.turned or rows.length != rows.total for rows in parts):
        return
    for names in zip(*((rows.weight, rows.bias) for rows in parts), strict=True):
        if all(names):
            pairs = zip(kernel.modules, names, strict=True)
            group = [module._parameters[name] for module, name in pairs]
            if len({id(p) for p in group}) == len(group) and _alike(group):
                yield [p for p in group if p is not None]


def _alike(group: list[nn.Parameter | None]) -> bool:
    """Whether these are plain parameters of one dtype and device, dense and not of inference."""
    plain = [p for p in group if p is not None and has_memory(p) and p.is_contiguous()]
    if len(plain) < len(group) or any(p.is_inference() for p in plain):
        return False
    return len({(p.dtype, p.device, p.shape[1:]) for p in plain}) == 1


@torch.no_grad()
def _join_(group: list[nn.Parameter]) -> None:
    whole = torch.cat([parameter.data for parameter in group])
    for parameter, part in zip(group, whole.split([len(p) for p in group]), strict=True):
        parameter.data = part


@torch.no_grad()
def take_apart_(moved: Iterable[nn.Parameter]) -> None:
    """Undo `lay_out_`: every parameter has memory of its own again."""
    for parameter in moved:
        if len(parameter) and parameter.untyped_storage().nbytes() > parameter.nbytes:
            parameter.data = parameter.data.clone()
