"""How transformers reads GGUF files: names of tensors, and what it does to their numbers.

It has two ways. An architecture of the newer one has rules, as checkpoints of other kinds have; all
others have a processor for each tensor, which is given its numbers in float32.
"""

from __future__ import annotations

from typing import Any

from flashnorm.compat import Private

SEEN = ("5.23.0",)


def architectures() -> set[str]:
    """The names of all architectures that transformers reads from GGUF files."""
    from transformers.modeling_gguf_pytorch_utils import GGUF_SUPPORTED_ARCHITECTURES

    apart = {"general", "tokenizer"}  # of their table of keys, no architectures
    return {*GGUF_SUPPORTED_ARCHITECTURES, *_rules()} - apart


def _rules() -> dict[str, Any]:
    try:
        from transformers.integrations.gguf.gguf_conversion_mapping import GGUF_ARCHS
    except ImportError:  # a version that had processors alone
        return {}
    return GGUF_ARCHS  # type: ignore[no-any-return]


def conversions(architecture: str, config: Any) -> list[Any] | None:
    """The rules of an architecture for the tensors of a file; None where it has processors."""
    make = _rules().get(architecture)
    return None if make is None else list(make(config))


def description(file: str) -> dict[str, Any]:
    """What the metadata of a file says of its model, by the names that processors know."""
    from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

    return dict(load_gguf_checkpoint(file)["config"])


def processor(architecture: str, config: dict[str, Any]) -> Any:
    """What changes the numbers of tensors. `process(weights=, name=, ..)` has a name, or None."""
    from transformers.modeling_gguf_pytorch_utils import TENSOR_PROCESSORS, TensorProcessor

    return TENSOR_PROCESSORS.get(architecture, TensorProcessor)(config=config)


def parameter_names(model: Any, processor: Any) -> dict[str, str]:
    """Parameters of a model by the names that tensors have in a file."""
    from transformers.modeling_gguf_pytorch_utils import get_gguf_hf_weights_map

    return dict(get_gguf_hf_weights_map(model, processor))


def _private(theirs: str, ours: str, use: str) -> Private:
    return Private(f"transformers.{theirs}", ours, use, SEEN)


_OLDER = "modeling_gguf_pytorch_utils"

NAMES = (
    _private(f"{_OLDER}.GGUF_SUPPORTED_ARCHITECTURES", "architectures", "names, and two others"),
    _private(
        "integrations.gguf.gguf_conversion_mapping.GGUF_ARCHS",
        "conversions",
        "rules for one config, by the name of an architecture",
    ),
    _private(f"{_OLDER}.load_gguf_checkpoint", "description", "reads no tensor unless asked to"),
    _private(f"{_OLDER}.TENSOR_PROCESSORS", "processor", "classes by names of architectures"),
    _private(
        f"{_OLDER}.TensorProcessor",
        "processor",
        "`process` gives numbers and a name, or puts tensors into `parsed_parameters`",
    ),
    _private(f"{_OLDER}.get_gguf_hf_weights_map", "parameter_names", "full names, with suffixes"),
)
