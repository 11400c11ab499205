"""vLLM's traced graphs with our calls in them: the same results, and nothing taken unproven."""

from __future__ import annotations

import operator
import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx import GraphModule

from flashnorm.engines import vllm_graph, vllm_spelling
from flashnorm.engines.graph_writes import Writes, name_of
from flashnorm.engines.vllm_steps import tokens_of
from flashnorm.kernels.cpu import operators

from . import vllm_toys
from .vllm_toys import Linear, assert_alike, traced

pytestmark = pytest.mark.skipif(not operators.AVAILABLE, reason="no compiled kernels")
N, ROWS, EPS = 64, 5, 1e-5
rms, add_rms = vllm_toys.rms, vllm_toys.add_rms


@pytest.fixture(autouse=True, scope="module")
def operations():
    vllm_toys.define()


def norm(x: Tensor, w: Tensor | None) -> Tensor:
    return torch.ops.vllm_ir.rms_norm(x, w, EPS)


def add_norm(x: Tensor, r: Tensor, w: Tensor | None) -> tuple[Tensor, Tensor]:
    return torch.ops.vllm_ir.fused_add_rms_norm(x, r, w, EPS)


def glu(y: Tensor, act: Callable[[Tensor], Tensor] = F.silu) -> Tensor:
    half = y.shape[-1] // 2
    return act(y[..., :half]) * y[..., half:]


def weights_of(module: GraphModule, inputs: list[Any]) -> dict[Any, Tensor]:
    places = [node for node in module.graph.nodes if node.op == "placeholder"]
    handlers = [
        (node, each)
        for node, each in zip(places, inputs, strict=True)
        if isinstance(each, Tensor) and each.dim() == 0 and each.dtype == torch.int64
    ]
    return {node: vllm_toys.MATRICES[int(each)] for node, each in handlers}


def fused(program: Callable[..., Any], *args: Any) -> tuple[GraphModule, int]:
    """The graph of a program with our calls, which gives what the program gives."""
    module, inputs = traced(program, *args)
    tokens = tokens_of(module.graph)
    assert tokens is not None
    taken = vllm_graph.fuse_(module, weights_of(module, inputs), tokens.symbol)
    for rows in (ROWS, 2):
        assert_alike(module(*tokens.first(inputs, rows)), program, [x[:rows] for x in args])
    return module, taken


def calls(module: GraphModule, name: str) -> int:
    return sum(name_of(node) == name for node in module.graph.nodes)


def ours(module: GraphModule) -> list[tuple[str, str | None, bool]]:
    """The norm, the activation and whether a residual is added, of our calls."""
    nodes = [node for node in module.graph.nodes if node.target is vllm_graph.norm_product]
    return [(node.args[3], node.args[7], node.args[8] is not None) for node in nodes]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("bias", [False, True])
def test_a_block_is_four_calls(dtype, bias):
    torch.manual_seed(0)
    qkv, out = Linear(N, 96, bias, dtype), Linear(48, N, bias, dtype)
    up, down = Linear(N, 160, bias, dtype), Linear(80, N, bias, dtype)
    first, second, last = (torch.randn(N).to(dtype) for _ in range(3))

    def block(x: Tensor) -> tuple[Tensor, Tensor]:
        attended = torch.empty((len(x), 48), dtype=x.dtype)
        torch.ops.vllm.attend(qkv(norm(x, first)), attended)
        z, total = add_norm(out(attended), x, second)
        z, total = add_norm(down(glu(up(z))), total, last)
        return z, total

    module, taken = fused(block, torch.randn(ROWS, N).to(dtype))
    assert taken == 4
    assert ours(module) == [
        ("rms", None, False),
        ("none", None, True),
        ("rms", "silu", False),
        ("none", None, True),
    ]
    assert calls(module, vllm_spelling.ADD_RMS) == calls(module, vllm_spelling.PRODUCT) == 0
    assert calls(module, vllm_spelling.RMS) == 1  # the last one, which no product reads


