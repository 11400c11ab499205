"""What the engine of vLLM is asked for, under names that say what it is for.

Tested with vLLM 0.32. Only modules that vLLM imports call these.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor
from torch.fx import Graph

from flashnorm.engines.graph_writes import name_of


def is_traced_once(compilation: Any) -> bool:
    """Whether vLLM traces a model once and lets Inductor compile all of it."""
    from vllm.config import CompilationMode

    return bool(
        compilation.mode == CompilationMode.DYNAMO_TRACE_ONCE and compilation.backend == "inductor"
    )


def is_compiled_in_ranges(compilation: Any) -> bool:
    """Whether vLLM compiles the pieces of a model for ranges of tokens, as on GPUs."""
    from vllm.config import CompilationMode

    return bool(
        compilation.mode == CompilationMode.VLLM_COMPILE and compilation.backend in ("", "inductor")
    )


def keep_operations() -> None:
    """Let vLLM's own operations (norms) stand in a traced graph by their names."""
    from vllm import ir

    ir.set_default_torch_wrap(True)


def compile_anew() -> None:
    """Let vLLM compile at every start: it stores what its own compilers return, and no more."""
    from vllm import envs

    envs.VLLM_USE_AOT_COMPILE = False  # found before what the environment says


@contextmanager
def handlers_noted(note: Callable[[Tensor, Tensor], None]) -> Iterator[None]:
    """A context in which note(handler, weight) is called wherever vLLM packs a weight for oneDNN.

    handler: the tensor that a traced graph passes to `_C.onednn_mm`; weight: [k, n] as loaded.
    """
    from vllm import _custom_ops

    create = _custom_ops.create_onednn_mm

    def create_onednn_mm(turned: Tensor, *rest: Any, **more: Any) -> Any:
        handler = create(turned, *rest, **more)
        note(handler.handler_tensor, turned.t())
        return handler

    _custom_ops.create_onednn_mm = create_onednn_mm
    try:
        yield
    finally:
        _custom_ops.create_onednn_mm = create


def make_functional_(graph: Graph) -> None:
    """vLLM's operations that may reuse the memory of their arguments, by those that do not."""
    for node, operation in _operations(graph):
        node.target = operation.torch_op


def lower_(graph: Graph) -> None:
    """vLLM's operations by the implementation that vLLM chooses for them, as it does itself."""
    for node, operation in _operations(graph):
        node.target = _implementation(operation)


def _operations(graph: Graph) -> Iterator[tuple[Any, Any]]:
    from vllm.ir.op import IrOp

    for node in graph.nodes:
        room, _, name = name_of(node).partition(".")
        if room == "vllm_ir" and name in IrOp.registry:
            yield node, IrOp.registry[name]


def _implementation(operation: Any) -> Callable[..., Any]:
    def chosen(*args: Any, **kwargs: Any) -> Any:
        return operation.dispatch(*args, **kwargs).func_impl_fn(*args, **kwargs)

    chosen.__name__ = chosen.__qualname__ = operation.name
    return chosen


def is_warming_up() -> bool:
    """Whether vLLM runs a model without sequences, whose caches nothing is written to."""
    from vllm.forward_context import get_forward_context, is_forward_context_available

    return is_forward_context_available() and get_forward_context().attn_metadata is None
