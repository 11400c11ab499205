"""diffusers: every transformer, UNet, autoencoder and control network that is small by a rule.

Configurations are filled by the names of their arguments; the inputs are the first of a few shapes
that the forward takes.
"""

from __future__ import annotations

import inspect
import itertools
import pkgutil
from collections.abc import Callable, Iterator
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn

from .diffusers_own import INPUTS, NOT_ALONE, OWN
from .specimen import LARGEST, Made, called, normal, specimen_maker, tokens

add, SPECIMENS = specimen_maker("diffusers")
TEXT, IMAGE, ROWS = 6, 8, 1
WIDTH = 32  # two heads of 16

SMALL: dict[str, Any] = {
    **dict.fromkeys(("num_layers", "depth", "dit_depth", "num_hidden_layers", "n_layers"), 2),
    **dict.fromkeys(("num_single_layers", "num_mmdit_layers", "num_single_dit_layers"), 1),
    **dict.fromkeys(("num_refiner_layers", "n_refiner_layers", "perceiver_num_layers"), 1),
    **dict.fromkeys(("num_attention_heads", "n_heads", "num_heads", "dit_heads"), 2),
    **dict.fromkeys(("n_kv_heads", "num_kv_heads", "num_key_value_heads"), 2),
    "num_key_value_attention_heads": 1,
    **dict.fromkeys(("attention_head_dim", "head_dim", "cross_attention_head_dim"), 16),
    "num_cross_attention_heads": 2,
    **dict.fromkeys(("hidden_size", "dim", "dit_dim", "embed_dim", "model_dim"), WIDTH),
    **dict.fromkeys(("cross_attention_dim", "caption_projection_dim"), WIDTH),
    **dict.fromkeys(("in_channels", "out_channels", "in_visual_dim", "out_visual_dim"), 4),
    **dict.fromkeys(("joint_attention_dim", "text_embed_dim", "text_dim", "caption_channels"), 24),
    **dict.fromkeys(("cap_feat_dim", "context_in_dim", "text_in_dim", "condition_dim"), 24),
    **dict.fromkeys(("in_text_dim", "text_hidden_dim", "text_emb_dim", "llm_features_dim"), 24),
    **dict.fromkeys(("pooled_projection_dim", "in_text_dim2"), 20),
    **dict.fromkeys(("freq_dim", "time_embed_dim", "time_dim", "adaln_dim", "time_step_dim"), 32),
    **dict.fromkeys(("ffn_dim", "ff_dim", "intermediate_size", "ffn_hidden_size"), 48),
    "multiple_of": 16,
    "mlp_ratio": 2.0,
    "adaln_lora_dim": 16,
    "timestep_embed_dim": 16,
    "sample_size": IMAGE,
    "sample_width": IMAGE,
    "sample_height": IMAGE,
    "sample_frames": 5,
    "axes_dims_rope": (4, 4, 8),
    "rope_axes_dim": (4, 4, 8),
    "axes_dim_rope": (4, 4, 8),
    "axes_dims": (4, 4, 8),
    "rope_dim": (4, 4, 8),
    "rope_dim_list": [4, 4, 8],
    "axes_lens": (64, 64, 64),
    "mrope_section": (4, 2, 2),
    "rope_max_seq_len": 64,
    "pos_embed_max_size": 16,
    "max_text_seq_length": TEXT,
    "vocab_size": 64,
    "num_experts": 4,
    "moe_intermediate_dim": 24,
    "approximator_num_channels": 16,
    "approximator_hidden_dim": 32,
    "approximator_layers": 1,
    "num_embeds_ada_norm": 10,
    # UNets and autoencoders
    "norm_num_groups": 8,
    "layers_per_block": 1,
    "block_out_channels": (32, 64),
    "latent_channels": 4,
    "base_dim": 8,
    "z_dim": 4,
    "num_res_blocks": 1,
    "ch": 8,
    "channels": 8,
    "latents_mean": [0.0] * 4,
    "latents_std": [1.0] * 4,
}


def _classes() -> Iterator[tuple[str, type[nn.Module]]]:
    """(kind, class) of every model of the library."""
    from diffusers.models.modeling_utils import ModelMixin

    for kind in ("transformers", "unets", "autoencoders", "controlnets"):
        package = import_module(f"diffusers.models.{kind}")
        for file in pkgutil.iter_modules(package.__path__):
            try:
                module = import_module(f"{package.__name__}.{file.name}")
            except ImportError:
                continue  # for another framework
            for found in vars(module).values():
                own = inspect.isclass(found) and found.__module__ == module.__name__
                if own and issubclass(found, ModelMixin):
                    yield kind, found


