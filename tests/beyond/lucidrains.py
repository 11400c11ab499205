"""A family of small libraries by one author: attention of every kind, written out."""

from __future__ import annotations

from typing import Any

import torch

from .fill import load, maker
from .specimen import Made, normal, specimen_maker, tokens

add, SPECIMENS = specimen_maker("lucidrains")
VOCAB = 64
SMALL: dict[str, Any] = {
    "dim": 32,
    "depth": 2,
    "heads": 2,
    "dim_head": 16,
    "num_tokens": VOCAB,
    "max_seq_len": 64,
    "seq_len": 16,
    "image_size": 32,
    "patch_size": 8,
    "num_classes": 5,
    "channels": 3,
    "bucket_size": 4,
    "window_size": 4,
    "n_hashes": 2,
    "ff_chunks": 1,
    "num_latents": 6,
    "latent_dim": 32,
    "latent_heads": 2,
    "latent_dim_head": 16,
    "cross_heads": 1,
    "cross_dim_head": 16,
    "num_landmarks": 4,
    "attn_dropout": 0.0,
    "ff_dropout": 0.0,
}
IDS, IMAGE, SEQUENCE = (tokens(VOCAB, 2, 16),), (normal(2, 3, 32, 32),), (normal(2, 16, 32),)

TABLE: list[tuple[str, dict[str, Any], Any]] = [
    ("linear_attention_transformer:LinearAttentionTransformerLM", {}, IDS),
    ("performer_pytorch:PerformerLM", {"local_attn_heads": 0, "nb_features": 8}, IDS),
    ("performer_pytorch:PerformerLM", {"use_rezero": True, "nb_features": 8}, IDS),
    ("performer_pytorch:PerformerLM", {"use_scalenorm": True, "nb_features": 8}, IDS),
    ("recurrent_memory_transformer_pytorch:RecurrentMemoryTransformer",
     {"num_memory_tokens": 2, "seq_len": 16}, IDS),
    ("denoising_diffusion_pytorch:Unet", {"dim": 16, "dim_mults": (1, 2), "attn_heads": 2,
                                          "attn_dim_head": 8, "flash_attn": False},
     (normal(1, 3, 16, 16), torch.tensor([3]))),
    ("denoising_diffusion_pytorch:Unet1D", {"dim": 16, "dim_mults": (1, 2), "attn_heads": 2,
                                            "attn_dim_head": 8},
     (normal(1, 3, 32), torch.tensor([3]))),
    ("conformer:Conformer", {"conv_kernel_size": 3}, SEQUENCE),
    ("perceiver_pytorch:Perceiver", {"num_freq_bands": 4, "max_freq": 10.0}, (normal(2, 8, 8, 3),)),
    ("perceiver_pytorch:PerceiverIO", {"queries_dim": 24, "logits_dim": 8},
     {"data": normal(2, 16, 32), "queries": normal(5, 24)}),
    ("perceiver_pytorch:PerceiverLM", {}, IDS),
    ("tab_transformer_pytorch:TabTransformer", {"categories": (5, 7), "num_continuous": 4,
                                                "dim_out": 3, "mlp_act": torch.nn.ReLU()},
     (tokens(5, 3, 2), normal(3, 4))),
    ("tab_transformer_pytorch:FTTransformer", {"categories": (5, 7), "num_continuous": 4,
                                               "dim_out": 3}, (tokens(5, 3, 2), normal(3, 4))),
    ("mlp_mixer_pytorch:MLPMixer", {}, IMAGE),
    ("local_attention:LocalTransformer", {"local_attn_window_size": 8}, IDS),
    ("local_attention:LocalTransformer", {"local_attn_window_size": 8, "use_xpos": True,
                                          "xpos_scale_base": 4, "causal": True}, IDS),
    ("g_mlp_pytorch:gMLP", {}, IDS),
    ("g_mlp_pytorch:gMLPVision", {}, IMAGE),
    ("nystrom_attention:Nystromformer", {}, SEQUENCE),
    ("axial_attention:AxialImageTransformer", {"reversible": False, "axial_pos_emb_shape": (8, 8)},
     (normal(1, 32, 8, 8),)),
    ("sinkhorn_transformer:SinkhornTransformerLM", {"max_seq_len": 16, "sinkhorn_iter": 3}, IDS),
    ("iTransformer:iTransformer", {"num_variates": 6, "lookback_len": 12, "pred_length": 4},
     (normal(2, 12, 6),)),
    ("iTransformer:iTransformer2D", {"num_variates": 4, "lookback_len": 12, "pred_length": 4,
                                     "num_time_tokens": 3}, (normal(2, 12, 4),)),
    ("iTransformer:iTransformerFFT", {"num_variates": 4, "lookback_len": 12, "pred_length": 4},
     (normal(2, 12, 4),)),
    ("uniformer_pytorch:Uniformer", {"dims": (16, 16, 32, 32), "depths": (1, 1, 1, 1),
                                     "dim_head": 8}, (normal(1, 3, 4, 32, 32),)),
    ("gateloop_transformer:Transformer", {"use_gate_looped_attn": False}, IDS),
    ("gateloop_transformer:Transformer", {"use_gate_looped_attn": False,
                                          "data_dependent_rel_pos": True}, IDS),
    ("bs_roformer:BSRoformer", {"depth": 1, "time_transformer_depth": 1,
                                "freq_transformer_depth": 1, "flash_attn": False,
                                "freqs_per_bands": (4, 4, 9, 16), "stft_n_fft": 64,
                                "stft_hop_length": 16, "stft_win_length": 64},
     (normal(1, 512),)),
    ("titans_pytorch:MemoryAsContextTransformer", {"segment_len": 8, "neural_memory_layers": (),
                                                   "num_persist_mem_tokens": 2}, IDS),
    ("muse_maskgit_pytorch:VQGanVAE", {"dim": 16, "layers": 2, "codebook_size": 64,
                                       "use_vgg_and_gan": False}, IMAGE),
    ("reformer_pytorch:ReformerLM", {"use_full_attn": True}, IDS),
    ("routing_transformer:RoutingTransformerLM", {"n_local_attn_heads": 2}, IDS),
]  # fmt: skip
for _path, _own, _inputs in TABLE:
    _name = _path if not any(s.name == _path for s in SPECIMENS) else f"{_path} {' '.join(_own)}"
    add(_name, maker(_path, SMALL, _own, _inputs))


def _mamba() -> Made:
    config = load("mambapy.mamba:MambaConfig")(d_model=32, n_layers=2, d_state=4)
    return load("mambapy.mamba:Mamba")(config), SEQUENCE


add("mambapy.mamba:Mamba", _mamba)
