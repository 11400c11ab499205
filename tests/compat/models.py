"""Models and configs of transformers."""

from __future__ import annotations

import contextlib
from tempfile import TemporaryDirectory
from typing import Any

import torch
import transformers
from torch import nn

from flashnorm.compat import quantizer_names, transformers_names
from tests.compat.checks import checks

SIZES = {
    "hidden_size": 8,
    "intermediate_size": 16,
    "vocab_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
}


def _ignore(*_: Any, **__: Any) -> None:
    pass


def llama() -> Any:
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES))


@checks("transformers.initialization.no_init_weights")
def _no_init_weights() -> None:
    x = torch.full((3,), 7.0)
    with transformers_names.no_init_weights():
        nn.init.zeros_(x)
        assert x.eq(7).all()
    nn.init.zeros_(x)
    assert x.eq(0).all()


@checks("transformers.PreTrainedModel._from_config")
def _builder() -> None:
    for kind in (transformers.LlamaForCausalLM, transformers.AutoModelForCausalLM):
        model = transformers_names.builder(kind)(
            transformers.LlamaConfig(**SIZES), dtype=torch.bfloat16
        )
        assert type(model) is transformers.LlamaForCausalLM
        assert model.dtype == torch.bfloat16


@checks("transformers.AutoModelForCausalLM._model_mapping")
def _knows() -> None:
    assert transformers_names.knows(transformers.AutoModelForCausalLM, transformers.LlamaConfig())
    assert not transformers_names.knows(
        transformers.AutoModelForSeq2SeqLM, transformers.LlamaConfig()
    )
    for kind in (transformers.LlamaForCausalLM, transformers.AutoModelForCausalLM):
        built = transformers_names.built_class(kind, transformers.LlamaConfig())
        assert built is transformers.LlamaForCausalLM


@checks("transformers.PreTrainedModel._init_weights")
def _initializer() -> None:
    model = llama()
    norm = model.model.norm
    norm.weight = nn.Parameter(torch.full((8,), torch.nan), requires_grad=False)
    with torch.no_grad():
        transformers_names.initializer(model)(norm)
    assert norm.weight.eq(1).all()
    assert transformers_names.initializer(nn.Linear(1, 1)) is None


@checks("transformers.PreTrainedConfig._name_or_path")
def _name_or_path() -> None:
    config = transformers.LlamaConfig(name_or_path="somewhere/model")
    assert transformers_names.name_or_path(config) == "somewhere/model"
    assert not transformers_names.name_or_path(transformers.LlamaConfig())
    assert not transformers_names.name_or_path(object())


@checks(
    "transformers.conversion_mapping.get_model_conversion_mapping",
    "transformers.core_model_loading.convert_and_load_state_dict_in_model",
    "transformers.modeling_utils.LoadStateDictConfig",
)
def _load() -> None:
    model, state = llama(), {k: torch.randn_like(v) for k, v in llama().state_dict().items()}
    wrong = "model.norm.weight"
    state[wrong] = torch.ones(3)
    rules = transformers_names.conversion_rules(model)
    info = transformers_names.load_state(model, state, rules)
    assert not info.conversion_errors
    assert [(name, *map(tuple, sizes)) for name, *sizes in info.mismatched_keys] == [
        (wrong, (3,), (8,))
    ]
    for name, value in model.state_dict().items():
        assert name == wrong or torch.equal(value, state[name]), name


@checks(
    "transformers.core_model_loading.WeightConverter",
    "transformers.core_model_loading.WeightRenaming",
    "transformers.core_model_loading.rename_source_key",
)
def _names() -> None:
    model = llama()
    name_of = transformers_names.namer(model, transformers_names.conversion_rules(model))
    assert name_of("model.norm.weight") == name_of("norm.weight") == "model.norm.weight"
    experts = transformers.MixtralForCausalLM(
        transformers.MixtralConfig(**SIZES, num_local_experts=2)
    )
    name_of = transformers_names.namer(experts, transformers_names.conversion_rules(experts))
    stored = "model.layers.0.block_sparse_moe.experts.{}.w{}.weight"
    found = {name_of(stored.format(expert, part)) for expert in (0, 1) for part in (1, 3)}
    assert len(found) == 1
    assert found <= experts.state_dict().keys()


@checks("transformers.PreTrainedConfig._attn_implementation")
def _attention_of() -> None:
    model = llama()
    for name in ("eager", "sdpa"):
        model.set_attn_implementation(name)
        assert transformers_names.attention_of(model.config) == name


@checks(
    "transformers.PreTrainedModel._supports_sdpa",
    "transformers.PreTrainedModel._supports_attention_backend",
    "transformers.PreTrainedModel._can_set_attn_implementation",
)
def _can_replace_attention() -> None:
    model = llama()
    assert transformers_names.can_replace_attention(model)
    kind = transformers.LlamaForCausalLM
    for name in ("_supports_sdpa", "_supports_attention_backend", "_can_set_attn_implementation"):
        cls = type("Other", (kind,), {name: classmethod(bool) if "can" in name else False})
        model.__class__ = cls
        assert transformers_names.can_replace_attention(model) is ("can" in name)


@checks("transformers.modeling_utils.ALL_ATTENTION_FUNCTIONS")
def _attention_function() -> None:
    assert callable(transformers_names.attention_function("sdpa"))
    transformers.AttentionInterface.register("of_this_test", _ignore)
    assert transformers_names.attention_function("of_this_test") is _ignore


def mixtral() -> Any:
    config = transformers.MixtralConfig(**SIZES, num_local_experts=3)
    return transformers.MixtralForCausalLM(config)


