"""vLLM's steps of few tokens on CPUs, with norm + linear as one call of our kernels.

vLLM traces a model once and compiles a graph for any number of tokens. Here that graph is compiled
twice: with our calls (`vllm_graph.fuse_`), and as it is. The first one runs steps of up to as many
tokens as it is faster for, which is measured while vLLM warms up; the second one, vLLM's own
operation for operation, runs all others.

Our kernels read a weight as it was loaded, and vLLM packs it for oneDNN and lets it go: here these
weights are held twice. Only vLLM imports this module.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor
from torch.fx import Graph, GraphModule
from torch.utils.weak import WeakIdKeyDictionary
from vllm.logger import init_logger

from flashnorm.compat.torch_names import graph_compiler
from flashnorm.engines import vllm_graph, vllm_names
from flashnorm.engines.vllm_steps import SECONDS, Compiled, Few, Steps, tokens_of
from flashnorm.errors import FlashNormError
from flashnorm.kernels.cpu import operators

logger = init_logger("vllm.flashnorm")
BACKEND = f"{__name__}.compile_graph"
# What lies between our calls is too little to be shared between threads.
SERIAL = {"cpp.threads": 1, "cpp.dynamic_threads": False}


@dataclass
class Asked:
    """What was asked for the model that is being loaded.

    most: the tokens of a step up to which our kernels run; None where that is measured, in so many
    seconds. inductor: vLLM's options of the compiler. weights: by the tensor of a handler.
    """

    most: int | None
    seconds: float
    inductor: dict[str, Any]
    weights: WeakIdKeyDictionary = field(default_factory=WeakIdKeyDictionary)

    def has(self, handler: Any) -> bool:
        """Whether a graph's argument is a handler whose weight is kept."""
        return isinstance(handler, Tensor) and handler in self.weights


_asked: Asked | None = None


def why_not(vllm_config: Any) -> str:
    """Why vLLM's steps cannot run on our kernels here; empty where they can."""
    if not operators.AVAILABLE:
        return "its kernels for CPUs cannot be called by a compiled graph here"
    if not vllm_names.is_traced_once(vllm_config.compilation_config):
        return "its kernels need vLLM's compiled graphs: no --enforce-eager, no other backend"
    return ""


@contextmanager
def kernels(vllm_config: Any, most: int | None) -> Iterator[None]:
    """A context in which a model is loaded whose steps run on our kernels where that is faster."""
    global _asked
    compilation = vllm_config.compilation_config
    # Shards wait for each other in every run: all of them have to measure as often.
    seconds = math.inf if vllm_config.parallel_config.world_size > 1 else SECONDS
    asked = _asked = Asked(most, seconds, dict(compilation.inductor_compile_config))
    compilation.backend = BACKEND
    vllm_names.keep_operations()
    vllm_names.compile_anew()
    with vllm_names.handlers_noted(asked.weights.__setitem__):
        yield


def compile_graph(module: GraphModule, inputs: Sequence[Any]) -> Compiled:
    """The backend of torch.compile that vLLM calls with the graph of a model."""
    if _asked is None:
        raise FlashNormError("vLLM compiles a model that flashnorm did not load")
    vllm_names.make_functional_(module.graph)
    few = None
    try:
        few = _few(module, inputs, _asked)
    except Exception:
        logger.warning("flashnorm: vLLM's own kernels run in a graph", exc_info=True)
    theirs = _compiled(module, inputs, _asked.inductor)
    if few is None:
        return theirs
    idle, say = vllm_names.is_warming_up, logger.info
    return Steps(few, theirs, _asked.most, idle, say, _asked.seconds)


def _few(module: GraphModule, inputs: Sequence[Any], asked: Asked) -> Few | None:
    """The graph of steps of few tokens; None where there is nothing for our calls in it."""
    tokens, ours = tokens_of(module.graph), GraphModule(module, Graph())
    if tokens is None:
        return None
    ours.graph.output(ours.graph.graph_copy(module.graph, {}))
    places = [node for node in ours.graph.nodes if node.op == "placeholder"]
    handlers = {at: each for at, each in enumerate(inputs) if asked.has(each)}
    weights = {places[at]: asked.weights.pop(handler) for at, handler in handlers.items()}
    products = vllm_graph.fuse_(ours, weights, tokens.symbol)
    logger.info("flashnorm: %d of %d products of a graph are its calls", products, len(weights))
    if not products:
        return None
    return Few(_compiled(ours, inputs, {**asked.inductor, **SERIAL}), tokens, handlers)


def _compiled(module: GraphModule, inputs: Sequence[Any], options: Mapping[str, Any]) -> Compiled:
    """A graph as vLLM has it compiled."""
    vllm_names.lower_(module.graph)
    module.recompile()
    compiled: Compiled = graph_compiler()(module, inputs, config_patches=dict(options))
    return compiled
