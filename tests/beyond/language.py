"""litgpt, torchtune, open_clip and sentence-transformers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from .fill import load
from .specimen import Made, normal, specimen_maker, tokens

add_litgpt, LITGPT = specimen_maker("litgpt")
add_torchtune, TORCHTUNE = specimen_maker("torchtune")
add_clip, CLIP = specimen_maker("open-clip")
add_sentence, SENTENCE = specimen_maker("sentence-transformers")
VOCAB = 64

# One configuration of every family that litgpt names.
FAMILIES = (
    "stablelm-base-alpha-3b", "pythia-14m", "Llama-2-7b-hf", "Llama-3.2-1B", "falcon-7b",
    "Gemma-2b", "Gemma-2-2b", "Gemma-3-1b-it", "Mistral-7B-v0.1", "Mixtral-8x7B-v0.1", "phi-2",
    "Phi-3-mini-4k-instruct", "Qwen2.5-0.5B", "Qwen3-0.6B", "Qwen3-30B-A3B", "OLMo-1B-hf",
    "OLMo-2-1124-7B", "tiny-llama-1.1b", "SmolLM2-135M", "salamandra-2b",
)  # fmt: skip


def _litgpt(name: str) -> Callable[[], Made]:
    def make() -> Made:
        config = load("litgpt.config:Config").from_name(name)
        groups = config.n_query_groups == config.n_head
        small: dict[str, Any] = {
            "n_layer": 2,
            "n_embd": 32,
            "n_head": 4,
            "n_query_groups": 4 if groups else 2 if config.n_query_groups > 1 else 1,
            "head_size": 8,
            "intermediate_size": 48,
            "block_size": 32,
            "vocab_size": VOCAB,
            "padded_vocab_size": VOCAB,
        }
        if config.n_expert:
            small |= {"n_expert": 4, "n_expert_per_token": 2}
        if getattr(config, "moe_intermediate_size", None):
            small["moe_intermediate_size"] = 24
        for key in ("sliding_window_indices", "rope_indices"):
            if getattr(config, key, None) is not None:
                small[key] = [0, 1]
        config = load("litgpt.config:Config").from_name(name, **small)
        return load("litgpt.model:GPT")(config), (tokens(VOCAB, 2, 9),)

    return make


for _name in FAMILIES:
    add_litgpt(_name, _litgpt(_name))

DENSE: dict[str, Any] = {
    "vocab_size": VOCAB,
    "num_layers": 2,
    "num_heads": 4,
    "num_kv_heads": 2,
    "embed_dim": 32,
    "max_seq_len": 32,
    "intermediate_dim": 48,
    "head_dim": 8,
    "attn_dropout": 0.0,
    "sliding_window_size": 4,
    "hidden_capping_value": 50.0,
    "final_capping_value": 30.0,
    "query_pre_attn_scalar": 8,
}
BUILDERS = (
    "llama2", "llama3", "llama3_1", "llama3_2", "gemma", "gemma2", "mistral", "phi3", "qwen2",
)  # fmt: skip


def _torchtune(name: str) -> Callable[[], Made]:
    def make() -> Made:
        from .fill import filled

        return filled(load(f"torchtune.models.{name}:{name}"), DENSE), (tokens(VOCAB, 2, 9),)

    return make


def _tune_vision() -> Made:
    encoder = load("torchtune.models.clip:clip_vision_encoder")
    options = {"tile_size": 32, "patch_size": 8, "embed_dim": 32, "num_layers": 2, "num_heads": 2}
    model = encoder(**options, in_channels=3, output_cls_projection=False)
    return model, (normal(1, 1, 1, 3, 32, 32),)


for _name in BUILDERS:
    add_torchtune(_name, _torchtune(_name))
add_torchtune("clip_vision_encoder", _tune_vision)

_VISION: dict[str, Any] = {"layers": 2, "width": 64, "image_size": 32, "patch_size": 8}
_TEXT: dict[str, Any] = {
    "context_length": 16, "vocab_size": VOCAB, "width": 32, "heads": 2, "layers": 2,
}  # fmt: skip


def _clip(cls: str, vision: dict[str, Any], text: dict[str, Any], **more: Any) -> None:
    def make() -> Made:
        model = load(f"open_clip:{cls}")(16, _VISION | vision, _TEXT | text, **more)
        return model, (normal(2, 3, 32, 32), tokens(VOCAB, 2, 16))

    add_clip(" ".join([cls, *vision, *text]), make)


_clip("CLIP", {}, {})
_clip("CLIP", {"ls_init_value": 0.1, "attentional_pool": True}, {})
_clip("CLIP", {"pool_type": "avg", "final_ln_after_pool": True}, {"no_causal_mask": True})
_clip("CLIP", {"no_ln_pre": True, "pool_type": "tok"}, {"ls_init_value": 0.1})
_clip("CLIP", {"qk_norm": True, "scaled_cosine_attn": False}, {})
_clip("CLIP", {"layers": (1, 1, 1, 1), "patch_size": None, "width": 16}, {})
_clip("CustomTextCLIP", {}, {"embed_cls": True, "output_tokens": False})
_COCA = {"attentional_pool": True, "output_tokens": True, "attn_pooler_heads": 4}


def _coca() -> Made:
    text = {**_TEXT, "embed_cls": True, "output_tokens": True}
    decoder = {**_TEXT, "attn_pooler_heads": 2}
    coca = load("open_clip.coca_model:CoCa")
    model = coca(32, decoder, text, {**_VISION, **_COCA})
    return model, (normal(2, 3, 32, 32), tokens(VOCAB, 2, 16))


add_clip("CoCa", _coca)


def _sentence(kind: str, *modules: Callable[[int], nn.Module]) -> Callable[[], Made]:
    """A pipeline of modules over a transformer with weights of its own."""

    def make() -> Made:
        from tests.zoo.further import further_model

        inner, _ = further_model(kind)
        width = inner.config.hidden_size
        inner = getattr(inner, inner.base_model_prefix, inner)
        model = _Encoder(inner, [module(width) for module in modules])
        return model, (tokens(50, 2, 9),)

    return make


class _Encoder(nn.Module):
    """What a SentenceTransformer does to token ids: the transformer, then its modules in turn."""

    def __init__(self, inner: nn.Module, modules: list[nn.Module]) -> None:
        super().__init__()
        st = load("sentence_transformers:SentenceTransformer")
        self.inner = inner
        self.pipeline = st(modules=modules, device="cpu")

    def forward(self, ids: Any) -> Any:
        mask = (ids > 0).long()
        hidden = self.inner(input_ids=ids, attention_mask=mask).last_hidden_state
        features = {"token_embeddings": hidden, "attention_mask": mask}
        return self.pipeline(features)["sentence_embedding"]


def _pooling(mode: str) -> Callable[[int], nn.Module]:
    return lambda width: load("sentence_transformers.models:Pooling")(width, pooling_mode=mode)


def _dense(width: int) -> nn.Module:
    return load("sentence_transformers.models:Dense")(width, 24)


def _layer_norm(width: int) -> nn.Module:
    return load("sentence_transformers.models:LayerNorm")(width)


def _normalize(_: int) -> nn.Module:
    return load("sentence_transformers.models:Normalize")()


for _kind in ("bert", "mpnet", "distilbert", "modernbert", "xlm-roberta"):
    add_sentence(_kind, _sentence(_kind, _pooling("mean"), _normalize))
add_sentence("bert, norm and dense", _sentence("bert", _pooling("cls"), _layer_norm, _dense))
