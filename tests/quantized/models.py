"""A small model of every kind of layer, and the ways in which its linear layers are quantized.

An origin is a function that packs the linear layers of a model in place; who calls it for a library
that is not installed skips the test.
"""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from flashnorm.graph.packed import named
from flashnorm.quantized import layout
from tests.quantized import columns

N, M, OUT = 64, 128, 128
EPS = 1e-5
GROUP = 32


class RMS(nn.Module):
    """As transformers' models have it: statistics in float32, then the dtype of x."""

    def __init__(self, n: int = N) -> None:
        super().__init__()
        self.weight = nn.Parameter(0.5 + torch.rand(n))

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float() if x.dtype.itemsize < 4 else x
        wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + EPS)
        return self.weight * wide.to(x.dtype)


class Gated(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate, self.up = nn.Linear(N, M, bias=False), nn.Linear(N, M, bias=False)
        self.down = nn.Linear(M, N, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.silu(self.gate(x)) * self.up(x))


class Merged(nn.Module):
    """Gate and up as the two halves of one layer."""

    def __init__(self) -> None:
        super().__init__()
        self.both, self.down = nn.Linear(N, 2 * M, bias=False), nn.Linear(M, N)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.both(x).chunk(2, -1)
        return self.down(F.gelu(gate, approximate="tanh") * up)


class Toy(nn.Module):
    """An RMSNorm before q, k and v with biases, a gated pair, a LayerNorm with a bias, a head."""

    def __init__(self, merged: bool = False) -> None:
        super().__init__()
        self.before = RMS()
        self.q, self.k, self.v = nn.Linear(N, N), nn.Linear(N, N, bias=False), nn.Linear(N, N)
        self.out = nn.Linear(3 * N, N)
        self.middle, self.mlp = RMS(), Merged() if merged else Gated()
        self.after = nn.LayerNorm(N, eps=EPS)
        self.head = nn.Linear(N, OUT)

    def forward(self, x: Tensor) -> Tensor:
        z = self.before(x)
        x = x + self.out(torch.cat([self.q(z), self.k(z), self.v(z)], -1))
        x = x + self.mlp(self.middle(x))
        return self.head(self.after(x))


def toy(dtype: torch.dtype = torch.float32, seed: int = 0, merged: bool = False) -> Toy:
    """With random weights, gains and biases."""
    torch.manual_seed(seed)
    model = Toy(merged)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(parameter, std=0.5)
        elif parameter.dim() == 2:  # rows of many sizes, so that their scales differ
            parameter.data *= torch.empty(len(parameter), 1).uniform_(0.3, 2)
    nn.init.uniform_(model.after.weight, 0.5, 1.5)
    return model.to(dtype).eval().requires_grad_(False)


def rows(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 7) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def linears(model: nn.Module) -> list[tuple[nn.Module, str, nn.Linear]]:
    """(owner, name, layer) of all linear layers."""
    found = []
    for path, module in list(model.named_modules()):
        if isinstance(module, nn.Linear):
            owner, _, name = path.rpartition(".")
            found.append((model.get_submodule(owner), name, module))
    return found


def dequantized(model: nn.Module) -> nn.Module:
    """The same model in float64, with dense weights in the place of packed ones."""
    twin = copy.deepcopy(model)
    for path, module in list(twin.named_modules()):
        held = layout.find(module)
        if isinstance(held, layout.Held):
            weight, bias = held.read(module).dequantized(), named(module, held.bias)
            dense = nn.Linear(weight.shape[1], weight.shape[0], bias is not None)
            dense.weight = nn.Parameter(weight)
            if bias is not None:
                dense.bias = nn.Parameter(bias.detach().clone())
            owner, _, name = path.rpartition(".")
            setattr(twin.get_submodule(owner), name, dense)
    return twin.double().eval()


def _torchao(make: Callable[[], object]) -> Callable[[nn.Module], nn.Module]:
    def quantize(model: nn.Module) -> nn.Module:
        pytest.importorskip("torchao", reason="torchao is not installed")
        from torchao.quantization import quantize_

        quantize_(model, make())
        return model

    return quantize


def _int8() -> object:
    from torchao.quantization import Int8WeightOnlyConfig

    return Int8WeightOnlyConfig(version=2)


def _int8_groups() -> object:
    from torchao.quantization import Int8WeightOnlyConfig
    from torchao.quantization.granularity import PerGroup

    return Int8WeightOnlyConfig(version=2, granularity=PerGroup(GROUP))


def _intx() -> object:
    from torchao.quantization import IntxWeightOnlyConfig
    from torchao.quantization.granularity import PerGroup
    from torchao.quantization.quant_primitives import MappingType

    return IntxWeightOnlyConfig(torch.int4, PerGroup(GROUP), MappingType.ASYMMETRIC)


def _float8() -> object:
    from torchao.quantization import Float8WeightOnlyConfig

    return Float8WeightOnlyConfig()


def _bitsandbytes(kind: str, nested: bool) -> Callable[[nn.Module], nn.Module]:
    def quantize(model: nn.Module) -> nn.Module:
        library = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
        for owner, name, layer in linears(model):
            made = library.nn.Linear4bit(
                layer.in_features,
                layer.out_features,
                layer.bias is not None,
                compress_statistics=nested,
                quant_type=kind,
            )
            made.weight = library.nn.Params4bit(
                layer.weight.data,
                requires_grad=False,
                compress_statistics=nested,
                quant_type=kind,
                module=made,
            )
            made.bias = layer.bias
            setattr(owner, name, made.to("cpu"))
        return model.eval().requires_grad_(False)

    return quantize


def _compressed(
    bits: int, kind: str, group: int | None, symmetric: bool, form: str
) -> Callable[[nn.Module], nn.Module]:
    def quantize(model: nn.Module) -> nn.Module:
        pytest.importorskip("compressed_tensors", reason="compressed-tensors is not installed")
        from tests.quantized.compressing import compress

        return compress(model, bits, kind, group, symmetric, form)

    return quantize


def _columns(kind: type[nn.Module]) -> Callable[[nn.Module], nn.Module]:
    def quantize(model: nn.Module) -> nn.Module:
        for owner, name, layer in linears(model):
            setattr(owner, name, kind.of(layer, GROUP))
        return model.eval()

    return quantize


ORIGINS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "torchao int8": _torchao(_int8),
    "torchao int8 groups": _torchao(_int8_groups),
    "torchao intx": _torchao(_intx),
    "torchao float8": _torchao(_float8),
    "bitsandbytes nf4": _bitsandbytes("nf4", False),
    "bitsandbytes nf4 nested": _bitsandbytes("nf4", True),
    "bitsandbytes fp4": _bitsandbytes("fp4", False),
    "compressed-tensors int4": _compressed(4, "int", GROUP, True, "pack-quantized"),
    "compressed-tensors int4 zeros": _compressed(4, "int", GROUP, False, "pack-quantized"),
    "compressed-tensors int8": _compressed(8, "int", None, True, "int-quantized"),
    "compressed-tensors int8 zeros": _compressed(8, "int", GROUP, False, "int-quantized"),
    "compressed-tensors float8": _compressed(8, "float", None, True, "float-quantized"),
    "gptq": _columns(columns.GptqLinear),
    "awq": _columns(columns.AwqLinear),
}
