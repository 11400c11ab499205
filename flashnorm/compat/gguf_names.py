"""How transformers reads GGUF files: names of tensors, and what it does to their numbers.

It has two ways. An architecture of the newer one has rules, as checkpoints of other kinds have; all
others have a processor for each tensor, which is given its numbers in float32.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from flashnorm.compat import Private

SEEN = ("5.23.0",)


def _rules() -> dict[str, Any]:
    try:
        from transformers.integrations.gguf.gguf_conversion_mapping import GGUF_ARCHS
    except ImportError:  # a version that had processors alone
        return {}
    return dict(GGUF_ARCHS)


def conversions(architecture: str, config: Any) -> list[Any] | None:
    """The rules of an architecture for the tensors of a file; None where it has processors."""
    make = _rules().get(architecture)
    return None if make is None else list(make(config))


def processor(architecture: str, config: dict[str, Any]) -> Any:
    """What changes the numbers of tensors. `process(weights=, name=, ..)` has a name, or None."""
    from transformers.modeling_gguf_pytorch_utils import TENSOR_PROCESSORS, TensorProcessor

    return TENSOR_PROCESSORS.get(architecture, TensorProcessor)(config=config)


def parameter_names(model: Any, processor: Any, tensors: Collection[str]) -> dict[str, str]:
    """Parameters of a model by the names of a file's tensors, some without `.weight`.

    The parts of a model are asked only where the model itself does not know a tensor: each takes as
    long, and what a part says of a tensor that the model knows is not heard.
    """
    from transformers.modeling_gguf_pytorch_utils import get_gguf_hf_weights_map

    found = get_gguf_hf_weights_map(_Whole(model), processor)
    if not all(name in found or name.removesuffix(".weight") in found for name in tensors):
        found = get_gguf_hf_weights_map(model, processor)
    return dict(found)


class _Whole:
    """A model without its parts."""

    def __init__(self, model: Any) -> None:
        self.config, self.state_dict = model.config, model.state_dict

    def named_children(self) -> list[Any]:
        return []


def _private(theirs: str, ours: str, use: str) -> Private:
    return Private(f"transformers.{theirs}", ours, use, SEEN)


_OLDER = "modeling_gguf_pytorch_utils"

NAMES = (
    _private(
        "integrations.gguf.gguf_conversion_mapping.GGUF_ARCHS",
        "conversions",
        "rules for one config, by the name of an architecture",
    ),
    _private(f"{_OLDER}.TENSOR_PROCESSORS", "processor", "classes by names of architectures"),
    _private(
        f"{_OLDER}.TensorProcessor",
        "processor",
        "`process` gives numbers and a name, or puts tensors into `parsed_parameters`",
    ),
    _private(f"{_OLDER}.get_gguf_hf_weights_map", "parameter_names", "full names, with suffixes"),
)
