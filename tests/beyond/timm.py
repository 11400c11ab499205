"""timm: the smallest member of every file of models."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from .specimen import Made, normal, specimen_maker

add, SPECIMENS = specimen_maker("timm")
SIZES = (64, 96, 128, 160, 192, 224, 256, 299, 331)

FAMILIES = [
    "halonet_h1",
    "test_byobnet",
    "cait_xxs24_224",
    "coat_tiny",
    "convit_tiny",
    "convmixer_768_32",
    "test_convnext",
    "cpubone_nano",
    "crossvit_tiny_240",
    "csatv2",
    "cs3darknet_focus_s",
    "cspnext_tiny",
    "davit_tiny",
    "deit_tiny_patch16_224",
    "densenet121",
    "dla34",
    "dpn48b",
    "edgenext_xx_small",
    "efficientformer_l1",
    "efficientformerv2_s0",
    "test_efficientnet",
    "efficientvim_m1",
    "efficientvit_b0",
    "efficientvit_m0",
    "vit_tiny_patch16_dinov3_qkvb",
    "fasternet_t0",
    "fastvit_t8",
    "focalnet_tiny_srf",
    "gcvit_xxtiny",
    "ghostnet_050",
    "hardcorenas_b",
    "hgnetv2_b0",
    "hiera_tiny_224",
    "sam2_hiera_tiny",
    "hrnet_w18_small",
    "iformer_t",
    "inception_next_atto",
    "inception_v3",
    "inception_v4",
    "lcnetv2_small",
    "levit_128",
    "lowformer_b0",
    "test_mambaout",
    "test_coatnet",
    "poolformer_s12",
    "gmlp_ti16_224",
    "mobilenetv3_small_050",
    "mobilevit_xxs",
    "mvitv2_tiny",
    "nest_tiny",
    "nextvit_small",
    "test_nfnet",
    "pit_ti_224",
    "pvt_v2_b0",
    "rdnet_tiny",
    "regnetx_004_tv",
    "repghostnet_050",
    "repvit_m1",
    "res2next50",
    "resnest14d",
    "test_resnet",
    "resnetv2_18",
    "rexnet_100",
    "selecsls42",
    "legacy_seresnet18",
    "sequencer2d_s",
    "shvit_s1",
    "skresnet18",
    "starnet_s050",
    "swiftformer_xs",
    "swin_tiny_patch4_window7_224",
    "swinv2_tiny_window8_256",
    "swinv2_cr_tiny_224",
    "tiny_vit_5m_224",
    "tnt_s_legacy_patch16_224",
    "tresnet_m",
    "twins_svt_small",
    "visformer_tiny",
    "test_vit",
    "vit_tiny_r_s16_p8_224",
    "test_vit_relpos",
    "vitamin_small_224",
    "volo_d1_224",
    "ese_vovnet19b_slim_dw",
    "legacy_xception",
    "xception41p",
    "xcit_nano_12_p8_224",
]

# Those whose smallest member is large: fewer and narrower blocks.
BLOCKS: dict[str, Any] = {"depth": 2, "embed_dim": 48, "num_heads": 4}
SHRUNK: dict[str, dict[str, Any]] = {
    "beit_base_patch16_224": BLOCKS,
    "qwen3_vit_88m": {"depth": 2},
    "gemma4_vit_167m_enc": {"depth": 2},
    "deepseek_vit_412m": {"depth": 2},
    "naflexvit_base_patch16_gap": BLOCKS,
    "samvit_base_patch16_224": {**BLOCKS, "global_attn_indexes": (1,)},
}


def _made(name: str) -> Callable[[], Made]:
    def make() -> Made:
        failures, own = [], SHRUNK.get(name, {})
        for size in SIZES:
            for options in ({"img_size": size, **own}, own):
                try:
                    return _at(name, size, options)
                except Exception as error:
                    failures.append(error)
        raise failures[-1]

    return make


def _at(name: str, size: int, options: dict[str, Any]) -> Made:
    import timm

    model: nn.Module = timm.create_model(name, pretrained=False, num_classes=10, **options)
    image = (normal(1, 3, size, size),)
    with torch.no_grad():
        model.eval()(*image)
    return model, image


for _name in (*FAMILIES, *SHRUNK):
    add(_name, _made(_name))