def test_layer_norms_activations_and_sums_by_themselves():
    torch.manual_seed(1)
    up, down, head = Linear(N, 128, True), Linear(N, N), Linear(N, 32)
    gain, bias, other = torch.randn(N), torch.randn(N), torch.randn(N)

    def program(x: Tensor) -> Tensor:
        z = F.layer_norm(x, (N,), _like(gain, x), _like(bias, x), EPS)
        y = down(glu(up(z), lambda half: F.gelu(half, approximate="tanh")))
        z, total = add_norm(norm(y, gain), x, other)  # of a norm, as in Gemma
        return head(z), total

    module, taken = fused(program, torch.randn(ROWS, N))
    assert taken == 3
    assert ours(module) == [
        ("layer", "gelu_tanh", False),
        ("none", None, False),
        ("rms", None, False),
    ]


def test_rows_in_a_batch_of_one():
    """As vLLM runs models of transformers: x is [1, tokens, features]."""
    torch.manual_seed(4)
    up, down, w = Linear(N, 128, True), Linear(N, N), torch.randn(N)

    def program(x: Tensor) -> tuple[Tensor, Tensor]:
        h = x.view(1, -1, N)
        y = down(glu(up(F.layer_norm(h, (N,), _like(w, x), None, EPS))))
        z, total = add_norm(y, h, w)
        return down(z)[0], total[0]

    module, taken = fused(program, torch.randn(ROWS, N))
    assert taken == 3
    assert ours(module) == [("layer", "silu", False), ("none", None, True), ("rms", None, False)]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_gain_in_float32(dtype):
    """Gemma computes 1 + w in float32, whatever x is in."""
    torch.manual_seed(5)
    a, w = Linear(N, N, True, dtype), torch.randn(N).to(dtype)
    program = lambda x: a(norm(x, w.float() + 1.0))  # noqa: E731
    module, _ = fused(program, torch.randn(ROWS, N).to(dtype))
    assert ours(module) == [("rms", None, False)]


def test_types_that_no_kernel_reads():
    torch.manual_seed(6)
    a, w = Linear(N, N), torch.randn(N)
    module, _ = fused(lambda x: a(norm(x, w.double()).float()), torch.randn(ROWS, N))
    assert ours(module) == [PLAIN]
    module, _ = fused(lambda x: a(norm(x, w.double())), torch.randn(ROWS, N))
    assert ours(module) == [PLAIN]
    double = Linear(N, N, dtype=torch.float64)
    module, inputs = traced(lambda x: double(norm(x, w)), torch.randn(ROWS, N).double())
    assert vllm_graph.fuse_(module, weights_of(module, inputs), tokens_of(module.graph).symbol) == 0


# Programs that look like one to be fused, and what our calls then are.
def _read_elsewhere(x, a, b, w):
    z = norm(x, w)
    return a(z), z * 2


def _written_before_it_is_read(x, a, b, w):
    x = x * 1.5
    z = norm(x, w)
    x.mul_(3)
    return a(z), x


def _written_by_an_operator(x, a, b, w):
    x = x * 1.5
    z = norm(x, w)
    torch.ops.vllm.attend(z, x)
    return a(z), x


