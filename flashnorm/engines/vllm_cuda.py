"""A pass over vLLM's compiled graphs on GPUs: decode steps call our norm + linear.

vLLM compiles a graph for each range of tokens. Up to `most` tokens get a range of their own, and
there this pass runs, before vLLM lowers its norms. Only vLLM imports this module.
"""

from __future__ import annotations

from hashlib import sha256
from pathlib import Path
from typing import Any

from torch.fx import Graph
from vllm.compilation.passes.inductor_pass import InductorPass
from vllm.logger import init_logger

from flashnorm import __version__
from flashnorm.engines import graph_writes, vllm_names, vllm_readers, vllm_spelling

logger = init_logger("vllm.flashnorm")
PASS = "post_grad_custom_post_pass"
SOURCES = (__file__, graph_writes.__file__, vllm_readers.__file__, vllm_spelling.__file__)


class NormLinearPass(InductorPass):
    """`vllm_readers.take_over_` in graphs of up to so many tokens."""

    def __init__(self, most: int) -> None:
        self.most = most

    def __call__(self, graph: Graph) -> None:
        taken = vllm_readers.take_over_(graph)
        logger.info("flashnorm: %d products of a graph have their norm inside", taken)

    def is_applicable_for_range(self, compile_range: Any) -> bool:
        """Whether all steps of a range have few tokens."""
        return bool(compile_range.end <= self.most)

    def uuid(self) -> str:
        """What vLLM keeps compiled graphs by: the text of this pass."""
        found = sha256(f"{__version__} {self.most}".encode())
        for file in SOURCES:
            found.update(Path(file).read_bytes())
        return found.hexdigest()


def why_not(vllm_config: Any, most: int | None) -> str:
    """Why vLLM's decode steps cannot call our kernels here; empty where they can."""
    compilation = vllm_config.compilation_config
    if most is None:
        return (
            "nothing is measured on GPUs yet: say up to how many tokens of a step, as in "
            '{"kernels": 8}'
        )
    if not vllm_names.is_compiled_in_ranges(compilation):
        return "its kernels need vLLM's compiled graphs: no --enforce-eager, no other backend"
    if PASS in compilation.inductor_compile_config:
        return f"another {PASS} is set"
    return ""


def add_pass_(vllm_config: Any, most: int) -> None:
    """Let vLLM compile steps of up to `most` tokens by themselves, with our pass."""
    compilation = vllm_config.compilation_config
    ends = compilation.compile_ranges_endpoints or []
    compilation.compile_ranges_endpoints = sorted({*ends, most})
    compilation.inductor_compile_config[PASS] = NormLinearPass(most)
