"""`FlashNormConfig`: transformers folds and accelerates a model while it loads it.

transformers has one place that is asked after loading, its quantizers. Ours quantizes nothing, and
leaves nothing behind: the model and its config are as without it.
"""

from __future__ import annotations

import os
from typing import Any

from flashnorm.compat.quantizer_names import before_quantizer, quantizing, shards_by_zero3
from flashnorm.engines.loaded import prepare_
from flashnorm.errors import FlashNormError
from flashnorm.extras import need
from flashnorm.runtime.package.options import Package
from flashnorm.undo import UNDO

need("flashnorm.FlashNormConfig", "transformers")  # whose classes these are

METHOD = "flashnorm"
_theirs = quantizing()
_Config: Any = _theirs.config
_Quantizer: Any = _theirs.quantizer
AFTERWARDS = (
    "{} cannot be loaded with a FlashNormConfig: load it without one, and call "
    "flashnorm.accelerate_(model), or use flashnorm.AutoFlashNormForCausalLM"
)
ADAPTER = (
    "an adapter would be loaded onto a base that was just folded, and it was trained on the "
    "original one: load it with fold=False, or fold both on disk (flashnorm fold, flashnorm "
    "fold-adapter)"
)


@_theirs.register_config(METHOD)
class FlashNormConfig(_Config):
    """What to do with a model once it is loaded, as `quantization_config` of any from_pretrained.

    `fold` folds the gains (`fold_`), with `untie` also into a tied head; `accelerate` lets it run
    on kernels (`accelerate_`), where `training` and `package` are that function's. Nothing is
    quantized: the model, its config and what `save_pretrained` writes are those of a model that was
    loaded without it, and folded where that was asked for. Where a model cannot be folded or
    accelerated, a warning says why and it is as transformers loaded it; `strict` raises instead.

    from_pretrained raises FlashNormError for what it cannot be combined with: checkpoints that are
    quantized, GGUF files, DeepSpeed ZeRO-3, and adapters on a base that is folded meanwhile.
    Raises TypeError for options that are not known.
    """

    def __init__(
        self,
        *,
        fold: bool = False,
        untie: bool = False,
        accelerate: bool = True,
        training: bool = False,
        package: str | os.PathLike[str] | Package | None = None,
        strict: bool = False,
        quant_method: str = METHOD,
    ) -> None:
        if untie and not fold:
            raise ValueError("untie=True is for fold=True: a head is untied to be folded into")
        if (package or training) and not accelerate:
            raise ValueError("package and training are for accelerate=True")
        self.quant_method = quant_method
        self.fold, self.untie, self.accelerate = fold, untie, accelerate
        self.training, self.package, self.strict = training, package, strict

    def to_dict(self) -> dict[str, Any]:
        """The options, as JSON takes them."""
        package = self.package
        if isinstance(package, Package):
            package = package.directory
        return {**vars(self), "package": None if package is None else os.fspath(package)}


@_theirs.register_quantizer(METHOD)
class FlashNormQuantizer(_Quantizer):
    """What transformers calls before and after it loads a model with a FlashNormConfig."""

    def __init__(self, quantization_config: FlashNormConfig, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self.folded = False

    def validate_environment(self, *args: Any, **kwargs: Any) -> None:
        """Raise where transformers would load a quantized model in another way than a plain one."""
        if shards_by_zero3():
            raise FlashNormError(AFTERWARDS.format("a model that DeepSpeed ZeRO-3 shards"))

    def update_attn_implementation(self, config: Any) -> Any:
        """The first to see the config: models ask it whether they are quantized."""
        del config.quantization_config
        return config

    def preprocess_model(self, model: Any, dtype: Any = None, **kwargs: Any) -> None:
        """Nothing: the model is not quantized."""

    def param_needs_quantization(self, model: Any, param_name: str, **kwargs: Any) -> bool:
        """No. Asked again after the fold, it is of an adapter's weight: then raise."""
        if self.folded:
            raise FlashNormError(ADAPTER)
        return False

    def postprocess_model(self, model: Any, **kwargs: Any) -> None:
        """Forget this quantizer, then fold and accelerate."""
        del model.hf_quantizer
        if hasattr(model.config, "quantization_config"):
            del model.config.quantization_config
        prepare_(model, self.quantization_config)
        self.folded = UNDO in vars(model)

    def is_serializable(self) -> bool:
        """Never asked: no model has it once it is loaded."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Never asked either."""
        return True


def _check(config: Any, asked: Any, gguf_file: str | None) -> None:
    if not isinstance(asked, FlashNormConfig):
        return
    if gguf_file is not None:
        raise FlashNormError(AFTERWARDS.format(f"the GGUF file {gguf_file}"))
    for part in (config, config.get_text_config(decoder=True)):
        if (own := getattr(part, "quantization_config", None)) is not None:
            method = own.get("quant_method") if isinstance(own, dict) else own.quant_method
            kind = getattr(method, "value", method)
            raise FlashNormError(AFTERWARDS.format(f"a checkpoint that is quantized ({kind})"))


before_quantizer(_check)