def _made(kind: str, cls: type[nn.Module]) -> Callable[[], Made]:
    def make() -> Made:
        names = inspect.signature(cls.__init__).parameters
        options = {key: value for key, value in SMALL.items() if key in names}
        if kind == "unets":
            options.pop("num_attention_heads", None)
            options["attention_head_dim"] = 8
            options = {key: value for key, value in options.items() if key in names}
        options |= OWN.get(cls.__name__, {})
        with torch.device("meta"):
            size = sum(parameter.numel() for parameter in cls(**options).parameters())
        if size > LARGEST:
            raise ValueError(f"{size} parameters are not tiny")
        return _with_inputs(cls(**options).eval(), kind)

    return make


def _with_inputs(model: nn.Module, kind: str) -> Made:
    failures: dict[str, Exception] = {}
    for inputs in _candidates(model, kind):
        try:
            with torch.no_grad():
                called(model, inputs)
            return model, inputs
        except Exception as error:
            failures.setdefault(f"{type(error).__name__}: {error}"[:160], error)
    raise ValueError(" / ".join(failures) or "no inputs for its forward are known")


def _candidates(model: nn.Module, kind: str) -> Iterator[dict[str, Any]]:
    """Inputs by the names of the forward's arguments, for each shape of the data."""
    config, name = model.config, type(model).__name__
    parameters = inspect.signature(model.forward).parameters
    channels = config.get("in_channels") or config.get("in_visual_dim") or 4
    for shape, time in itertools.product(_shapes(kind, channels), _times()):
        given = _side(config, shape, time) | {"sample": normal(*shape)}
        given |= {"hidden_states": given["sample"], "x": given["sample"], "z": given["sample"]}
        own = INPUTS.get(name, {})
        given |= own(given) if callable(own) else own
        required = [n for n, p in parameters.items() if p.default is p.empty]
        asked = {"guidance"} if config.get("guidance_embeds") else set()
        wanted = {*required, *OPTIONAL, *own_names(own, given), *asked} & parameters.keys()
        yield {key: given[key] for key in parameters if key in wanted and key in given}


def own_names(own: Any, given: dict[str, Any]) -> set[str]:
    return set(own(given) if callable(own) else own)


# Given although a forward can do without, by its signature.
OPTIONAL = {
    "encoder_hidden_states",
    "timestep",
    "pooled_projections",
    "img_ids",
    "txt_ids",
    "encoder_attention_mask",
    "encoder_hidden_states_mask",
    "img_shapes",
}


def _shapes(kind: str, channels: int) -> list[tuple[int, ...]]:
    image, video = (ROWS, channels, IMAGE, IMAGE), (ROWS, channels, 5, IMAGE, IMAGE)
    if kind == "autoencoders":
        return [(ROWS, channels, 16, 16), (ROWS, channels, 5, 16, 16), (ROWS, channels, 64)]
    short = (ROWS, channels, 1, IMAGE, IMAGE)
    frames = (ROWS, 5, channels, IMAGE, IMAGE)
    return [image, video, frames, short, (ROWS, 16, channels), (ROWS, channels, 16)]


def _times() -> list[Tensor]:
    return [torch.tensor([3] * ROWS), torch.tensor([0.5] * ROWS), torch.tensor(3)]


TEXT_WIDTHS = (
    "joint_attention_dim",
    "text_embed_dim",
    "text_dim",
    "caption_channels",
    "cap_feat_dim",
    "context_in_dim",
    "in_text_dim",
    "text_in_dim",
    "text_hidden_dim",
    "llm_features_dim",
    "encoder_hid_dim",
    "cross_attention_dim",
    "condition_dim",
)


def _side(config: Any, shape: tuple[int, ...], time: Tensor) -> dict[str, Any]:
    """Everything beside the data itself."""
    widths = (config.get(name) for name in TEXT_WIDTHS)
    width = next((w for w in widths if isinstance(w, int)), WIDTH)
    pooled = config.get("pooled_projection_dim") or config.get("in_text_dim2") or 20
    axes = config.get("axes_dims_rope") or (4, 4, 8)
    return {
        "timestep": time,
        "encoder_hidden_states": normal(ROWS, TEXT, width),
        "pooled_projections": normal(ROWS, pooled),
        "guidance": torch.tensor([2.0] * ROWS),
        "encoder_attention_mask": torch.ones(ROWS, TEXT, dtype=torch.long),
        "encoder_hidden_states_mask": torch.ones(ROWS, TEXT, dtype=torch.long),
        "img_ids": torch.stack([torch.arange(16) // (4 + i) for i in range(len(axes))], -1).float(),
        "txt_ids": torch.zeros(TEXT, len(axes)),
        "img_shapes": [[(1, 4, 4)]],
        "class_labels": torch.tensor([1] * ROWS),
        "original_size": torch.tensor([[16.0, 16.0]]),
        "target_size": torch.tensor([[16.0, 16.0]]),
        "crop_coords": torch.tensor([[0.0, 0.0]]),
        "input_ids": tokens(60, ROWS, 16),
        "added_time_ids": torch.tensor([[6.0, 127.0, 0.02]]),
        "fps": torch.tensor([7]),
    }


for _kind, _cls in _classes():
    if _cls.__name__ not in NOT_ALONE:
        add(_cls.__name__, _made(_kind, _cls))
