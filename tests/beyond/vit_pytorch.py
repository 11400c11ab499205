"""vit-pytorch: one class of every file that is a model by itself."""

from __future__ import annotations

from typing import Any

from .fill import load, maker
from .specimen import Made, normal, specimen_maker

add, SPECIMENS = specimen_maker("vit-pytorch")

SMALL: dict[str, Any] = {
    "image_size": 32,
    "patch_size": 8,
    "image_patch_size": 8,
    "num_classes": 5,
    "dim": 32,
    "depth": 2,
    "heads": 2,
    "dim_head": 16,
    "mlp_dim": 48,
    "frames": 4,
    "frame_patch_size": 2,
    "spatial_depth": 1,
    "temporal_depth": 1,
    "cls_depth": 1,
    "window_size": 4,
    "max_tokens_per_depth": (16, 8),
    "num_register_tokens": 2,
}
IMAGE = (normal(2, 3, 32, 32),)
VIDEO = (normal(2, 3, 4, 32, 32),)

PLAIN = [
    "ats_vit:ViT",
    "attn_residual_with_dca_simple_vit:SimpleViT",
    "cait:CaiT",
    "deepvit:DeepViT",
    "jet_vit:JetViT",
    "parallel_vit:ViT",
    "rvt:RvT",
    "simple_flash_attn_vit:SimpleViT",
    "simple_uvit:SimpleUViT",
    "simple_vit:SimpleViT",
    "simple_vit_attn_residual:SimpleViTAttnResidual",
    "simple_vit_orthog_residual_update:SimpleViT",
    "simple_vit_with_patch_dropout:SimpleViT",
    "simple_vit_with_qk_norm:SimpleViT",
    "simple_vit_with_register_tokens:SimpleViT",
    "simple_vit_with_relative_proj_pos_bias:SimpleViT",
    "simple_vit_with_sparse_gating:SimpleViTWithSparseGating",
    "simple_vit_with_specialized_cls:SimpleViT",
    "simple_vit_with_value_residual:SimpleViT",
    "vit:ViT",
    "vit_5:ViT",
    "vit_detpool:ViTDetPool",
    "vit_for_small_dataset:ViT",
    "vit_with_decorr:ViT",
    "vit_with_keel_post_ln:ViT",
    "vit_with_patch_dropout:ViT",
    "vit_with_patch_merger:ViT",
    "xcit:XCiT",
    "normalized_vit:nViT",
]
for entry in PLAIN:
    add(entry, maker(f"vit_pytorch.{entry}", SMALL, {}, IMAGE))

