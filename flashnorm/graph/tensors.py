"""What stands for the tensors of a model while its stand-in is recorded: fakes, or real copies."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from flashnorm.compat.torch_names import (
    FakeTensor,
    FakeTensorMode,
    is_traceable_wrapper_subclass,
    make_subclass,
)
from flashnorm.errors import TraceError

# Bytes of a tensor that is no parameter or buffer: a smaller one keeps its values, which code may
# ask for (a table of sizes, a step), a larger one becomes a fake without memory.
_SMALL = 1 << 20


class Tensors:
    """The stand-in of every tensor that is met, the same one each time.

    With a `mode` parameters and buffers become fakes. Without one, parameters stand for themselves
    until somebody wants to write into one (`copied`), and everything else is a copy.
    """

    def __init__(self, model: nn.Module, mode: FakeTensorMode | None, copied: bool = False) -> None:
        self.mode, self._copied = mode, copied
        self.device = main_device(model)
        self._parameters = {id(p) for p in model.parameters()}
        registered = [*model.parameters(), *model.buffers()]
        self._registered = {id(t) for t in registered}
        self._memory = {memory for t in registered if (memory := _memory(t)) is not None}
        self._storages: dict[int, torch.UntypedStorage] = {}

    def __call__(self, tensor: Tensor) -> Tensor:
        if isinstance(tensor, FakeTensor):
            return tensor
        if nn.parameter.is_lazy(tensor):
            raise TraceError(
                "a lazy module has no weights yet: run the model once on real inputs first"
            )
        if self.mode is not None:
            return self.fake(tensor) if self._is_better_fake(tensor) else self._copy(tensor)
        if id(tensor) in self._parameters and not self._copied:
            return _same_memory(tensor)
        return self._copy(tensor)

    def fake(self, tensor: Tensor) -> Tensor:
        """A fake of any tensor; one without memory (offloaded weights) is where the others are."""
        assert self.mode is not None
        if isinstance(tensor, FakeTensor):
            return tensor
        if not tensor.is_meta or self.device.type == "meta":
            return self.mode.from_tensor(tensor)
        with self.mode:
            made = torch.empty_strided(
                tensor.shape, tensor.stride(), dtype=tensor.dtype, device=self.device
            )
            return nn.Parameter(made, tensor.requires_grad) if _is_parameter(tensor) else made

    def _is_better_fake(self, tensor: Tensor) -> bool:
        plain = tensor.layout == torch.strided and not is_traceable_wrapper_subclass(tensor)
        large = not plain or tensor.numel() * tensor.element_size() > _SMALL
        return id(tensor) in self._registered or large or _memory(tensor) in self._memory

    @torch.no_grad()
    def _copy(self, tensor: Tensor) -> Tensor:
        """The same values in other memory, which two tensors share where the originals did."""
        if tensor.is_meta:
            return tensor
        if tensor.layout != torch.strided or type(tensor) not in (Tensor, nn.Parameter):
            return tensor.detach().clone()
        memory = tensor.untyped_storage()
        if memory._cdata not in self._storages:
            self._storages[memory._cdata] = memory.clone()
        made = torch.empty(0, dtype=tensor.dtype, device=tensor.device)
        made.set_(
            self._storages[memory._cdata], tensor.storage_offset(), tensor.shape, tensor.stride()
        )
        if _is_parameter(tensor):
            return nn.Parameter(made, tensor.requires_grad)
        return made.requires_grad_() if tensor.requires_grad and tensor.is_leaf else made

    def owned(self) -> Iterator[int]:
        """The memory that is not the user's."""
        return (storage._cdata for storage in self._storages.values())


def main_device(model: nn.Module) -> torch.device:
    """Where the inputs of a model go: to its first tensor that has memory anywhere."""
    devices = [t.device for held in (model.parameters(), model.buffers()) for t in held]
    return next((d for d in devices if d.type != "meta"), torch.device("cpu"))


def _is_parameter(tensor: Tensor) -> bool:
    return isinstance(tensor, nn.Parameter)


def place(tensor: Tensor) -> object:
    """What two tensors share that are the same numbers in the same memory."""
    memory = _memory(tensor)
    if memory is None or tensor.is_meta or isinstance(tensor, FakeTensor):
        return id(tensor)
    return memory, tensor.storage_offset(), tuple(tensor.shape), tensor.stride()


def _same_memory(tensor: Tensor) -> Tensor:
    """Another object for the same numbers, so that `.data = ` and its like change nothing."""
    made: Tensor = make_subclass(
        type(tensor),
        tensor.detach(),
        tensor.requires_grad,
    )
    return made


def overlaps(model: nn.Module) -> Iterator[tuple[Tensor, str]]:
    """Every parameter that lies, in part or otherwise, in the memory of another tensor, by name.

    So does one that has several of its elements in one place.
    """
    named = [*model.named_parameters(), *model.named_buffers()]
    by_memory: dict[int | None, list[tuple[str, Tensor]]] = defaultdict(list)
    for name, tensor in named:
        by_memory[None if isinstance(place(tensor), int) else _memory(tensor)].append(
            (name, tensor)
        )
    by_memory.pop(None, None)
    for held in by_memory.values():
        for name, tensor in held:
            others = [n for n, other in held if _overlap(tensor, other)]
            if isinstance(tensor, nn.Parameter) and (others or _repeats(tensor)):
                yield tensor, next(iter(others), name)


def _overlap(first: Tensor, second: Tensor) -> bool:
    """Whether the stretches of memory of two tensors meet, unless they are the same numbers."""
    if place(first) == place(second):
        return False
    (begin, end), (other, stop) = _stretch(first), _stretch(second)
    return begin < stop and other < end


def _stretch(tensor: Tensor) -> tuple[int, int]:
    """The first byte of a tensor in its storage, and the one after its last."""
    size, offset = tensor.element_size(), int(tensor.storage_offset())
    steps = int(sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True)))
    return offset * size, (offset + (steps + 1 if tensor.numel() else 0)) * size


def _repeats(tensor: Tensor) -> bool:
    sizes = zip(tensor.shape, tensor.stride(), strict=True)
    return any(size > 1 and stride == 0 for size, stride in sizes)


def _memory(tensor: Tensor) -> int | None:
    """The storage that a tensor lies in, where it has one of its own."""
    if tensor.layout != torch.strided or is_traceable_wrapper_subclass(tensor):
        return None
    return tensor.untyped_storage()._cdata
