"""vLLM's compiled graphs of decode steps with norm + linear as one call: the same results."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.fx import GraphModule
from torch.fx.experimental.proxy_tensor import make_fx

from flashnorm.engines.graph_writes import name_of
from flashnorm.engines.vllm_readers import take_over_
from flashnorm.engines.vllm_spelling import ADD_RMS, RMS

from . import vllm_toys
from .vllm_toys import assert_alike

N, ROWS, EPS = 64, 5, 1e-5


@pytest.fixture(autouse=True, scope="module")
def operations():
    vllm_toys.define()


def norm(x: Tensor, w: Tensor | None, *size: int) -> Tensor:
    return torch.ops.vllm_ir.rms_norm.default(x, w, EPS, *size)


def add_norm(x: Tensor, r: Tensor, w: Tensor | None) -> tuple[Tensor, Tensor]:
    return torch.ops.vllm_ir.fused_add_rms_norm.default(x, r, w, EPS)


def taken(program: Callable[..., Any], *args: Tensor) -> tuple[GraphModule, int]:
    """The graph of a program with our operator, which gives what the program gives."""
    module = make_fx(program, tracing_mode="fake")(*args)
    count = take_over_(module.graph)
    module.recompile()
    assert_alike(module(*args), program, list(args))
    return module, count


def left(module: GraphModule) -> list[str]:
    """What is left of norms and products."""
    names = (RMS, ADD_RMS, "aten.mm", "aten.addmm")
    return [name for node in module.graph.nodes if (name := name_of(node)) in names]


def weights(dtype: torch.dtype = torch.float32) -> list[Tensor]:
    torch.manual_seed(0)
    shapes = (ROWS, N), (N,), (96, N), (96,), (N, 96), (N,)
    return [torch.randn(shape).to(dtype) for shape in shapes]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_norms_go_into_what_reads_them(dtype):
    def program(x, g, up, c, down, h):
        a = torch.addmm(c, norm(x, g), up.t())
        b = torch.mm(norm(x, None), up.t())
        z, total = add_norm(torch.mm(a * b, down.permute(1, 0)), x, h)
        y = torch.mm(z, up.t())
        last, _ = add_norm(torch.mm(y, down.t()), total, h)
        return last, total

    module, count = taken(program, *weights(dtype))
    assert count == 3
    assert left(module) == ["aten.mm", "aten.mm", ADD_RMS]


def test_all_readers_of_a_norm_or_none():
    def both(x, g, up, c, down, h):
        z = norm(x, g)
        return torch.mm(z, up.t()), torch.addmm(c, z, up.t())

    def one(x, g, up, c, down, h):
        z = norm(x, g)
        return torch.mm(z, up.t()), z + 1

    module, count = taken(both, *weights())
    assert (count, left(module)) == (2, [])
    module, count = taken(one, *weights())
    assert (count, left(module)) == (0, [RMS, "aten.mm"])


def _written(x, g, up, c, down, h):
    y = x * 1.5
    z = norm(y, g)
    torch.ops.vllm.attend(x, y)
    return torch.mm(z, up.t()), y


def _part(x, g, up, c, down, h):
    return torch.mm(norm(x, g, N // 2), up.t())


def _on_the_right(x, g, up, c, down, h):
    return torch.mm(down.t(), norm(x[:, :], g).t())


def _not_transposed(x, g, up, c, down, h):
    return torch.mm(norm(x, g), down)


def _scaled(x, g, up, c, down, h):
    return torch.addmm(c, norm(x, g), up.t(), beta=2)


def _bias_of_rows(x, g, up, c, down, h):
    return torch.addmm(x.sum(1, keepdim=True), norm(x, g), up.t())


def _as_a_bias(x, g, up, c, down, h):
    return torch.addmm(norm(x, g), x @ up.t(), down.t())


def _not_turned(x, g, up, c, down, h):
    return torch.mm(norm(x, g), torch.ops.aten.permute(up[:N], [0, 1]))


KEPT = [_written, _part, _on_the_right, _not_transposed, _scaled, _bias_of_rows]


@pytest.mark.parametrize("program", [*KEPT, _as_a_bias, _not_turned])
def test_what_is_not_proven_stays(program):
    module, count = taken(program, *weights())
    assert count == 0
    assert RMS in left(module)
