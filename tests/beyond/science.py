"""monai, kornia, segmentation-models-pytorch, segment-anything, fair-esm, chronos and others."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from .fill import load, maker
from .specimen import Made, normal, specimen_maker, tokens

add_monai, MONAI = specimen_maker("monai")
add_other, OTHERS = specimen_maker("others")
_NETS = "monai.networks.nets"
VOLUME = (normal(1, 1, 32, 32, 32),)
FLAT = (normal(1, 1, 32, 32),)
VIT: dict[str, Any] = {
    "in_channels": 1, "img_size": (32, 32), "patch_size": (8, 8), "hidden_size": 32, "mlp_dim": 48,
    "num_layers": 2, "num_heads": 2, "spatial_dims": 2,
}  # fmt: skip
NETS: list[tuple[str, dict[str, Any], Any]] = [
    ("ViT", {**VIT, "classification": True}, FLAT),
    ("ViTAutoEnc", {**VIT, "patch_size": (4, 4)}, FLAT),
    ("MaskedAutoEncoderViT", {**VIT, "decoder_hidden_size": 24, "decoder_mlp_dim": 32,
                              "decoder_num_layers": 1, "decoder_num_heads": 2}, FLAT),
    ("UNETR", {"in_channels": 1, "out_channels": 2, "img_size": (32, 32), "feature_size": 8,
               "hidden_size": 32, "mlp_dim": 48, "num_heads": 2, "spatial_dims": 2}, FLAT),
    ("SwinUNETR", {"in_channels": 1, "out_channels": 2, "feature_size": 12, "spatial_dims": 2,
                   "depths": (1, 1, 1, 1), "num_heads": (1, 2, 2, 4)}, (normal(1, 1, 64, 64),)),
    ("SegResNet", {"spatial_dims": 2, "init_filters": 8, "blocks_down": (1, 1),
                   "blocks_up": (1,)}, FLAT),
    ("UNet", {"spatial_dims": 2, "in_channels": 1, "out_channels": 2, "channels": (8, 16),
              "strides": (2,)}, FLAT),
    ("DecoderOnlyTransformer", {"num_tokens": 64, "max_seq_len": 16, "attn_layers_dim": 32,
                                "attn_layers_depth": 2, "attn_layers_heads": 2},
     (tokens(64, 2, 9),)),
    ("AutoencoderKL", {"spatial_dims": 2, "channels": (16, 32), "num_res_blocks": 1,
                       "attention_levels": (False, True), "norm_num_groups": 8}, FLAT),
    ("DiffusionModelUNet", {"spatial_dims": 2, "in_channels": 1, "out_channels": 1,
                            "channels": (16, 32), "num_res_blocks": 1, "norm_num_groups": 8,
                            "attention_levels": (False, True), "with_conditioning": True,
                            "cross_attention_dim": 12},
     (normal(1, 1, 16, 16), torch.tensor([3]), normal(1, 4, 12))),
    ("MedNeXt", {"spatial_dims": 2, "init_filters": 8, "kernel_size": 3, "blocks_down": (1, 1),
                 "blocks_up": (1, 1), "blocks_bottleneck": 1, "encoder_expansion_ratio": (2, 2),
                 "decoder_expansion_ratio": (2, 2)}, FLAT),
]  # fmt: skip
for _name, _own, _inputs in NETS:
    add_monai(_name, maker(f"{_NETS}:{_name}", {}, _own, _inputs))


def _transformer_of_loftr() -> Made:
    cls = load("kornia.feature.loftr.loftr_module.transformer:LocalFeatureTransformer")
    config = {"d_model": 32, "nhead": 2, "layer_names": ["self", "cross"], "attention": "linear"}
    return cls(config), (normal(1, 9, 32), normal(1, 7, 32))


def _kornia_vit() -> Made:
    cls = load("kornia.models.vit:VisionTransformer")
    options = {"embed_dim": 32, "depth": 2, "num_heads": 2}
    return cls(image_size=32, patch_size=8, **options), (normal(1, 3, 32, 32),)


def _light_glue() -> Made:
    cls = load("kornia.feature.lightglue:TransformerLayer")
    return cls(32, 2), {
        "desc0": normal(1, 5, 32),
        "desc1": normal(1, 6, 32),
        "encoding0": normal(2, 1, 1, 5, 16),
        "encoding1": normal(2, 1, 1, 6, 16),
    }


def _sam() -> Made:
    cls = load("segment_anything.modeling:ImageEncoderViT")
    options: dict[str, Any] = {"img_size": 64, "patch_size": 8, "embed_dim": 32, "depth": 2}
    model = cls(**options, num_heads=2, out_chans=16, window_size=4, use_rel_pos=True,
                global_attn_indexes=(1,))  # fmt: skip
    return model, (normal(1, 3, 64, 64),)


def _sam_decoder() -> Made:
    two_way = load("segment_anything.modeling.transformer:TwoWayTransformer")(2, 32, 2, 48)
    cls = load("segment_anything.modeling:MaskDecoder")
    model = cls(transformer_dim=32, transformer=two_way, iou_head_hidden_dim=16)
    return model, {
        "image_embeddings": normal(1, 32, 4, 4),
        "image_pe": normal(2, 32, 4, 4)[:1],
        "sparse_prompt_embeddings": normal(1, 2, 32),
        "dense_prompt_embeddings": normal(3, 32, 4, 4)[:1],
        "multimask_output": True,
    }


def _esm2() -> Made:
    model = load("esm.model.esm2:ESM2")(num_layers=2, embed_dim=32, attention_heads=2)
    return model, (tokens(20, 2, 9) + 4,)


def _segmentation(name: str) -> Callable[[], Made]:
    def make() -> Made:
        cls = load(f"segmentation_models_pytorch:{name}")
        model = cls(encoder_name="mit_b0", encoder_weights=None, classes=2)
        return model, (normal(1, 3, 64, 64),)

    return make


def _graph(name: str) -> Callable[[], Made]:
    def make() -> Made:
        model = load(f"torch_geometric.nn:{name}")
        edges = torch.tensor([[0, 1, 2, 3, 4, 0], [1, 2, 3, 4, 0, 2]])
        if name == "GPSConv":
            inner = load("torch_geometric.nn:GCNConv")(32, 32)
            return model(32, inner, heads=2, norm="layer_norm"), (normal(5, 32), edges)
        return model(16, 32, 2, norm="layer_norm"), (normal(5, 16), edges)

    return make


def _conformer_of_speechbrain() -> Made:
    cls = load("speechbrain.lobes.models.transformer.Conformer:ConformerEncoder")
    model = cls(2, 32, 48, 2, kernel_size=3, attention_type="regularMHA")
    return model, (normal(2, 9, 32),)


def _transformer_of_speechbrain() -> Made:
    cls = load("speechbrain.lobes.models.transformer.Transformer:TransformerEncoder")
    model = cls(num_layers=2, nhead=2, d_ffn=48, d_model=32, normalize_before=True)
    return model, (normal(2, 9, 32),)


add_other("kornia LocalFeatureTransformer", _transformer_of_loftr)
add_other("kornia VisionTransformer", _kornia_vit)
add_other("kornia LightGlue layer", _light_glue)
add_other("segment-anything ImageEncoderViT", _sam)
add_other("segment-anything MaskDecoder", _sam_decoder)
add_other("fair-esm ESM2", _esm2)
for _name in ("Unet", "Segformer", "UPerNet"):
    add_other(f"segmentation-models-pytorch {_name}", _segmentation(_name))
for _name in ("GPSConv", "GCN", "GIN"):
    add_other(f"torch-geometric {_name}", _graph(_name))
add_other("speechbrain ConformerEncoder", _conformer_of_speechbrain)
add_other("speechbrain TransformerEncoder", _transformer_of_speechbrain)
