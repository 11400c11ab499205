"""Running one model in another precision, down to the casts inside its forward.

`float64_truth` is what makes a float64 model compute in float64. Norms, rotary embeddings and
softmax of most models cast to float32 inside, which leaves an error floor near 1e-6 that hides
every smaller mistake.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from flashnorm.checkpoint.disk_model import on_disk
from flashnorm.checkpoint.disk_rows import DiskTensor
from flashnorm.compat.torch_names import TorchDispatchMode, tree_map_only
from flashnorm.errors import FlashNormError
from flashnorm.graph.packed import find_held, twin_of
from flashnorm.skeleton import place_
from flashnorm.verification.choices import CHOOSING, Choices
from flashnorm.verification.packed import computing, parts

WIDE = {
    torch.float16: torch.float64,
    torch.bfloat16: torch.float64,
    torch.float32: torch.float64,
    torch.complex32: torch.complex128,
    torch.complex64: torch.complex128,
}
_DTYPE_ARGUMENTS = ("dtype", "cpu_dtype", "cuda_dtype")


class Float64Mode(TorchDispatchMode):
    """Every operation on floating point numbers gives float64 (complex: complex128).

    A dtype argument that asks for less is answered with float64, whether it stands in a cast, a
    factory, a softmax or a reduction, and narrower tensors are widened where an operation reads
    them. `leaks` names the operations that could not be widened: writes in place into a narrower
    tensor that existed before the mode was entered. float8 and integer tensors are left alone,
    because there the rounding is the model's own arithmetic.
    """

    def __init__(self, choices: Choices | None = None) -> None:
        super().__init__()
        self.leaks: set[str] = set()
        self.choices = choices

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        schema = func._schema
        if schema.name == "aten::view" and schema.overload_name == "dtype":
            return func(*args, **(kwargs or {}))  # reinterprets bits, is no cast
        args, kwargs = _wide_dtypes(schema, args, kwargs or {})
        if schema.is_mutable:
            self._note_leaks(schema, args, kwargs)
            return func(*args, **kwargs)
        if any(argument.alias_info for argument in schema.arguments):
            return func(*args, **kwargs)  # a view keeps the memory of its base
        args, kwargs = tree_map_only(Tensor, _widen, (args, kwargs))
        result = _SUBSTITUTES.get(schema.name, func)(*args, **kwargs)
        if self.choices is not None and schema.name in CHOOSING:
            return self.choices.settle(schema.name, args, kwargs, result)
        return result

    def _note_leaks(self, schema: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Remember `schema` where it writes a wide value into a narrow tensor."""
        written: list[Tensor] = []
        read: list[Tensor] = []
        for argument, value in _bound(schema, args, kwargs):
            tensors = [value] if isinstance(value, Tensor) else []
            is_written = argument.alias_info is not None and argument.alias_info.is_write
            (written if is_written else read).extend(tensors)
        narrow = any(tensor.dtype in WIDE for tensor in written)
        if narrow and any(tensor.dtype in WIDE.values() for tensor in read):
            self.leaks.add(schema.name)


