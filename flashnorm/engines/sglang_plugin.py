"""The plugin of SGLang: strict checkpoints load, and plain ones are folded where it is asked for.

SGLang calls `register` in each of its processes, by the entry point `sglang.srt.plugins`, and its
hooks then call `folded_weights` around the iterator from which its own loader takes its tensors. So
everything that SGLang does with a tensor comes after the fold.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from flashnorm.engines.readers import Asked, why_not
from flashnorm.errors import FlashNormError

TARGET = "sglang.srt.model_loader.loader.DefaultModelLoader._get_weights_iterator"
FOLD = "FLASHNORM_FOLD"  # "1": checkpoints that were not folded are, while they are loaded

_log = logging.getLogger("flashnorm")


def register() -> None:
    """Hook into SGLang's loader."""
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    HookRegistry.register(TARGET, folded_weights, HookType.AROUND)


def folded_weights(
    original: Callable[..., Any], loader: Any, source: Any, **options: Any
) -> Iterable[Any]:
    """(name, tensor) of a checkpoint: of a strict fold with the gains that it left out, of a plain
    one folded (W* = W diag(g)) where the environment says FLASHNORM_FOLD=1; else as they are.

    Raises FlashNormError where a fold could not be told from the outside (`readers.why_not`).
    """
    from flashnorm.checkpoint.engine import open_streamed
    from flashnorm.checkpoint.source import read_config
    from flashnorm.marker import is_strict

    resolved = options.get("resolved_source")  # of the hub: where it was put
    path = Path(source.model_or_path if resolved is None else resolved.hf_folder)
    readable = (path / "config.json").is_file()
    if not readable or not (os.environ.get(FOLD) == "1" or is_strict(read_config(path))):
        return original(loader, source, **options)
    streamed = open_streamed(path)
    if streamed.plan is not None and (why := why_not(_asked(source.model_config))):
        raise FlashNormError(why)
    _log.info("flashnorm: %s: %s", path.name, streamed)
    return ((source.prefix + name, tensor) for name, tensor in streamed.tensors())


def _asked(model_config: Any) -> Asked:
    """What SGLang was asked to do with the model."""
    from sglang.srt.runtime_context import get_server_args

    options = get_server_args()
    draft = options.speculative_algorithm
    return Asked(
        adapters=bool(options.enable_lora or options.lora_paths),
        pooled=not model_config.is_generation,
        draft=str(draft).lower() if draft else "",
    )
