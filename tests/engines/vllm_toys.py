"""vLLM's operations where vLLM is not installed, and programs in its words."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.fx import GraphModule

MATRICES: dict[int, Tensor] = {}  # by the number of a handler: W, as oneDNN keeps it


@cache
def define() -> None:
    """The operations, once; vLLM's own are those of its tests."""
    if "vllm" in sys.modules:
        pytest.skip("vLLM itself is loaded")
    for name, schema, run in (
        ("_C::onednn_mm", "(Tensor! out, Tensor x, Tensor? bias, Tensor handler) -> ()", multiply),
        ("vllm_ir::rms_norm", "(Tensor x, Tensor? w, float eps, int? size=None) -> Tensor", rms),
        (
            "vllm_ir::fused_add_rms_norm",
            "(Tensor x, Tensor r, Tensor? w, float eps, int? size=None) -> (Tensor, Tensor)",
            add_rms,
        ),
        ("vllm::attend", "(Tensor x, Tensor! out) -> ()", attend),
    ):
        torch.library.define(name, schema)
        torch.library.impl(name, "CompositeExplicitAutograd", run)
        if name.startswith("vllm_ir"):
            torch.library.register_fake(name, run)
        else:
            torch.library.register_fake(name, lambda *_: None)


def multiply(out: Tensor, x: Tensor, bias: Tensor | None, handler: Tensor) -> None:
    bias = None if bias is None else bias.to(x.dtype)
    out.copy_(torch.nn.functional.linear(x, MATRICES[int(handler)].to(x.dtype), bias))


def rms(x: Tensor, w: Tensor | None, eps: float, size: int | None = None) -> Tensor:
    wide = x if x.dtype == torch.float64 else x.float()
    w = w.double() if w is not None and x.dtype == torch.float64 else w
    part = wide if size is None else wide[..., :size]
    wide = wide * torch.rsqrt(part.pow(2).mean(-1, keepdim=True) + eps)
    return (wide if w is None else wide.to(w.dtype) * w).to(x.dtype)


def add_rms(
    x: Tensor, r: Tensor, w: Tensor | None, eps: float, size: int | None = None
) -> tuple[Tensor, Tensor]:
    total = x + r
    return rms(total, w, eps, size).to(x.dtype), total.to(x.dtype)


def attend(x: Tensor, out: Tensor) -> None:
    """Something opaque between products that writes to its last argument."""
    out.copy_(x[:, : out.shape[1]].tanh())


class Linear:
    """A linear layer as vLLM runs it on a CPU."""

    def __init__(self, n: int, k: int, bias: bool = False, dtype: torch.dtype = torch.float32):
        number = len(MATRICES)
        self.weight = (torch.randn(k, n) / n**0.5).to(dtype)
        self.bias = torch.randn(k).to(dtype) if bias else None
        self.handler = torch.tensor(number)
        MATRICES[number] = self.weight.clone()

    def __call__(self, x: Tensor) -> Tensor:
        out = torch.empty((*x.shape[:-1], len(self.weight)), dtype=x.dtype)
        torch.ops._C.onednn_mm(out, x.reshape(-1, self.weight.shape[1]), self.bias, self.handler)
        return out


def traced(program: Callable[..., Any], *args: Any) -> tuple[GraphModule, list[Any]]:
    """The graph that Dynamo makes of a program for any number of rows, and its arguments."""
    found: list[Any] = []

    def keep(module: GraphModule, inputs: Sequence[Any]) -> Any:
        found[:] = [module, list(inputs)]
        return module.forward

    torch.compiler.reset()
    for each in args:
        torch._dynamo.mark_dynamic(each, 0)
    torch.compile(program, backend=keep, dynamic=False, fullgraph=True)(*args)
    return found[0], found[1]


def assert_alike(found: Any, program: Callable[..., Any], args: list[Tensor]) -> None:
    """As near to the program in float64 as the program itself is."""
    listed = [y if isinstance(y, tuple) else (y,) for y in (found, program(*args))]
    truth = program(*(x.double() for x in args))
    truth = truth if isinstance(truth, tuple) else (truth,)
    for y, theirs, exact in zip(*map(tuple, listed), truth, strict=True):
        assert y.dtype == theirs.dtype
        error, other = ((each.double() - exact).abs().max() for each in (y, theirs))
        size = exact.abs().max() * torch.finfo(y.dtype).eps
        assert error <= 2 * other + 4 * size, f"{error:.1e}, the program itself {other:.1e}"
