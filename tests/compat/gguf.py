"""How transformers reads GGUF files."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import transformers

from flashnorm.compat import gguf_names, transformers_names
from tests.compat.checks import checks
from tests.compat.models import llama

NEWER = {"hidden_size": 8, "vocab_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
OLDER = "transformers.modeling_gguf_pytorch_utils"


@checks("transformers.integrations.gguf.gguf_conversion_mapping.GGUF_ARCHS")
def _conversions() -> None:
    config = transformers.Lfm2Config(**NEWER, num_key_value_heads=1, layer_types=["conv"])
    assert gguf_names.conversions("llama", config) is None
    rules: Any = gguf_names.conversions("lfm2", config)
    model = transformers.Lfm2ForCausalLM(config)
    route = transformers_names.router(model, rules)
    assert route("blk.0.shortconv.in_proj.weight") == ("model.layers.0.conv.in_proj.weight", False)
    assert route("blk.0.shortconv.conv.weight") == ("model.layers.0.conv.conv.weight", True)
    state = {"blk.0.shortconv.conv.weight": torch.ones(8, config.conv_L_cache)}
    assert not transformers_names.load_state(model, state, rules).conversion_errors
    assert model.model.layers[0].conv.conv.weight.eq(1).all()


@checks(f"{OLDER}.TENSOR_PROCESSORS", f"{OLDER}.TensorProcessor")
def _processors() -> None:
    weights = np.arange(8, dtype=np.float32)[:, None] * np.ones(4, np.float32)
    kept = gguf_names.processor("unheard of", {}).process(weights=weights, name="a.weight")
    assert kept.weights is weights
    assert kept.name == "a.weight"
    config = {"num_attention_heads": 2, "num_key_value_heads": 2}
    moved = gguf_names.processor("llama", config).process(
        weights=weights,
        name="blk.0.attn_q.weight",
        tensor_key_mapping={},
        parsed_parameters={"tensors": {}},
    )
    assert moved.weights[:, 0].tolist() == [0, 2, 1, 3, 4, 6, 5, 7]


@checks(f"{OLDER}.get_gguf_hf_weights_map")
def _parameter_names() -> None:
    model = llama()
    names = gguf_names.parameter_names(
        model, gguf_names.processor("llama", {}), ["blk.0.attn_q.weight"]
    )
    assert names["blk.0.attn_q.weight"] == "model.layers.0.self_attn.q_proj.weight"
    assert names["output.weight"] == "lm_head.weight"
    asked = gguf_names.parameter_names(model, gguf_names.processor("llama", {}), ["nowhere"])
    assert asked.items() >= names.items()


@checks(
    "transformers.core_model_loading.build_glob_alternation",
    "transformers.PreTrainedModel._get_dtype_plan",
)
def _dtypes() -> None:
    model = llama()
    assert transformers_names.dtypes(model, torch.float16)("model.norm.weight") == torch.float16
    sizes = {"d_model": 8, "d_kv": 4, "d_ff": 8, "num_layers": 1, "num_heads": 2}
    t5 = transformers.T5ForConditionalGeneration(transformers.T5Config(**sizes, vocab_size=32))
    of = transformers_names.dtypes(t5, torch.float16)
    block = "encoder.block.0.layer.1.DenseReluDense"
    assert of(f"{block}.wo.weight") == torch.float32
    assert of(f"{block}.wi.weight") == torch.float16
