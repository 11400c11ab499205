"""Linear layers with packed weights on a stand-in: each is the one operation that it is, x Wᵀ + c.

W is one whole parameter [k, n] of the graph, without memory, in the dtype of whatever x it meets;
what W is packed in is no tensor of the graph. `Graph.packed` says which parameters are such.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from flashnorm.compat.torch_names import (
    FakeTensorMode,
    is_traceable_wrapper_subclass,
    make_subclass,
    without_dispatch_modes,
)
from flashnorm.graph.record import Recorder
from flashnorm.graph.standin import Copies
from flashnorm.kernels.weights import DTYPES, dense
from flashnorm.quantized import layout, proof
from flashnorm.quantized.layout import Held

PRODUCT = "_flashnorm_product"


def find_held(model: nn.Module) -> dict[str, tuple[nn.Module, Held]]:
    """Every layer of a model that holds a packed weight in memory, by its first path.

    One of each kind has shown that its own code is a product.
    """
    found: dict[str, tuple[nn.Module, Held]] = {}
    shown: dict[Any, bool] = {}
    for path, module in model.named_modules():
        if isinstance(module, (AsProduct, torch.jit.ScriptModule)):
            continue
        try:
            held = layout.find(module)
        except RuntimeError:  # it asks for values, and there are none: fake tensors
            continue
        if not isinstance(held, Held) or any(t.is_meta for t in held.tensors(module)):
            continue
        if (kind := kind_of(module, held)) not in shown:
            shown[kind] = _is_shown(module, held)
        if shown[kind]:
            found[path] = (module, held)
    return found


def why_not_product(module: nn.Module, held: Held, dtype: torch.dtype) -> str:
    """Why a layer's own code, on a copy over the same memory, is not the product that `held` says,
    for x of a dtype; empty where it is."""
    weight, bias = held.read(module), named(module, held.bias)

    def forward(x: Tensor) -> Tensor:
        twin = twin_of(module)  # a new one each time: its code may pack its weight anew
        made: Tensor = (held.own or type(twin).forward)(twin, x)
        return made

    coarse = [_dtype(module, held), None if weight.scales is None else weight.scales.dtype]
    known = [d for d in coarse if d is not None and d.is_floating_point and d.itemsize > 1]
    widest = max(known, key=lambda d: torch.finfo(d).eps, default=None)
    return proof.why_not(weight, bias, forward, dtype, widest, held.rounds)


def twin_of(module: nn.Module) -> nn.Module:
    """Another module over the same memory, without hooks and without a forward of its own."""
    twin = Copies(_shown).of(module)
    vars(twin).pop("forward", None)
    for name in [name for name in vars(twin) if name.endswith("_hooks")]:
        vars(twin)[name].clear()
    return twin


def _shown(tensor: Tensor) -> Tensor:
    """Another object for the same numbers, so that what a forward puts into it stays its own."""
    if is_traceable_wrapper_subclass(tensor):
        return tensor
    made: Tensor = make_subclass(type(tensor), tensor.detach(), False)
    return made


def _dtype(module: nn.Module, held: Held) -> torch.dtype | None:
    weight = named(module, held.weight)
    return None if weight is None else weight.dtype


def kind_of(module: nn.Module, held: Held) -> Any:
    """What two layers have in common whose code does the same."""
    bias, weight = named(module, held.bias), held.read(module)
    own = None if bias is None else bias.dtype
    return type(module), held.origin, weight.format.name, _dtype(module, held), own


def _is_shown(module: nn.Module, held: Held) -> bool:
    """Whether a layer's own code is a product for x of any dtype that it takes."""
    scales = held.read(module).scales
    likely = [_dtype(module, held), None if scales is None else scales.dtype, *DTYPES]
    tried = [dtype for dtype in dict.fromkeys(likely) if dtype in DTYPES]
    return any(not why_not_product(module, held, dtype) for dtype in tried)


def named(module: nn.Module, name: str) -> Tensor | None:
    """A parameter or a buffer of a module."""
    found = module._parameters.get(name)
    return module._buffers.get(name) if found is None else found


class AsProduct(nn.Module):
    """What a packed layer is on a stand-in, beside its own class."""

    def forward(self, x: Tensor) -> Tensor:
        made: Tensor = vars(self)[PRODUCT](self, x)
        return made


@lru_cache(maxsize=256)
def _kind(kind: Any) -> type[nn.Module]:
    return type(kind.__name__, (AsProduct, kind), {"__module__": kind.__module__})


@dataclass
class Product:
    """`x Wᵀ + c` of a stand-in. like(tensor, dtype): the same parameter in the dtype of x;
    values(x): what the layer gives, where the operations of a stand-in have to give it."""

    weight: str
    bias: str
    like: Callable[[Tensor, torch.dtype], Tensor] | None = None
    values: Callable[[Tensor], Tensor] | None = None

    def __call__(self, module: nn.Module, x: Tensor) -> Tensor:
        y = F.linear(x, *(self._of(module, name, x.dtype) for name in (self.weight, self.bias)))
        if self.values is not None:
            with without_dispatch_modes():
                y.copy_(self.values(x))
        return y

    def _of(self, module: nn.Module, name: str, dtype: torch.dtype) -> Any:
        tensor = module._parameters[name] if name else None
        if tensor is None or tensor.dtype == dtype or self.like is None:
            return tensor
        return self.like(tensor, dtype)


