"""Shrink any configuration class by the meaning of its field names.

A rule maps a field name to a tiny value. Lists with one entry per layer are cut down to the first
layer of every kind, so that each kind of layer stays. Sub-configurations are shrunk the same way.
`OVERRIDES` holds the few values that a rule cannot know.
"""

import copy
import dataclasses
import re

import transformers
from transformers import CONFIG_MAPPING, PretrainedConfig

from .overrides import OVERRIDES, SUBSTITUTES

VOCAB = 99
HIDDEN = 64
HEADS = 4
LAYERS = 2
FIRST_SPECIAL = VOCAB - 20  # special tokens live from here on, text below
LAYER_COUNTS = ("num_hidden_layers", "num_layers", "n_layer", "n_layers")
# Fields that some classes leave empty although their model needs a number.
MISSING = {"head_dim": 16, "num_experts_per_tok": 2}


def _keep(value, base):
    return value


def _to(tiny):
    """A constant, but never more than the default."""
    return lambda value, base: min(value, tiny)


def _width(value, base):
    """Twice as wide as the residual if it is so by default, else as wide as the residual."""
    hidden = base.get("hidden_size") or base.get("d_model") or value
    return HIDDEN * 2 if value == 2 * hidden else HIDDEN


def _kv_heads(value, base):
    heads = base.get("num_attention_heads") or base.get("n_heads") or base.get("num_heads") or value
    return HEADS if value >= heads else min(value, HEADS // 2)


def _head_dim(value, base):
    """16, or 24 where the heads together are not as wide as the residual by default.

    As wide as the rotated part of a latent-attention head if it is so by default.
    """
    if "qk_rope_head_dim" in base:
        return 8 if value == base["qk_rope_head_dim"] else min(value, 16)
    heads, hidden = base.get("num_attention_heads"), base.get("hidden_size")
    return 24 if heads and hidden and value * heads != hidden else min(value, 16)


def _key_heads(value, base):
    return HEADS if value == base.get("linear_num_value_heads", value) else HEADS // 2


# (rule, patterns of whole field names): the first match wins, without one the default stays.
RULES = [
    (_keep, r"chunk_size_\w+", r"num_logits_to_keep", r"pretraining_tp", r"(num|in)_channels"),
    (_to(1), r"max_window_layers", r"num_residual_layers", r"num_nextn_\w+", r"num_mtp_layers"),
    (
        _to(1),
        r"first_k_dense_replace",
        r"num_dense_layers",
        r"moe_layer_start_index",
        r"topk_group",
    ),
    (_to(1), r"spatial_merge_size", r"adapter_merge_size", r"indexer_kv_heads"),
    (_to(VOCAB), r".*vocab(_size.*)?", r"num_centroids", r"codebook_size"),
    (_to(LAYERS), r"n_layers?", r"num_((hidden|global|encoder|decoder)_)?layers", r"depth"),
    (_to(LAYERS), r"(en|de)coder_layers", r"num_blocks", r".*num_hidden_layers"),
    (_to(LAYERS), r"num_layers_per_stack", r"n_layers_per_attn_res_block", r"num_kv_shared_layers"),
    (_kv_heads, r".*(n|num)_(key_value|kv)_heads", r"kv_n_heads"),
    (_key_heads, r"linear_num_key_heads"),
    (_to(8), r"mamba_n_heads", r"mamba_num_heads", r"n_mamba_heads"),
    (_to(HEADS), r".*(n|num)_heads?", r".*attention_heads", r"num_query_groups", r"n_head"),
    (_to(2 * HIDDEN), r"mamba_d_ssm"),
    (
        _to(2),
        r"n_groups?",
        r"num_expert_group",
        r"mamba_n_?groups",
        r"o_groups",
        r".*shared_experts",
    ),
    (
        _to(2),
        r"num_experts_per_tok(en)?",
        r"moe_top_?k",
        r"moe_k",
        r"top_k_experts",
        r"index_(block|topk)\w*",
    ),
    (_to(4), r"(n_routed|num|num_local|moe_num)_experts", r"zero_expert_num"),
    (
        _to(4),
        r"indexer_budget",
        r"centroid_intermediate_top_k",
        r"\w+chunk_length",
    ),
    (_to(4), r".*dt_rank", r"time_step_rank", r"hc_sinkhorn_iters", r"d_rel"),
    (_to(4), r".*sliding_window(_size)?", r"attention_chunk_size", r".*window_(size|len)"),
    (_to(4), r"local_attention"),
    (
        _to(8),
        r".*(d_state|state_size)",
        r"laurel_rank",
        r"hc_lowrank",
        r"qk_rope_head_dim",
        r"rotary_dim",
    ),
    (_to(12), r"v_head_dim"),
    (_head_dim, r"head_dim"),
    (_to(24), r"q_lora_rank", r"o_lora_rank", r"qk_head_dim"),
    (_to(20), r".*rank"),
    (_to(16), r".*head_?dim", r"dim_head", r".*d_head", r"attention_head_size", r"kv_channels"),
    (_to(16), r"query_pre_attn_scalar", r"patch_size"),
    (_to(32), r"image_size", r"crop_size"),
    (_to(48), r"word_embed_proj_dim", r".*embedding_size", r".*_embed_dim", r"d_inner"),
    (_to(48), r"hidden_size_per_layer_input"),
    (_to(80), r".*intermediate_size(_mlp)?", r".*ffn_(hidden_size|dim)", r"dff", r"dim_ff"),
    (_to(80), r"feed_forward_size", r"mlp_dim"),
    (
        _width,
        r".*hidden_size.*",
        r"d_model",
        r"n_embd",
        r"emb(ed)?(ding)?_dim",
        r"lru_width",
        r"dim",
    ),
    (_width, r"projector_(in|out)put_dim", r"adapter_(in|out)_dim", r"adapter_input_size"),
    (_width, r"vision_output_dim", r"input_size", r"dim_model_base"),
    (
        _to(64),
        r"max_position_embeddings",
        r"n_positions",
        r"n_ctx",
        r"max_seq_len",
        r"context_length",
    ),
    (_to(64), r"max_\w+_positions"),
]


def shrink_value(name: str, value: int, base: dict) -> int:
    """The tiny value of an integer field; `base` holds the defaults of all fields of its class."""
    for rule, *patterns in RULES:
        if any(re.fullmatch(pattern, name) for pattern in patterns):
            return rule(value, base)
    return value


def tiny_config(model_type: str, **changes) -> PretrainedConfig:
    """The tiny configuration that the causal-LM class of `model_type` takes, with `changes`.

    Where that class takes a part of the registered configuration (a text decoder inside a larger
    model), the part.
    """
    config = shrink(CONFIG_MAPPING[model_type], model_type, changes)
    wanted = causal_lm_class(model_type).config_class
    if isinstance(config, wanted):
        return config
    for name in type(config).sub_configs:
        if isinstance(getattr(config, name), wanted):
            return getattr(config, name)
    return config


def causal_lm_class(model_type: str) -> type:
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as NAMES

    return getattr(transformers, NAMES[model_type])


def shrink(cls: type, path: str, changes: dict | None = None) -> PretrainedConfig:
    """A tiny instance of the configuration class `cls`; `path` is its model type, then its part."""
    base, own = _defaults(cls)
    kwargs = {k: shrink_value(k, v, base) for k, v in own.items() if _is_int(v)}
    kwargs |= {k: v for k, v in MISSING.items() if k in own and base[k] is None}
    kwargs |= _per_layer(base, own)
    kwargs |= _small_token_ids(base)
    if "is_decoder" in own and path in CONFIG_MAPPING:
        kwargs["is_decoder"] = True
    overrides = copy.deepcopy(OVERRIDES.get(path, {}) | (changes or {}))
    kwargs |= overrides
    _fit_lists(kwargs, overrides)
    for name in cls.sub_configs:
        if part := _part_class(cls, name, base.get(name)):
            kwargs[name] = shrink(part, f"{path}.{name}")
    config = cls(**kwargs)
    vars(config).update(SUBSTITUTES.get(path, {}))
    return config


def _is_int(value) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _defaults(cls: type) -> tuple[dict, dict]:
    """Values of the default instance (`base`) and defaults of the fields alone (`own`)."""
    own = {f.name: f.default for f in dataclasses.fields(cls) if f.init}
    own = {k: v for k, v in own.items() if v is not dataclasses.MISSING}
    try:
        base = own | vars(cls()) | {"per_layer_config": cls().to_dict().get("per_layer_config")}
    except Exception:  # the default instance of a composite may not pass its own checks
        base = own
    return base, own


def _part_class(cls: type, name: str, default) -> type | None:
    """The class of a sub-configuration: that of the default instance, else the declared one."""
    if isinstance(default, PretrainedConfig):
        return type(default)
    spec = cls.sub_configs_defaults.get(name)
    if spec is None:
        return cls.sub_configs[name]
    if spec.optional:
        return None
    return type(spec.default_config)


def _per_layer(base: dict, own: dict) -> dict:
    """Cut lists with one entry per layer to the first layer of each kind, to `LAYERS` at least."""
    count_name = next((n for n in LAYER_COUNTS if n in own), None)
    if count_name is None or not _is_int(count := base.get(count_name)):
        return {}
    lists = {k: v for k, v in base.items() if k in own and _describes_layers(v, count)}
    extra = {int(k): v for k, v in (base.get("per_layer_config") or {}).items()}
    if not lists and not extra:
        return {}
    kinds = [
        (*(str(v[i]) for v in lists.values()), *sorted(extra.get(i, {}))) for i in range(count)
    ]
    chosen = sorted({kinds.index(kind) for kind in kinds})
    while len(chosen) < LAYERS:
        chosen.append(chosen[-1])
    tiny = {k: [_shrink_entry(k, v[i], base) for i in chosen] for k, v in lists.items()}
    tiny[count_name] = len(chosen)
    if extra:
        tiny["per_layer_config"] = {
            j: {k: _ratio(k, v, base) for k, v in extra[i].items()}
            for j, i in enumerate(chosen)
            if i in extra
        }
    return tiny


def _describes_layers(value, count: int) -> bool:
    """A list with one entry per layer; a list of the layers' indices is none."""
    if not isinstance(value, (list, tuple)) or len(value) != count:
        return False
    return list(value) != list(range(count))


def _shrink_entry(name, value, base):
    singular = name.removesuffix("_per_layer")
    return shrink_value(singular, value, base) if _is_int(value) and value > 1 else copy.copy(value)


def _ratio(name, value, base):
    """The tiny value of a per-layer override: its ratio to the global value is the default one."""
    usual = base.get(name)
    if not (_is_int(value) and _is_int(usual)):
        return shrink_value(name, value, base) if _is_int(value) else value
    return max(2, shrink_value(name, usual, base) * value // usual)


def _fit_lists(kwargs: dict, overrides: dict) -> None:
    """Where an override sets the layers, let the count and the other per-layer lists follow it."""
    lists = [v for k, v in overrides.items() if k in ("layer_types", "layers_block_type")]
    if not lists:
        return
    count = len(lists[0])
    for name in kwargs.keys() - overrides.keys():
        if name in LAYER_COUNTS:
            kwargs[name] = count
        elif isinstance(kwargs[name], list) and len(kwargs[name]) < count and "token" not in name:
            kwargs[name] = kwargs[name] + [kwargs[name][-1]] * (count - len(kwargs[name]))


def _small_token_ids(base: dict) -> dict:
    """Give each special token beyond the tiny vocabulary a place of its own at the end of it."""
    ids, free = {}, VOCAB - 1
    for name, value in base.items():
        if not re.fullmatch(r".*_token_(id|index)", name):
            continue
        if isinstance(value, (list, tuple)) or (_is_int(value) and value >= FIRST_SPECIAL):
            ids[name] = [free] if isinstance(value, (list, tuple)) else free
            free -= 1
    return ids
