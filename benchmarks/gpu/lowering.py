"""What torch.compile makes of a model for a GPU, on a machine that has none: its code is not run.

A graph is captured on the CPU, moved to a card in name (fake tensors), and lowered and scheduled by
Inductor as for that card; the code of its wrapper is what `code_for` returns. Attention is an
operation of its own, because which one torch takes depends on the device.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from functorch.compile import make_boxed_func
from torch import Tensor
from torch._guards import detect_fake_mode
from torch._inductor import compile_fx
from torch._inductor.graph import GraphLowering
from torch._inductor.runtime.hints import DeviceProperties
from torch.fx import GraphModule
from torch.fx.node import map_aggregate
from torch.fx.passes.fake_tensor_prop import FakeTensorProp
from torch.nn import functional as F

CARD = torch.device("cuda", 0)
# An H200, as far as Inductor asks.
HINTS = {
    "type": "cuda",
    "index": 0,
    "multi_processor_count": 132,
    "cc": 90,
    "major": 9,
    "regs_per_multiprocessor": 65536,
    "max_threads_per_multi_processor": 2048,
    "max_threads_per_block": 1024,
    "warp_size": 32,
}
PROPERTIES = SimpleNamespace(
    name="H200",
    minor=0,
    total_memory=140 * 2**30,
    shared_memory_per_block_optin=232448,
    shared_memory_per_multiprocessor=233472,
    L2_cache_size=50 * 2**20,
    gcnArchName="",
    **HINTS,
)

ATTEND = "flashnorm_nodes::attend"
torch.library.define(
    ATTEND,
    "(Tensor q, Tensor k, Tensor v, Tensor? mask) -> Tensor",
    tags=torch.Tag.flexible_layout,  # all layers share a mask
)


@torch.library.impl(ATTEND, "CompositeExplicitAutograd")
def _attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    return torch.empty_like(q.transpose(1, 2)).transpose(1, 2).zero_()


@torch.library.register_fake(ATTEND)
def _fake(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    b, heads, rows, width = q.shape  # laid out as torch's kernels for CUDA do
    return q.new_empty(b, rows, heads, width).transpose(1, 2)


def _sdpa(q: Any, k: Any, v: Any, attn_mask: Any = None, *_: Any, **__: Any) -> Tensor:
    return torch.ops.flashnorm_nodes.attend(q, k, v, attn_mask)


class _Lowered(Exception):
    """The code is known, and would be compiled next."""


def code_for(model: Callable[..., Any], *args: Any, **kwargs: Any) -> str:
    """The wrapper that Inductor writes for the one graph of a call, as if all were on a card."""
    found: list[str] = []

    def inner(graph: GraphModule, inputs: Sequence[Any], **options: Any) -> Any:
        found.append(_lowered(copy.deepcopy(graph), inputs, options))
        return make_boxed_func(graph.forward)

    def backend(graph: GraphModule, inputs: Sequence[Any]) -> Any:
        return compile_fx.compile_fx(graph, inputs, inner_compile=inner)

    torch._dynamo.reset()
    compiled = torch.compile(model, backend=backend, fullgraph=True, dynamic=False)
    with (
        torch.no_grad(),
        torch._functorch.config.patch(enable_autograd_cache=False),
        torch._inductor.config.patch(
            fx_graph_cache=False, fx_graph_remote_cache=False, compile_threads=1
        ),
        mock.patch.object(F, "scaled_dot_product_attention", _sdpa),
    ):
        compiled(*args, **kwargs)
    (code,) = found
    return code


def _lowered(graph: GraphModule, inputs: Sequence[Any], options: dict[str, Any]) -> str:
    code: list[str] = []
    codegen = GraphLowering.codegen

    def kept(self: GraphLowering) -> Any:
        wrapper = codegen(self)[0]
        code.append(getattr(wrapper, "value", wrapper))
        raise _Lowered

    with _card(), mock.patch.object(GraphLowering, "codegen", kept):
        try:
            compile_fx.compile_fx_inner(graph, _moved(graph, inputs), **options)
        except Exception:
            if not code:
                raise
    return code[0]


def _moved(graph: GraphModule, inputs: Sequence[Any]) -> list[Any]:
    """Inputs without memory that are on the card; the graph's own tensors become such as well."""
    for node in graph.graph.nodes:
        node.args = map_aggregate(node.args, _on_card)
        node.kwargs = map_aggregate(node.kwargs, _on_card)
        node.meta.pop("val", None)
        node.meta.pop("tensor_meta", None)
    mode = detect_fake_mode(inputs)
    with mode:
        moved = [_like(x) if isinstance(x, Tensor) else x for x in inputs]
    FakeTensorProp(graph, mode).propagate(*moved)
    return moved


def _on_card(argument: Any) -> Any:
    return CARD if isinstance(argument, torch.device) else argument


def _like(x: Tensor) -> Tensor:
    return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=CARD)


@contextmanager
def _card() -> Iterator[None]:
    """What Inductor asks of a card is answered; nothing is kept, because nothing is compiled."""
    hints = DeviceProperties(
        **{key: HINTS[key] for key in DeviceProperties._fields if key in HINTS}
    )
    answers = {
        "torch.cuda.is_available": True,
        "torch.cuda.device_count": 1,
        "torch.cuda.current_device": 0,
        "torch.cuda.get_device_capability": (9, 0),
        "torch.cuda.get_device_properties": PROPERTIES,
        "torch.cuda.get_rng_state": torch.zeros(16, dtype=torch.uint8),
        "torch.cuda.set_rng_state": None,
        "torch.cuda._exchange_device": 0,
        "torch.cuda._maybe_exchange_device": 0,
        "torch._subclasses.fake_tensor.init_gpu_context": None,
        "torch.utils._triton.has_triton": True,
        "torch.utils._triton.triton_backend": None,
        "torch.utils._triton.triton_hash_with_backend": "",
        "torch._inductor.scheduler.has_triton": True,
        "torch._inductor.runtime.hints.DeviceProperties.create": hints,
    }
    with ExitStack() as stack:
        for name, answer in answers.items():
            stack.enter_context(mock.patch(name, lambda *_, answer=answer: answer))
        yield