def _bound(schema: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterator[tuple[Any, Any]]:
    """Pairs (argument of the schema, value that was passed)."""
    yield from zip(schema.arguments, args, strict=False)
    for argument in schema.arguments[len(args) :]:
        if argument.name in kwargs:
            yield argument, kwargs[argument.name]


def _wide_dtypes(
    schema: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The same arguments, each narrow floating dtype among them replaced by its wide one."""
    positional = tuple(
        WIDE.get(value, value) if argument.name in _DTYPE_ARGUMENTS else value
        for argument, value in zip(schema.arguments, args, strict=False)
    )
    named = {
        name: WIDE.get(value, value) if name in _DTYPE_ARGUMENTS else value
        for name, value in kwargs.items()
    }
    return positional, named


def _widen(tensor: Tensor) -> Tensor:
    wide = WIDE.get(tensor.dtype)
    return tensor if wide is None else tensor.to(wide)


def _grouped_matmul(
    rows: Tensor, weights: Tensor, offs: Tensor | None = None, *_: Any, **__: Any
) -> Tensor:
    """`rows[group e] @ weights[e]`, rows [T, n] in groups that end at `offs` [E]: [T, k]."""
    if rows.ndim != 2 or weights.ndim != 3 or offs is None:
        raise FlashNormError(
            f"a grouped matrix product of shapes {tuple(rows.shape)} and {tuple(weights.shape)} "
            "has no float64 form here: load the model with experts_implementation='eager'"
        )
    result = rows.new_zeros(rows.shape[0], weights.shape[-1])
    start = 0
    for weight, end in zip(weights, offs.tolist(), strict=True):
        result[start:end] = rows[start:end] @ weight
        start = end
    return result


# Operations that torch has in narrow dtypes only.
_SUBSTITUTES = {"aten::_grouped_mm": _grouped_matmul}


@contextmanager
def float64_truth(choices: Choices | None = None) -> Iterator[Float64Mode]:
    """Within it, a model that was moved to float64 really computes in float64.

    Yields the mode, whose `leaks` are empty where that holds without exception. The default dtype
    is float64 inside, and gradients are off. `choices` records or follows discrete choices.
    """
    before = torch.get_default_dtype()
    mode = Float64Mode(choices)
    torch.set_default_dtype(torch.float64)
    try:
        with torch.no_grad(), mode:
            yield mode
    finally:
        torch.set_default_dtype(before)


@contextmanager
def in_dtype(
    model: nn.Module,
    dtype: torch.dtype,
    *,
    narrow_tables: bool = False,
    notes: list[str] | None = None,
) -> Iterator[nn.Module]:
    """The model with its floating parameters in `dtype`, and as it was when the context ends.

    The values are held twice meanwhile, nothing else is copied; ties survive; weights in files stay
    there, and are rounded when they are read. Buffers of the state
    dict follow the parameters. Other buffers (rotary frequencies, masks) are only ever widened: a
    model that is loaded in a half dtype keeps them in the dtype in which it made them. For models
    that do not, `narrow_tables` narrows them as well. Packed layers compute in it as `packed` says,
    which grows `notes` where one does not run in it.
    """
    held: list[tuple[Tensor, Tensor]] = []
    files = on_disk(model)
    layers = find_held(model)
    saved, packed = _saved(model, bool(layers)), parts(layers)
    try:
        for name, stays in files.items():
            place_(model, name, stays.again(dtype))
        for tensor in [*model.parameters(), *model.buffers()]:
            if isinstance(tensor, DiskTensor):
                continue
            if id(tensor) in packed or (
                tensor.dtype not in WIDE and tensor.dtype not in WIDE.values()
            ):
                continue
            goal = dtype if not tensor.is_complex() else _complex_of(dtype)
            narrows = torch.finfo(goal).eps > torch.finfo(tensor.dtype).eps
            kept = narrows and id(tensor) not in saved and not narrow_tables
            if goal == tensor.dtype or kept:
                continue
            held.append((tensor, tensor.data))
            tensor.data = tensor.data.to(goal)
        with computing(model, layers, dtype, notes):
            yield model
    finally:
        for tensor, data in held:
            tensor.data = data
        for name, stays in files.items():
            place_(model, name, stays)


def _saved(model: nn.Module, packed: bool) -> set[int]:
    """The tensors of the state dict, by id; of a packed model a twin is asked, because some layers
    pack their weights anew for it."""
    if not packed:
        return {id(tensor) for tensor in model.state_dict(keep_vars=True).values()}
    names = twin_of(model).state_dict(keep_vars=True).keys()
    own: dict[str, Tensor] = dict(model.named_parameters(remove_duplicate=False))
    own |= dict(model.named_buffers(remove_duplicate=False))
    return {id(tensor) for name, tensor in own.items() if name in names}


def _complex_of(dtype: torch.dtype) -> torch.dtype:
    return torch.complex128 if dtype == torch.float64 else torch.complex64


def parameter_dtype(model: nn.Module) -> torch.dtype:
    """The narrowest floating dtype of the parameters with two or more axes, float32 without any."""
    wide = [p for p in model.parameters() if p.ndim >= 2 and p.is_floating_point()]
    dtypes = {p.dtype for p in wide if p.dtype.itemsize > 1}
    return max(dtypes or {torch.float32}, key=lambda dtype: torch.finfo(dtype).eps)