def _view_is_written(x, a, b, w):
    x = x * 1.5
    z = norm(x, w)
    x.view(-1, 2, N // 2)[:, 0] = 1
    return a(z), x


def _residual_is_written(x, a, b, w):
    r = x * 0.5
    y = a(x)
    r.add_(1)
    return add_norm(y, r, w)


def _residual_comes_later(x, a, b, w):
    y = a(x)
    return add_norm(y, x.tanh(), w)


def _product_is_read_twice(x, a, b, w):
    y = a(x)
    z, total = add_norm(y, x, w)
    return b(z), total, y * 2


def _part_of_a_norm(x, a, b, w):
    return a(torch.ops.vllm_ir.rms_norm(x, w, EPS, N // 2))


def _halves_the_other_way_round(x, a, b, w):
    y = a(x)
    return y[..., : N // 2] * F.silu(y[..., N // 2 :])


def _half_is_read_elsewhere(x, a, b, w):
    y = a(x)
    gate = y[..., : N // 2]
    return F.silu(gate) * y[..., N // 2 :], gate + 1


def _quarters(x, a, b, w):
    y = a(x)
    return F.silu(y[..., : N // 4]) * y[..., N // 4 : N // 2]


def _total_is_written(x, a, b, w):
    z, total = add_norm(x.sin(), x, w)
    total.mul_(2)
    return a(z), total


def _other_features(x, a, b, w):
    return a(F.layer_norm(x.view(-1, 2, N // 2), (N // 2,)).view(-1, N))


def _all_positions(x, a, b, w):
    return a(F.layer_norm(x, x.shape))


def _all_of_it_is_read_elsewhere(x, a, b, w):
    y = a(x)
    return glu(y), y * 2


def _memory_was_viewed_before(x, a, b, w):
    out = torch.empty((len(x), N), dtype=x.dtype)
    view = out.view(-1, N)
    torch.ops._C.onednn_mm(out, x, None, a.handler)
    return view + 0, norm(x, w)


def _rows_are_cut(x, a, b, w):
    return a(norm(x, w).view(2 * len(x), N // 2).reshape(-1, N)), a(norm(x, w).view(-1, N))


def _residual_of_another_type(x, a, b, w):
    z, total = add_norm(x, x.double() / 3, w)
    return a(z), total


def _copied_before_it_is_written(x, a, b, w):
    turned = (x * 1.5).t().contiguous().t().view(1, -1, N)
    out = torch.empty((1, len(x), N), dtype=x.dtype)
    rows = turned.reshape(-1, N)
    turned.mul_(2)
    torch.ops._C.onednn_mm(out, rows, None, a.handler)
    return out, turned


PLAIN = ("none", None, False)
KEPT = [
    (_read_elsewhere, [PLAIN]),
    (_written_before_it_is_read, [PLAIN]),
    (_written_by_an_operator, [PLAIN]),
    (_view_is_written, [PLAIN]),
    (_residual_is_written, [PLAIN]),
    (_residual_comes_later, [PLAIN]),
    (_product_is_read_twice, [PLAIN, ("rms", None, False)]),
    (_part_of_a_norm, [PLAIN]),
    (_halves_the_other_way_round, [PLAIN]),
    (_half_is_read_elsewhere, [PLAIN]),
    (_quarters, [PLAIN]),
    (_total_is_written, [PLAIN]),
    (_other_features, [PLAIN]),
    (_all_positions, [PLAIN]),
    (_all_of_it_is_read_elsewhere, [PLAIN]),
    (_memory_was_viewed_before, []),
    (_copied_before_it_is_written, []),
    (_residual_of_another_type, [PLAIN]),
    (_rows_are_cut, [PLAIN, ("rms", None, False)]),
]


@pytest.mark.parametrize(("program", "expected"), KEPT, ids=lambda v: getattr(v, "__name__", ""))
def test_what_is_not_proven_stays_with_the_graph(program, expected):
    torch.manual_seed(2)
    a, b, w = Linear(N, N), Linear(N, N), torch.randn(N)
    module, _ = fused(lambda x: program(x, a, b, w), torch.randn(ROWS, N))
    assert ours(module) == expected


def test_products_of_unknown_weights_stay():
    torch.manual_seed(3)
    a, w = Linear(N, N), torch.randn(N)
    module, inputs = traced(lambda x: a(norm(x, w)), torch.randn(ROWS, N))
    before = str(module.graph)
    assert vllm_graph.fuse_(module, {}, tokens_of(module.graph).symbol) == 0
    assert vllm_graph.fuse_(module, weights_of(module, inputs), "s0 + 1") == 0
    assert str(module.graph) == before


def _like(gain: Tensor | None, x: Tensor) -> Tensor | None:
    return None if gain is None else gain.to(x.dtype)


class Random:
    """A program of random operations on rows of N, some of which write."""

    def __init__(self, seed: int) -> None:
        self.choose = random.Random(seed)
        torch.manual_seed(seed)
        self.steps = [self._step() for _ in range(self.choose.randint(6, 14))]

    def _step(self) -> tuple[str, Any, list[float]]:
        kinds = ("product", "norm", "add_norm", "glu", "layer", "add", "write", "slice", "view")
        kind = self.choose.choices((*kinds, "attend"), [4, 4, 4, 2, 1, 1, 1, 1, 1, 1])[0]
        more = Linear(N, 2 * N if kind == "glu" else N, self.choose.random() < 0.3)
        gain = torch.randn(N) if self.choose.random() < 0.8 else None
        return kind, (more, gain), [self.choose.random() for _ in range(2)]

    def __call__(self, x: Tensor) -> tuple[Tensor, ...]:
        there = [x + 0]
        for kind, (linear, gain), (first, second) in self.steps:
            a = there[-1 - int(first * first * len(there))]
            b = there[-1 - int(second * len(there))]
            if kind == "product":
                there.append(linear(a))
            elif kind == "norm":
                there.append(norm(a, gain))
            elif kind == "add_norm":
                there += reversed(add_norm(a, b, gain))
            elif kind == "glu":
                there.append(glu(linear(a)))
            elif kind == "layer":
                there.append(F.layer_norm(a, (N,), _like(gain, a), None, EPS))
            elif kind == "add":
                there.append(a + b)
            elif kind == "write":
                a.mul_(1.25)
            elif kind == "slice":
                a[:, : N // 2] = 0.5
            elif kind == "view":
                there.append(a.view(-1, N))
            else:
                torch.ops.vllm.attend(b, a)
        return tuple(there[-3:])


@pytest.mark.parametrize("seed", range(60))
def test_random_programs_keep_their_results(seed):
    program = Random(seed)
    module, inputs = traced(program, torch.randn(ROWS, N))
    tokens = tokens_of(module.graph)
    vllm_graph.fuse_(module, weights_of(module, inputs), tokens.symbol)
    assert_alike(module(*tokens.first(inputs, ROWS)), program, [inputs[tokens.at]])


def _writers() -> dict[str, Callable[[Tensor], Any]]:
    def assigned(x):
        x[0] = 1

    def through_a_view(x):
        x.t()[0].zero_()

    def increased(x):
        x += 1

    return {
        "method": lambda x: x.add_(1),
        "function": lambda x: torch.relu_(x),
        "inplace": lambda x: F.relu(x, inplace=True),
        "inplace by place": lambda x: F.relu(x, True),
        "outs": lambda x: torch.frexp(x + 1, out=(x, torch.empty_like(x, dtype=torch.int32))),
        "out": lambda x: torch.add(x, 1, out=x),
        "setitem": assigned,
        "view": through_a_view,
        "iadd": increased,
        "operator": lambda x: torch.ops.aten.mul_.Tensor(x, 2),
        "packet": lambda x: torch.ops.aten.mul_(x, 2),
    }


@pytest.mark.parametrize("name", _writers())
def test_who_writes_is_seen(name):
    def program(x: Tensor) -> Tensor:
        x = x + 1
        _writers()[name](x)
        return x * 2

    module, _ = traced(program, torch.randn(ROWS, N))
    nodes = [node for node in module.graph.nodes if node.target is operator.add]
    last = next(node for node in module.graph.nodes if node.target is operator.mul)
    writes = Writes(module.graph, lambda node: False)
    assert not writes.keeps(nodes[0], nodes[0], last)
    placeholder = next(n for n in module.graph.nodes if n.op == "placeholder")
    assert writes.is_before(placeholder, last)
