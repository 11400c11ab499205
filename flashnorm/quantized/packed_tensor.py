"""A tensor whose numbers stay packed: bytes inside, [.., k, n] of a floating dtype outside.

Only what is asked for is decoded: a matrix is multiplied in blocks of rows, an embedding decodes
the rows of its tokens. The numbers are those of the blocks, rounded once to the dtype.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from flashnorm.compat.torch_names import make_wrapper_subclass
from flashnorm.errors import FlashNormError
from flashnorm.kernels.weights import Weight
from flashnorm.quantized import layout
from flashnorm.quantized.ggml import kind
from flashnorm.quantized.row_tensor import RowTensor

MEND = "flashnorm.dequantize_(model) makes the weights of a model plain"


class PackedTensor(RowTensor):
    """A weight in blocks, used as a tensor [.., k, n] of a floating dtype; it has no gradient.

        W[r, :] = decode(values[r, :]), rounded once to the dtype

    held: the packed rows. Operations that know rows decode what they need, all others the whole
    tensor.
    """

    held: Weight
    WHAT = "a packed weight"
    MEND = MEND

    @staticmethod
    def __new__(
        cls, held: Weight, shape: Sequence[int], dtype: torch.dtype, turned: bool = False
    ) -> PackedTensor:
        if held.scales is not None or held.values.shape[0] != held.outputs:
            raise ValueError(f"{held.format} of {list(held.values.shape)} has no rows of its own")
        if not dtype.is_floating_point:
            raise ValueError(f"a packed weight has a floating dtype, not {dtype}")
        with torch.inference_mode(held.values.is_inference()):  # as its bytes are, for views
            made: PackedTensor = make_wrapper_subclass(
                cls, torch.Size(shape), dtype=dtype, device=held.values.device, requires_grad=False
            )
        made.held, made.turned = held, turned
        return made

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        turned = ", turned" if self.turned else ""
        name = self.held.format.name
        return f"PackedTensor({list(self.shape)}, {self.dtype}, {name}{turned}, {self.device})"

    @property
    def packed(self) -> Tensor:
        """The bytes, [rows, bytes of a row], uint8."""
        return self.held.values

    def again(
        self,
        dtype: torch.dtype | None = None,
        device: Any = None,
        non_blocking: bool = False,
        copied: bool = False,
    ) -> PackedTensor:
        """A floating dtype changes what the numbers are rounded to, and no byte."""
        values = self.packed.clone() if copied else self.packed
        return self.like(values.to(device, non_blocking=non_blocking), dtype)

    def write_(self, source: Tensor, non_blocking: bool = False) -> PackedTensor:
        """Only the bytes of the same format: what a state dict of such a model holds."""
        if not isinstance(source, PackedTensor):
            raise FlashNormError(
                f"numbers cannot be written into a packed weight of {self.held.format.name}: "
                f"{MEND}, and so does load_state_dict(.., assign=True) with the tensors that it is "
                "given"
            )
        ours, theirs = self.held, source.held
        if (ours.format, self.shape, self.turned) != (theirs.format, source.shape, source.turned):
            raise FlashNormError(f"{source!r} cannot be written into {self!r}: another format")
        self.packed.copy_(source.packed, non_blocking=non_blocking)
        return self

    def like(self, values: Tensor, dtype: torch.dtype | None = None) -> PackedTensor:
        """The same of other bytes, or in another dtype."""
        held = self.held._replace(values=values)
        return PackedTensor(held, self.shape, dtype or self.dtype, self.turned)

    def __deepcopy__(self, memo: dict[int, Any]) -> PackedTensor:
        if id(self) not in memo:
            copied = self.like(self.packed.clone())
            memo[id(self)] = _parameter(copied) if isinstance(self, nn.Parameter) else copied
        found: PackedTensor = memo[id(self)]
        return found

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        held, is_parameter = self.held, isinstance(self, nn.Parameter)
        parts = (held.values, held.format.name, held.features, list(self.shape))
        return rebuilt, (*parts, self.dtype, self.turned, is_parameter)

    def __tensor_flatten__(self) -> tuple[list[str], Any]:
        held = self.held
        return ["packed"], (held.format.name, held.features, self.dtype, self.turned)

    @staticmethod
    def __tensor_unflatten__(
        inner: dict[str, Tensor], context: Any, outer_size: Any, outer_stride: Any
    ) -> PackedTensor:
        name, features, dtype, turned = context
        return rebuilt(inner["packed"], name, features, outer_size, dtype, turned)


def rebuilt(
    values: Tensor,
    name: str,
    features: int,
    shape: Sequence[int],
    dtype: torch.dtype,
    turned: bool = False,
    is_parameter: bool = False,
) -> PackedTensor:
    """A packed weight of its parts: the bytes, the name of their format, and what it is used as."""
    held = Weight(values, kind(name).format, None, values.shape[0], features)
    made = PackedTensor(held, shape, dtype, turned)
    return _parameter(made) if is_parameter else made


def _parameter(made: PackedTensor) -> PackedTensor:
    parameter: Any = nn.Parameter(made, requires_grad=False)
    return parameter


def _layout(module: nn.Module) -> layout.Held | None:
    """A module whose only parameters are a packed matrix `weight`, and perhaps a `bias`."""
    weight = getattr(module, "weight", None)
    if not isinstance(weight, PackedTensor) or isinstance(module, nn.Embedding):
        return None
    if weight.dim() != 2 or {*module._parameters} - {"weight", "bias"}:
        return None
    return layout.Held(
        origin=f"GGUF, {weight.held.format.name}",
        weight="weight",
        bias="bias" if getattr(module, "bias", None) is not None else "",
        tensors=lambda module: [_weight(module).packed],
        read=lambda module: _weight(module).held,
    )


def _weight(module: nn.Module) -> PackedTensor:
    """Raises AttributeError where it is not packed any more."""
    weight = module.weight
    if not isinstance(weight, PackedTensor):
        raise AttributeError("its weight is plain now")
    return weight


layout.register(_layout)
torch.serialization.add_safe_globals([rebuilt])
