"""Where Inductor, the compiler of torch.compile, lets us edit its graphs: one pass, after others.

It is put there while a graph with our operator is traced, for the thread that traces, so that a
process that compiles nothing loads nothing. A pass that is there already runs first, as it did.
Whoever gives torch.compile a pass of his own (`options={"post_grad_custom_post_pass": ...}`) has
that one alone.
"""

from __future__ import annotations

import logging
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from torch.fx import Graph

from flashnorm import __version__
from flashnorm.compat.torch_names import TracingContext, graph_passes, inductor_config
from flashnorm.runtime import counting, fusing

_log = logging.getLogger(__name__)
_passes = graph_passes()
# A pass of this kind is told whether a graph has no gradient; torch 2.11 has none.
_Aware: Any = getattr(_passes, "CustomInferenceAwareGraphPass", _passes.CustomGraphPass)
_AWARE = _Aware is not _passes.CustomGraphPass


class FuseNorms(_Aware):
    """Runs the pass that was there before, then ours."""

    def __init__(self, before: Any = None) -> None:
        self.before = before

    def __call__(self, graph: Graph, is_inference: bool | None = None) -> None:
        if self.before is not None:
            told = _AWARE and isinstance(self.before, _Aware)
            self.before(graph, is_inference) if told else self.before(graph)
        if _without_gradient() if is_inference is None else is_inference:
            fuse_(graph)

    def uuid(self) -> Any:
        """What Inductor keeps compiled graphs by; None, which keeps none, as the one before has."""
        if self.before is None:
            return _source()
        uuid = getattr(self.before, "uuid", lambda: None)()
        return (_source(), uuid) if uuid else None


def fuse_(graph: Graph) -> None:
    """`fusing.fuse_` and `counting.count_`; whatever goes wrong there, the graph is compiled."""
    try:
        if any(map(fusing.is_ours, graph.nodes)):
            saved = fusing.fuse_(graph) + counting.count_(graph)
            _log.debug("%d operations of a compiled graph are done by others", saved)
    except Exception:
        _log.warning("a compiled graph adds its residuals by themselves", exc_info=True)


def install() -> None:
    """Let Inductor run our pass, after those that it runs now. A second time changes nothing."""
    config = inductor_config()
    there = config.post_grad_custom_post_pass
    if isinstance(there, (list, tuple)):
        if not any(isinstance(each, FuseNorms) for each in there):
            config.post_grad_custom_post_pass = type(there)((*there, FuseNorms()))
    elif not isinstance(there, FuseNorms):
        config.post_grad_custom_post_pass = FuseNorms(there)


def _without_gradient() -> bool:
    """Whether the graph that is compiled now has no backward, where a pass is not told."""
    context = TracingContext.try_get()
    return getattr(getattr(context, "fw_metadata", None), "is_train", True) is False


def _source() -> str:
    """Our pass, by the text of it."""
    found = sha256(f"{__version__} {torch.__version__}".encode())
    for module in (__file__, fusing.__file__, counting.__file__):
        found.update(Path(module).read_bytes())
    return found.hexdigest()