OWN: list[tuple[str, dict[str, Any], Any]] = [
    ("simple_vit_with_hyper_connections:SimpleViT", {"num_residual_streams": 2}, IMAGE),
    ("simple_vit_with_fft:SimpleViT", {"freq_patch_size": 8}, IMAGE),
    ("looped_vit:LoopedViT", {"pre_loop_depth": 1, "num_looped_blocks": 1, "post_loop_depth": 1,
                              "loop_depth": 2}, IMAGE),
    ("jumbo_vit:JumboViT", {"jumbo_cls_k": 2, "jumbo_ff_mult": 1}, IMAGE),
    ("pit:PiT", {"depth": (1, 1)}, IMAGE),
    ("wwt:WWT", {"num_slots": 4}, IMAGE),
    ("look_vit:LookViT", {"highres_patch_size": 4, "cross_attn_heads": 2,
                          "cross_attn_dim_head": 16}, (normal(2, 3, 32, 32),)),
    ("cct:CCT", {"img_size": 32, "embedding_dim": 32, "num_layers": 2, "num_heads": 2,
                 "mlp_ratio": 2, "num_classes": 5}, IMAGE),
    ("cct_3d:CCT", {"img_size": 32, "num_frames": 4, "embedding_dim": 32, "num_layers": 2,
                    "num_heads": 2, "mlp_ratio": 2, "num_classes": 5}, VIDEO),
    ("cross_vit:CrossViT", {"sm_dim": 24, "lg_dim": 32, "sm_patch_size": 8, "lg_patch_size": 16,
                            "sm_enc_heads": 2, "lg_enc_heads": 2, "sm_enc_mlp_dim": 48,
                            "lg_enc_mlp_dim": 48, "lg_enc_depth": 1, "cross_attn_heads": 2,
                            "cross_attn_depth": 1}, IMAGE),
    ("crossformer:CrossFormer", {"dim": (32, 40, 48, 64), "depth": (1, 1, 1, 1),
                                 "global_window_size": (4, 2, 2, 1),
                                 "local_window_size": (4, 4, 2, 1)},
     (normal(2, 3, 64, 64),)),
    ("cvt:CvT", {"s1_emb_dim": 16, "s2_emb_dim": 32, "s3_emb_dim": 48, "s3_depth": 1,
                 "s2_depth": 1}, (normal(2, 3, 64, 64),)),
    ("levit:LeViT", {"image_size": 64, "stages": 2, "dim": (32, 48), "depth": 1, "heads": (2, 2),
                     "mlp_mult": 2}, (normal(2, 3, 64, 64),)),
    ("max_vit:MaxViT", {"dim": 16, "depth": (1, 1), "dim_head": 8, "dim_conv_stem": 8,
                        "window_size": 4}, IMAGE),
    ("max_vit_with_registers:MaxViT", {"dim": 16, "depth": (1, 1), "dim_head": 8,
                                       "dim_conv_stem": 8, "window_size": 4}, IMAGE),
    ("mobile_vit:MobileViT", {"image_size": (64, 64), "dims": [24, 32, 40],
                              "channels": [8, 8, 16, 16, 24, 24, 32, 32, 40, 40, 48],
                              "depths": (1, 1, 1), "patch_size": (2, 2)}, (normal(2, 3, 64, 64),)),
    ("nest:NesT", {"num_hierarchies": 2, "block_repeats": (1, 1), "patch_size": 4}, IMAGE),
    ("regionvit:RegionViT", {"dim": (16, 24, 32, 48), "depth": (1, 1, 1, 1), "window_size": 2},
     (normal(2, 3, 64, 64),)),
    ("scalable_vit:ScalableViT", {"dim": 16, "depth": (1, 1), "heads": (1, 2),
                                  "reduction_factor": (2, 1), "window_size": (4, None)}, IMAGE),
    ("sep_vit:SepViT", {"dim": 16, "depth": (1, 1), "heads": (1, 2), "window_size": 7,
                        "dim_head": 8}, (normal(2, 3, 56, 56),)),
    ("t2t:T2TViT", {"t2t_layers": ((7, 4), (3, 2))}, IMAGE),
    ("twins_svt:TwinsSVT", {f"s{i}_{k}": v for i in range(1, 5) for k, v in (
        ("emb_dim", 8 * i), ("depth", 1), ("local_patch_size", 2), ("global_k", 2),
        ("patch_size", 2))}, IMAGE),
    ("simple_vit_1d:SimpleViT", {"seq_len": 32}, (normal(2, 3, 32),)),
    ("vit_1d:ViT", {"seq_len": 32}, (normal(2, 3, 32),)),
    ("simple_vit_3d:SimpleViT", {}, VIDEO),
    ("simple_flash_attn_vit_3d:SimpleViT", {}, VIDEO),
    ("vit_3d:ViT", {}, VIDEO),
    ("vivit:ViViT", {}, VIDEO),
    ("vivit_with_moss:ViViT", {"moss_hidden_dim": 16}, VIDEO),
    ("vit_nd:ViTND", {"ndim": 2, "input_shape": 32}, IMAGE),
    ("vit_nd_pope:ViTND", {"ndim": 2, "input_shape": 32}, IMAGE),
    ("vit_nd_rotary:ViTND", {"ndim": 2, "input_shape": 32}, IMAGE),
    ("na_vit:NaViT", {}, lambda: ([[normal(3, 16, 32), normal(3, 32, 16)], [normal(3, 24, 24)]],)),
    ("na_vit_nested_tensor:NaViT", {}, lambda: ([normal(3, 16, 32), normal(3, 32, 16)],)),
]  # fmt: skip
for entry, own, inputs in OWN:
    add(entry, maker(f"vit_pytorch.{entry}", SMALL, own, inputs))


def _efficient() -> Made:
    linear = load("linear_attention_transformer:LinearAttentionTransformer")
    inner = linear(dim=32, depth=2, heads=2, max_seq_len=17)
    vit = load("vit_pytorch.efficient:ViT")
    return vit(image_size=32, patch_size=8, num_classes=5, dim=32, transformer=inner), IMAGE


add("efficient:ViT", _efficient)