@checks(
    "transformers.PreTrainedConfig._experts_implementation",
    "transformers.integrations.moe.ALL_EXPERTS_FUNCTIONS",
    "transformers.integrations.moe.ExpertsInterface",
)
def _experts() -> None:
    model, seen = mixtral(), []
    before = transformers_names.experts_of(model.config)
    assert before == "grouped_mm"
    assert callable(transformers_names.experts_function("batched_mm"))

    def ours(module: Any, *given: Any) -> Any:
        seen.append([tuple(t.shape) for t in given])
        return transformers_names.experts_function(before)(module, *given)

    transformers_names.register_experts("of_this_test", ours)
    transformers_names.set_experts_(model.config, "of_this_test")
    model(torch.ones(1, 4, dtype=torch.int64))
    assert seen == [[(4, 8), (4, 2), (4, 2)]]
    transformers_names.set_experts_(model.config, before)
    model(torch.ones(1, 4, dtype=torch.int64))
    assert len(seen) == 1


@checks(
    "transformers.integrations.moe.use_experts_implementation._apply_gate",
    "transformers.integrations.moe.use_experts_implementation._is_expert_parallel",
)
def _expert_weights() -> None:
    experts = [m for m in mixtral().modules() if transformers_names.has_experts(m)]
    assert [type(m).__name__ for m in experts] == ["MixtralExperts"]
    first, bias, second, _, gate = transformers_names.expert_weights(experts[0])
    assert (first.shape, bias, second.shape) == ((3, 32, 8), None, (3, 8, 16))
    x = torch.randn(5, 32)
    assert torch.equal(gate(x), experts[0].act_fn(x[:, :16]) * x[:, 16:])
    experts[0]._is_expert_parallel = True
    assert "several processes" in transformers_names.expert_weights(experts[0])


@checks(
    "transformers.utils.quantization_config.QuantizationConfigMixin",
    "transformers.quantizers.HfQuantizer",
    "transformers.quantizers.register_quantization_config",
    "transformers.quantizers.register_quantizer",
)
def _quantizing() -> None:
    from transformers.quantizers import auto

    theirs, called = quantizer_names.quantizing(), []

    class Config(theirs.config):
        def __init__(self) -> None:
            self.quant_method = "compat"

    class Quantizer(theirs.quantizer):
        is_trainable = True

        def is_serializable(self) -> bool:
            return True

        def update_attn_implementation(self, config: Any) -> Any:
            called.append(config.quantization_config)
            return config

        def preprocess_model(self, model: Any, **_: Any) -> None:
            called.append("before")

        def postprocess_model(self, model: Any, **_: Any) -> None:
            assert model.hf_quantizer is self
            called.append("after")

        def param_needs_quantization(self, model: Any, param_name: str, **_: Any) -> bool:
            called.append("weight")
            return False

    theirs.register_config("compat")(Config)
    theirs.register_quantizer("compat")(Quantizer)
    asked = Config()
    try:
        with TemporaryDirectory() as path:
            llama().save_pretrained(path)
            transformers.LlamaForCausalLM.from_pretrained(path, quantization_config=asked)
    finally:
        del auto.AUTO_QUANTIZATION_CONFIG_MAPPING["compat"], auto.AUTO_QUANTIZER_MAPPING["compat"]
    assert called[0].quant_method == "compat"
    assert called[1] == "before"
    assert called[-1] == "after"
    assert set(called[2:-1]) == {"weight"}


@checks("transformers.integrations.is_deepspeed_zero3_enabled")
def _shards_by_zero3() -> None:
    assert quantizer_names.shards_by_zero3() is False


@checks("transformers.modeling_utils.get_hf_quantizer")
def _before_quantizer() -> None:
    from transformers import modeling_utils

    chosen, config = modeling_utils.get_hf_quantizer, llama().config
    asked = []

    def check(*given: Any) -> None:
        asked.append(given)
        raise InterruptedError

    quantizer_names.before_quantizer(check)
    try:
        for options in ({}, {"gguf_file": "a.gguf"}):
            with contextlib.suppress(InterruptedError), TemporaryDirectory() as empty:
                transformers.LlamaForCausalLM.from_pretrained(
                    empty, config=config, quantization_config="ours", **options
                )
    finally:
        modeling_utils.get_hf_quantizer = chosen
    assert [rest for _, *rest in asked] == [["ours", None], ["ours", "a.gguf"]]
    assert all(type(first) is type(config) for first, *_ in asked)


@checks("transformers.masking_utils.sdpa_mask")
def _sdpa_mask() -> None:
    masks = transformers.AttentionMaskInterface()
    assert masks["sdpa"] is transformers_names.sdpa_mask()


@checks(
    "transformers.generation.continuous_batching.continuous_api.ContinuousMixin",
    "transformers.generation.continuous_batching.continuous_api"
    ".ContinuousBatchingManager._original_attn_impl",
)
def _batching() -> None:
    mixin, model = transformers_names.batching(), llama()
    assert isinstance(model, mixin)
    small = transformers.ContinuousBatchingConfig(num_blocks=16, max_batch_tokens=64)
    manager = mixin.init_continuous_batching(model, continuous_batching_config=small)
    assert transformers_names.attention_of(model.config) in ("sdpa", "paged|sdpa")
    transformers_names.give_back_(manager, "eager")
    manager.start()
    manager.stop(block=True)
    assert transformers_names.attention_of(model.config) == "eager"


@checks("transformers.CompileConfig._compile_all_devices")
def _compile_everywhere() -> None:
    config, model = transformers.CompileConfig(), llama()
    settings = transformers.GenerationConfig(compile_config=config)
    cache = transformers.StaticCache(config=model.config, max_cache_len=4)
    compiles = model._valid_auto_compile_criteria
    assert not compiles({"past_key_values": cache}, settings)
    transformers_names.compile_everywhere_(config)
    assert compiles({"past_key_values": cache}, settings)
