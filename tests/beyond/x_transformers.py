"""x-transformers: a decoder or encoder for every option that changes a norm or what reads it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from .fill import load
from .specimen import Made, normal, specimen_maker, tokens

add, SPECIMENS = specimen_maker("x-transformers")
VOCAB = 64

OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "rmsnorm": {"use_rmsnorm": True},
    "simple_rmsnorm": {"use_simple_rmsnorm": True},
    "scalenorm": {"use_scalenorm": True},
    "dyt": {"use_dynamic_tanh": True},
    "derf": {"use_derf": True},
    "sandwich": {"sandwich_norm": True},
    "sandwich_rms": {"sandwich_norm": True, "use_rmsnorm": True},
    "post_norm": {"pre_norm": False},
    "no_final_norm": {"pre_norm_has_final_norm": False},
    "qk_norm": {"attn_qk_norm": True},
    "qk_norm_scaled": {"attn_qk_norm": True, "attn_qk_norm_dim_scale": True},
    "qk_norm_groups": {"attn_qk_norm": True, "attn_qk_norm_groups": 4},
    "rotary": {"rotary_pos_emb": True},
    "xpos": {"rotary_pos_emb": True, "rotary_xpos": True},
    "alibi": {"alibi_pos_bias": True, "alibi_num_heads": 2},
    "rel_pos": {"rel_pos_bias": True},
    "dynamic_pos": {"dynamic_pos_bias": True},
    "glu": {"ff_glu": True},
    "swiglu_rms": {"ff_glu": True, "ff_swish": True, "use_rmsnorm": True, "ff_no_bias": True},
    "relu2": {"ff_relu_squared": True},
    "ff_post_act_ln": {"ff_post_act_ln": True},
    "gqa": {"attn_kv_heads": 1},
    "one_kv_head": {"attn_one_kv_head": True},
    "talking_heads": {"attn_pre_talking_heads": True},
    "sparse_topk": {"attn_sparse_topk": 4},
    "gate_values": {"attn_gate_values": True},
    "head_gates": {"attn_gate_value_heads": True},
    "on_attn": {"attn_on_attn": True},
    "num_mem_kv": {"attn_num_mem_kv": 2},
    "value_residual": {"add_value_residual": True},
    "learned_value_residual": {"add_value_residual": True, "learned_value_residual_mix": True},
    "gate_residual": {"gate_residual": True},
    "scale_residual": {"scale_residual": True},
    "residual_attn": {"residual_attn": True},
    "macaron": {"macaron": True},
    "shift_tokens": {"shift_tokens": 1},
    "weight_tie_layers": {"weight_tie_layers": True},
    "hyper_connections": {"num_residual_streams": 2},
    "laser": {"attn_laser": True},
    "hybrid_softclamp": {"attn_softclamp_logits": True},
    "cog_signed": {"attn_cog_signed": True},
    "unet_skips": {"unet_skips": True},
    "integrate_layers": {"integrate_layers": True},
    "layerscale": {"use_layerscale": True},
    "norm_add_unit_offset": {"norm_add_unit_offset": True},
    "rms_unit_offset": {"use_rmsnorm": True, "norm_add_unit_offset": True},
    "head_scale": {"attn_head_scale": True},
    "value_rmsnorm": {"attn_value_rmsnorm": True},
    "polar": {"polar_pos_emb": True},
    "gated_rms": {"use_rmsnorm": True, "attn_gate_values": True, "ff_glu": True},
}  # fmt: skip


def _decoder(options: dict[str, Any]) -> Callable[[], Made]:
    def make() -> Made:
        layers = load("x_transformers:Decoder")(
            dim=32, depth=2, heads=2, attn_dim_head=16, **options
        )
        model = load("x_transformers:TransformerWrapper")(
            num_tokens=VOCAB, max_seq_len=32, attn_layers=layers
        )
        return model, (tokens(VOCAB, 2, 9),)

    return make


for _name, _options in OPTIONS.items():
    add(_name, _decoder(_options))


def _encoder() -> Made:
    layers = load("x_transformers:Encoder")(dim=32, depth=2, heads=2, attn_dim_head=16)
    wrapper = load("x_transformers:TransformerWrapper")
    model = wrapper(num_tokens=VOCAB, max_seq_len=32, attn_layers=layers, tie_embedding=True)
    return model, (tokens(VOCAB, 2, 9),)


def _vision() -> Made:
    layers = load("x_transformers:Encoder")(dim=32, depth=2, heads=2, attn_dim_head=16)
    vit = load("x_transformers:ViTransformerWrapper")
    model = vit(image_size=32, patch_size=8, num_classes=5, attn_layers=layers)
    return model, (normal(2, 3, 32, 32),)


def _continuous() -> Made:
    layers = load("x_transformers:Decoder")(dim=32, depth=2, heads=2, attn_dim_head=16)
    wrapper = load("x_transformers:ContinuousTransformerWrapper")
    model = wrapper(dim_in=8, dim_out=6, max_seq_len=32, attn_layers=layers)
    return model, (normal(2, 9, 8),)


def _both() -> Made:
    sizes = {"num_tokens": VOCAB, "depth": 2, "heads": 2, "max_seq_len": 32}
    options = {f"{end}_{key}": value for end in ("enc", "dec") for key, value in sizes.items()}
    model = load("x_transformers:XTransformer")(dim=32, tie_token_emb=True, **options)
    return model, (tokens(VOCAB, 2, 9), tokens(VOCAB, 2, 7))


def _cross() -> Made:
    cross = load("x_transformers:CrossAttender")(dim=32, depth=2, heads=2, attn_dim_head=16)
    return cross, {"x": normal(2, 5, 32), "context": normal(2, 7, 32)}


def _memory() -> Made:
    layers = load("x_transformers:Decoder")(dim=32, depth=2, heads=2, attn_dim_head=16)
    wrapper = load("x_transformers:TransformerWrapper")
    options = {"num_memory_tokens": 3, "emb_dim": 24, "post_emb_norm": True, "l2norm_embed": True}
    return wrapper(num_tokens=VOCAB, max_seq_len=32, attn_layers=layers, **options), (
        tokens(VOCAB, 2, 9),
    )


add("encoder_tied", _encoder)
add("ViTransformerWrapper", _vision)
add("ContinuousTransformerWrapper", _continuous)
add("XTransformer", _both)
add("CrossAttender", _cross)
add("memory_tokens", _memory)