def become_product(stand_in: nn.Module, held: Held, weight: Tensor, product: Product) -> None:
    """Make a stand-in of a packed layer its product, of a weight [k, n] under the name it has."""
    stand_in.__class__ = _kind(type(stand_in))  # type: ignore[arg-type]
    vars(stand_in)[PRODUCT] = product
    if held.forward is not None and held.forward(vars(stand_in).get("forward")):
        del vars(stand_in)["forward"]
    for name, tensor in ((held.weight, weight), (held.bias, named(stand_in, held.bias))):
        if name:
            stand_in._buffers.pop(name, None)
            stand_in._parameters[name] = tensor  # type: ignore[assignment]


@dataclass
class Packed:
    """The packed layers of one recording."""

    model: nn.Module
    copies: Copies
    mode: FakeTensorMode | None
    layers: dict[str, tuple[nn.Module, Held]] = field(default_factory=dict)
    weights: dict[str, Tensor] = field(default_factory=dict)
    alike: dict[tuple[int, torch.dtype], Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Say what stands for the tensors of packed layers, before anything else is copied."""
        self.layers = find_held(self.model)
        dtype = next((p.dtype for p in self.model.parameters() if _is_wide(p.dtype)), torch.float32)
        for path, (module, held) in self.layers.items():
            weight, bias = named(module, held.weight), named(module, held.bias)
            assert weight is not None
            # In the dtype that the tensor says it has, which an embedding tied to it would give.
            own = weight.dtype if _is_wide(weight.dtype) else dtype if bias is None else bias.dtype
            shape, device = held.read(module).shape, weight.device
            if not self.copies.has(weight):
                self.copies.stands_for(weight, self._without_memory(shape, own, device))
            self.weights[path] = self.copies.of(weight)
            for name in {*module._parameters, *module._buffers} - {held.weight, held.bias}:
                if (part := named(module, name)) is not None and not self.copies.has(part):
                    self.copies.stands_for(part, part)

    def _without_memory(self, shape: Any, dtype: torch.dtype, device: torch.device) -> Tensor:
        if self.mode is None:
            made = torch.zeros((), dtype=dtype, device=device).expand(shape)
        else:
            with self.mode:
                made = torch.empty(shape, dtype=dtype, device=device)
        # As weights of models do, which makes torch multiply all rows of x at once.
        return nn.Parameter(made, requires_grad=True)

    def install(self, recorder: Recorder) -> None:
        """Make products of all packed layers of the stand-in, and unhook who would unpack them."""
        known = {module for module, _ in self.layers.values()}
        for found in layout.unpacking(self.model):
            if known.issuperset(found.layers):
                self.copies.of(found.hooks).pop(found.key)

        def like(tensor: Tensor, dtype: torch.dtype) -> Tensor:
            key = (id(tensor), dtype)
            if key not in self.alike:
                with without_dispatch_modes():
                    self.alike[key] = self._without_memory(tensor.shape, dtype, tensor.device)
                recorder.alias(self.alike[key], recorder.value_of(tensor))
            return self.alike[key]

        for path, (module, held) in self.layers.items():
            values = None if self.mode is not None else _Values(module, held)
            product = Product(held.weight, held.bias, like, values)
            become_product(self.copies.of(module), held, self.weights[path], product)

    def declare(self, recorder: Recorder) -> None:
        """Enter weights and biases that are buffers, and say which parameters are packed."""
        graph = recorder.graph
        for path, (module, held) in self.layers.items():
            for name in filter(None, (held.weight, held.bias)):
                tensor, full = named(module, name), f"{path}.{name}" if path else name
                if name in module._buffers and tensor is not None:
                    graph.aliases[full] = (full,)
                    number = recorder.add(self.copies.of(tensor), "parameter", full)
                    graph.parameters[full] = number
            value = graph.values[recorder.value_of(self.weights[path])]
            graph.packed[value.parameter] = held.origin

    def hidden(self) -> set[str]:
        """The names of tensors that a packed weight is made of, beside its own and the bias."""
        found = set()
        for path, (module, held) in self.layers.items():
            names = {*module._parameters, *module._buffers} - {held.weight, held.bias}
            found |= {f"{path}.{name}" if path else name for name in names}
        return found

    def buffers(self) -> set[str]:
        """The names of buffers that are entered as parameters."""
        return {
            f"{path}.{name}" if path else name
            for path, (module, held) in self.layers.items()
            for name in (held.weight, held.bias)
            if name in module._buffers
        }


class _Values:
    """What a layer gives: `x Wᵀ + c`, from the tensors of the model, which are only read."""

    def __init__(self, module: nn.Module, held: Held) -> None:
        self.module, self.held = module, held

    def __call__(self, x: Tensor) -> Tensor:
        bias = named(self.module, self.held.bias)
        weight = dense(self.held.read(self.module), x.dtype)
        return F.linear(x, weight, None if bias is None else bias.detach().to(x.dtype))


def _is_wide(dtype: torch.dtype) -> bool:
    return dtype.is_floating_point and dtype.itemsize > 1
