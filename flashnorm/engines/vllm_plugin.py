"""The plugin of vLLM: `--load-format flashnorm`.

vLLM calls `register` in each of its processes, by the entry point `vllm.general_plugins`. Nothing
of vLLM or torch is imported before that.
"""

from __future__ import annotations

from functools import cache

LOAD_FORMAT = "flashnorm"


@cache  # vLLM may ask for its plugins again
def register() -> None:
    """Let vLLM know the load format `flashnorm`."""
    from vllm.model_executor.model_loader import register_model_loader

    from flashnorm.engines.vllm_loader import FoldingLoader

    register_model_loader(LOAD_FORMAT)(FoldingLoader)
