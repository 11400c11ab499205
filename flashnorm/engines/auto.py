"""`AutoFlashNormForCausalLM`: transformers' automatic class, and then `accelerate_`."""

from __future__ import annotations

import os
from typing import Any

from flashnorm.engines.config import FlashNormConfig
from flashnorm.engines.loaded import prepare_


class AutoFlashNormForCausalLM:
    """AutoModelForCausalLM, whose models run on fused kernels.

    Raises what transformers raises; TypeError for a FlashNormConfig in the wrong argument;
    FlashNormError, with `strict`, for a model that cannot be folded or accelerated.
    """

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike[str],
        *model_args: Any,
        flashnorm: FlashNormConfig | None = None,
        **kwargs: Any,
    ) -> Any:
        """`AutoModelForCausalLM.from_pretrained` with the same arguments, then `accelerate_`.

        `flashnorm` says what else: FlashNormConfig(fold=True, package="DIR", ...). Unlike
        `quantization_config=FlashNormConfig(...)` this takes checkpoints that are quantized, GGUF
        files and adapters. A model that cannot be accelerated is returned as transformers loaded
        it, with a warning; FlashNormConfig(strict=True) raises FlashNormError instead.
        """
        from transformers import AutoModelForCausalLM

        if isinstance(kwargs.get("quantization_config"), FlashNormConfig):
            raise TypeError("give the FlashNormConfig as flashnorm=, not as quantization_config=")
        loaded = AutoModelForCausalLM.from_pretrained(
            pretrained_model_name_or_path, *model_args, **kwargs
        )
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        prepare_(model, flashnorm or FlashNormConfig())
        return loaded
