"""How a quantization method of one's own takes part in from_pretrained of transformers."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any, NamedTuple

from flashnorm.compat import TRANSFORMERS, Private


class Quantizing(NamedTuple):
    """What a quantization method of one's own is made of: two classes, and who takes them."""

    config: Any
    quantizer: Any
    register_config: Callable[[str], Any]
    register_quantizer: Callable[[str], Any]


def quantizing() -> Quantizing:
    """How from_pretrained learns a method, and which classes it calls."""
    from transformers.quantizers import (
        HfQuantizer,
        register_quantization_config,
        register_quantizer,
    )
    from transformers.utils.quantization_config import QuantizationConfigMixin

    return Quantizing(
        QuantizationConfigMixin, HfQuantizer, register_quantization_config, register_quantizer
    )


def shards_by_zero3() -> bool:
    """Whether DeepSpeed ZeRO-3 shards the models that from_pretrained loads."""
    from transformers.integrations import is_deepspeed_zero3_enabled

    return bool(is_deepspeed_zero3_enabled())


def before_quantizer(check: Callable[[Any, Any, str | None], None]) -> None:
    """Call check(config, quantization_config, gguf_file) before from_pretrained goes by them.

    What it raises is what from_pretrained raises.
    """
    from transformers import modeling_utils
    from transformers.modeling_utils import get_hf_quantizer as chosen

    @wraps(chosen)
    def get_hf_quantizer(config: Any, asked: Any, *rest: Any, **more: Any) -> Any:
        check(config, asked, more.get("gguf_file"))
        return chosen(config, asked, *rest, **more)

    modeling_utils.get_hf_quantizer = get_hf_quantizer


def _private(theirs: str, ours: str, use: str) -> Private:
    return Private(f"transformers.{theirs}", ours, use, TRANSFORMERS)


NAMES = (
    _private(
        "utils.quantization_config.QuantizationConfigMixin",
        "quantizing",
        "what quantization_config may be, if its quant_method is registered",
    ),
    _private(
        "quantizers.HfQuantizer",
        "quantizing",
        "its methods are called with the config, and with the model before and after loading",
    ),
    _private(
        "quantizers.register_quantization_config", "quantizing", "a decorator of the config's class"
    ),
    _private("quantizers.register_quantizer", "quantizing", "one of the quantizer's class"),
    _private(
        "integrations.is_deepspeed_zero3_enabled", "shards_by_zero3", "false without DeepSpeed"
    ),
    _private(
        "modeling_utils.get_hf_quantizer",
        "before_quantizer",
        "from_pretrained asks it once, with config, quantization_config and gguf_file=",
    ),
)
