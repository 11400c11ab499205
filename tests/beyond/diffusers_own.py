"""What a rule cannot know of a class of diffusers: arguments of its constructor and its forward."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from .specimen import normal, tokens

# Containers of several models that share a forward, and parts that are only called from others.
NOT_ALONE = {
    "FluxMultiControlNetModel",
    "HunyuanDiT2DMultiControlNetModel",
    "QwenImageMultiControlNetModel",
    "SD3MultiControlNetModel",
    "MultiControlNetModel",
    "MultiControlNetUnionModel",
    "MotionAdapter",
    "ControlNetXSAdapter",
}
TWO = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
LTX2 = {"audio_num_attention_heads": 2, "audio_attention_head_dim": 8, "audio_in_channels": 4,
        "audio_out_channels": 4, "audio_cross_attention_dim": 16}  # fmt: skip


def _blocks(kind: str) -> dict[str, Any]:
    down = (f"CrossAttnDownBlock{kind}", f"DownBlock{kind}")
    return {
        "down_block_types": down,
        "up_block_types": (f"UpBlock{kind}", f"CrossAttnUpBlock{kind}"),
    }


def _same(names: str, options: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The same options for several classes."""
    return dict.fromkeys(names.split(), options)


OWN: dict[str, dict[str, Any]] = {
    # transformers
    "AceStepTransformer1DModel": {"in_channels": 12, "audio_acoustic_hidden_dim": 4},
    "HunyuanDiT2DModel": {"patch_size": 2, "in_channels": 4, "cross_attention_dim": 24,
                          "cross_attention_dim_t5": 24, "text_len": 6, "text_len_t5": 4},
    "LatteTransformer3DModel": {"patch_size": 2, "norm_type": "ada_norm_single",
                                "activation_fn": "gelu-approximate", "video_length": 5},
    "PriorTransformer": {"embedding_dim": 16, "num_embeddings": 6},
    "StableAudioDiTModel": {"cross_attention_input_dim": 32, "global_states_input_dim": 24},
    "Transformer2DModel": {"in_channels": 32, "out_channels": None, "num_embeds_ada_norm": None,
                           "cross_attention_dim": 24, "norm_num_groups": 8,
                           "caption_channels": None, "sample_size": None},
    "DreamLiteTransformer2DModel": {"in_channels": 32, "out_channels": None,
                                    "num_embeds_ada_norm": None, "cross_attention_dim": 24,
                                    "norm_num_groups": 8},
    "TransformerTemporalModel": {"in_channels": 32, "out_channels": None, "norm_num_groups": 8},
    "CosmosTransformer3DModel": {"max_size": (8, 16, 16)},
    "EasyAnimateTransformer3DModel": {"patch_size": 2, "mmdit_layers": 2},
    "GlmImageTransformer2DModel": {"prior_vq_quantizer_codebook_size": 60, "condition_dim": 8},
    "HiDreamImageTransformer2DModel": {"patch_size": 2, "caption_channels": [24, 24],
                                       "text_emb_dim": 20, "llama_layers": [0, 1, 0],
                                       "axes_dims_rope": (8, 8), "max_resolution": (16, 16)},
    "HunyuanVideo15Transformer3DModel": {"text_embed_2_dim": 22, "image_embed_dim": 20},
    "HunyuanVideoFramepackTransformer3DModel": {"has_image_proj": True, "image_proj_dim": 20},
    "HunyuanImageTransformer2DModel": {"rope_axes_dim": (8, 8)},
    "Kandinsky5Transformer3DModel": {"num_text_blocks": 1, "num_visual_blocks": 2},
    "Krea2Transformer2DModel": {"text_num_attention_heads": 2, "text_num_key_value_heads": 2,
                                "text_intermediate_size": 48, "num_text_layers": 2,
                                "num_layerwise_text_blocks": 1, "num_refiner_text_blocks": 1},
    "LongCatAudioDiTTransformer": {"dit_text_dim": 24, "latent_dim": 4},
    "MiniMaxMusic3RVQDepthDecoder": {"audio_vocab_size": 60, "num_codebooks": 4},
    "MiniMaxMusic3Transformer1DModel": {"ff_inner_dim": 48, "rotary_dim": 8,
                                        "fourier_embedding_dim": 16},
    "OmniGenTransformer2DModel": {"pad_token_id": 0, "max_position_embeddings": 64,
                                  "original_max_position_embeddings": 64},
    "PRXTransformer2DModel": {"axes_dim": [8, 8]},
    "StableAudio3DiTModel": {"io_channels": 4, "cond_token_dim": 24, "global_cond_dim": 20,
                             "local_add_cond_dim": 5, "timestep_features_dim": 16,
                             "num_memory_tokens": 4},
    "T5FilmDecoder": {"input_dims": 16, "targets_length": 8, "d_model": 32, "d_kv": 16, "d_ff": 48},
    "BriaFiboTransformer2DModel": {"text_encoder_dim": 12},
    "WanVACETransformer3DModel": {"vace_layers": [0], "vace_in_channels": 8},
    "ZImageTransformer2DModel": {"axes_lens": (128, 128, 128), "n_layers": 1},
    "SD3Transformer2DModel": {"qk_norm": "rms_norm", "dual_attention_layers": (0,)},
    "SanaTransformer2DModel": {"qk_norm": "rms_norm_across_heads"},
    "LTX2VideoTransformer3DModel": LTX2,
    "SanaWMLTX2RefinerTransformer3DModel": LTX2,
    "UNet1DModel": {"block_out_channels": (32, 32, 64), "in_channels": 2, "out_channels": 2,
                    "extra_in_channels": 64},
    "AutoencoderKLWan": {"in_channels": 3, "out_channels": 3},
    "UNet2DModel": {"down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
                    "up_block_types": ("AttnUpBlock2D", "UpBlock2D")},
    "UNet2DConditionModel": _blocks("2D"),
    "UNet3DConditionModel": _blocks("3D"),
    "I2VGenXLUNet": _blocks("3D"),
    "UNetMotionModel": _blocks("Motion") | {"motion_num_attention_heads": 2,
                                            "num_attention_heads": 2},
    "UNetSpatioTemporalConditionModel": _blocks("SpatioTemporal") | {
        "num_attention_heads": (2, 2), "addition_time_embed_dim": 8,
        "projection_class_embeddings_input_dim": 24, "num_frames": 5},
    "DreamLiteUNetModel": {"block_out_channels": (32, 64, 64)},
    "Kandinsky3UNet": {"block_out_channels": (32, 32, 64, 64), "groups": 8,
                       "time_embedding_dim": 32, "encoder_hid_dim": 24},
    "StableCascadeUNet": {"block_out_channels": (32, 32), "num_attention_heads": (2, 2),
                          "down_num_layers_per_block": (1, 1), "up_num_layers_per_block": (1, 1),
                          "conditioning_dim": 24, "clip_text_pooled_in_channels": 20},
    "UVit2DModel": {"block_out_channels": 32, "cond_embed_dim": 20, "micro_cond_encode_dim": 8,
                    "micro_cond_embed_dim": 40, "encoder_hidden_size": 24, "codebook_size": 32,
                    "in_channels": 32, "block_num_heads": 2},
    # control networks
    "ControlNetModel": {"down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
                        "conditioning_embedding_out_channels": (4, 8)},
    "ControlNetUnionModel": {"down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
                             "conditioning_embedding_out_channels": (4, 8)},
    "FluxControlNetModel": {},
    "HunyuanDiT2DControlNetModel": {"patch_size": 2, "cross_attention_dim": 24,
                                    "cross_attention_dim_t5": 24, "text_len": 6, "text_len_t5": 4},
    # autoencoders
    "AutoencoderKL": TWO,
    "AutoencoderKLFlux2": TWO,
    "AsymmetricAutoencoderKL": {"down_block_types": TWO["down_block_types"],
                                "up_block_types": TWO["up_block_types"],
                                "down_block_out_channels": (32, 64),
                                "up_block_out_channels": (32, 64)},
    "AutoencoderKLTemporalDecoder": {"down_block_types": TWO["down_block_types"]},
    "VQModel": TWO,
    "AutoencoderDC": {"encoder_block_types": ("ResBlock", "EfficientViTBlock"),
                      "decoder_block_types": ("ResBlock", "EfficientViTBlock"),
                      "encoder_block_out_channels": (32, 64),
                      "decoder_block_out_channels": (32, 64),
                      "encoder_layers_per_block": (1, 1), "decoder_layers_per_block": (1, 1),
                      "encoder_qkv_multiscales": ((), (5,)),
                      "decoder_qkv_multiscales": ((), (5,)), "in_channels": 3},
    **_same("AutoencoderKLAllegro AutoencoderKLCogVideoX AutoencoderKLHunyuanVideo "
            "AutoencoderKLMagvit",
            {"block_out_channels": (32, 32, 32, 32)}),
    **_same("AutoencoderKLHunyuanImageRefiner AutoencoderKLHunyuanVideo15",
            {"block_out_channels": (32, 32, 64, 64, 64)}),
    "AutoencoderKLHunyuanImage": {"spatial_compression_ratio": 2},
    "AutoencoderKLCosmos": {"encoder_block_out_channels": (16, 32),
                            "decode_block_out_channels": (16, 32), "resolution": 32,
                            "attention_resolutions": (8,), "spatial_compression_ratio": 4,
                            "temporal_compression_ratio": 4, "patch_size": 2, "in_channels": 3},
    "AutoencoderKLLTXVideo": {"block_out_channels": (8, 8, 8, 8), "in_channels": 3,
                              "decoder_block_out_channels": (8, 8, 8, 8), "out_channels": 3,
                              "layers_per_block": (1,) * 5, "decoder_layers_per_block": (1,) * 5},
    "AutoencoderKLLTX2Video": {"block_out_channels": (8, 8, 16, 16), "in_channels": 3,
                               "decoder_block_out_channels": (8, 16, 16), "out_channels": 3,
                               "layers_per_block": (1,) * 5, "decoder_layers_per_block": (1,) * 4},
    "AutoencoderKLLTX2Audio": {"base_channels": 16, "ch_mult": (1, 2), "in_channels": 2,
                               "mel_bins": 16},
    "AutoencoderKLMochi": {"encoder_block_out_channels": (32,) * 4, "in_channels": 15,
                           "decoder_block_out_channels": (32,) * 4,
                           "layers_per_block": (1,) * 5},
    "AutoencoderKLQwenImage": {"input_channels": 3},
    "AutoencoderKLKVAE": {"channels": 32, "ch_mult": (1, 2)},
    "AutoencoderKLKVAEVideo": {"ch": 32, "ch_mult": (1, 2), "temporal_compress_times": 2},
    "AutoencoderVidTok": {"ch": 32},
    "AutoencoderOobleck": {"encoder_hidden_size": 8, "decoder_channels": 8,
                           "downsampling_ratios": [2, 4], "channel_multiples": [1, 2],
                           "decoder_input_channels": 4},
    "MMAudioVAE": {"mel_bins": 16, "hidden_channels": 32},
    "AutoencoderTiny": {"encoder_block_out_channels": (16, 16), "num_encoder_blocks": (1, 1),
                        "decoder_block_out_channels": (16, 16), "num_decoder_blocks": (1, 1)},
}  # fmt: skip

Given = dict[str, Any]
AUDIO = {"sample": normal(1, 2, 256)}
MASK = torch.ones(1, 6, dtype=torch.long)


def _wide(*names: str) -> Callable[[Given], Given]:
    """Arguments that are the time once more."""
    return lambda given: dict.fromkeys(names, given["timestep"])


def _stable_audio(given: Given) -> Given:
    from diffusers.models.embeddings import get_1d_rotary_pos_embed

    rotary = get_1d_rotary_pos_embed(8, 17, use_real=True, repeat_interleave_real=False)
    return {"hidden_states": normal(1, 4, 16), "encoder_hidden_states": normal(1, 6, 32),
            "global_hidden_states": normal(1, 1, 24), "rotary_embedding": rotary,
            "encoder_attention_mask": MASK.bool()}  # fmt: skip


def _lumina_next(given: Given) -> Given:
    from diffusers.models.embeddings import get_2d_rotary_pos_embed_lumina

    rotary = get_2d_rotary_pos_embed_lumina(16, 384, 384)
    return {"encoder_mask": MASK, "image_rotary_emb": rotary,
            "encoder_hidden_states": normal(1, 6, 32)}  # fmt: skip


INPUTS: dict[str, Given | Callable[[Given], Given]] = {
    "AceStepTransformer1DModel": lambda given: {
        "timestep_r": given["timestep"], "context_latents": normal(1, 16, 8),
        "hidden_states": normal(1, 16, 4), "encoder_hidden_states": normal(1, 6, 32)},
    "DiTTransformer2DModel": {"class_labels": torch.tensor([1])},
    "HunyuanDiT2DModel": {
        "encoder_hidden_states": normal(1, 6, 24), "text_embedding_mask": MASK,
        "encoder_hidden_states_t5": normal(1, 4, 24), "text_embedding_mask_t5": MASK[:, :4],
        "image_meta_size": torch.tensor([[8.0, 8, 8, 8, 0, 0]]), "style": torch.tensor([0])},
    "HunyuanDiT2DControlNetModel": {
        "encoder_hidden_states": normal(1, 6, 24), "text_embedding_mask": MASK,
        "encoder_hidden_states_t5": normal(1, 4, 24), "text_embedding_mask_t5": MASK[:, :4],
        "image_meta_size": torch.tensor([[8.0, 8, 8, 8, 0, 0]]), "style": torch.tensor([0]),
        "controlnet_cond": normal(1, 4, 8, 8)},
    "LatteTransformer3DModel": {"encoder_attention_mask": MASK.bool()},
    "LuminaNextDiT2DModel": _lumina_next,
    "MiniMaxMusic3RVQDepthDecoder": {"inputs_embeds": normal(1, 4, 32)},
    "PriorTransformer": {
        "hidden_states": normal(1, 16), "proj_embedding": normal(2, 16)[:1],
        "encoder_hidden_states": normal(1, 6, 16)},
    "StableAudioDiTModel": _stable_audio,
    "T5FilmDecoder": {
        "encodings_and_masks": [(normal(1, 6, 32), MASK)],
        "decoder_input_tokens": normal(1, 8, 16), "decoder_noise_time": torch.tensor([0.5])},
    "TransformerTemporalModel": {"hidden_states": normal(5, 32, 4, 4), "num_frames": 5,
                                 "encoder_hidden_states": None},
    "AnyFlowTransformer3DModel": _wide("r_timestep"),
    "CosmosTransformer3DModel": {"padding_mask": torch.zeros(1, 1, 8, 8)},
    "ErnieImageTransformer2DModel": {"text_bth": normal(1, 6, 24), "text_lens": torch.tensor([6])},
    "GlmImageTransformer2DModel": {
        "prior_token_id": tokens(60, 1, 16), "prior_token_drop": torch.zeros(1, 16).bool()},
    "HiDreamImageTransformer2DModel": lambda given: {
        "timesteps": given["timestep"], "encoder_hidden_states_t5": normal(1, 6, 24),
        "encoder_hidden_states_llama3": normal(2, 1, 6, 24), "pooled_embeds": normal(1, 20)},
    "HunyuanVideo15Transformer3DModel": {
        "image_embeds": normal(1, 3, 20), "encoder_hidden_states_2": normal(1, 5, 22),
        "encoder_attention_mask_2": MASK[:, :5]},
    "HunyuanVideoFramepackTransformer3DModel": {
        "image_embeds": normal(1, 3, 20), "indices_latents": torch.arange(5)[None]},
    "Kandinsky5Transformer3DModel": {
        "hidden_states": normal(1, 5, 8, 8, 4), "encoder_hidden_states": normal(1, 6, 24),
        "visual_rope_pos": [torch.arange(5), torch.arange(4), torch.arange(4)],
        "text_rope_pos": torch.arange(6)},
    "Kandinsky6Transformer3DModel": {"encoder_attention_mask": MASK.bool()},
    "Krea2Transformer2DModel": {
        "encoder_hidden_states": normal(1, 6, 2, 24), "encoder_attention_mask": MASK.bool(),
        "position_ids": torch.arange(66).reshape(22, 3) % 5},
    "LongCatAudioDiTTransformer": {
        "hidden_states": normal(1, 16, 4), "encoder_hidden_states": normal(1, 6, 24),
        "encoder_attention_mask": MASK.bool()},
    "LTXVideoTransformer3DModel": {
        "hidden_states": normal(1, 16, 4), "num_frames": 1, "height": 4, "width": 4},
    "LTX2VideoTransformer3DModel": {
        "hidden_states": normal(1, 16, 4), "num_frames": 1, "height": 4, "width": 4,
        "audio_hidden_states": normal(1, 4, 4), "audio_num_frames": 4, "fps": 24.0,
        "encoder_hidden_states": normal(1, 6, 24),
        "audio_encoder_hidden_states": normal(2, 6, 24)[:1], "audio_encoder_attention_mask": MASK},
    "OmniGenTransformer2DModel": {
        "input_ids": tokens(60, 1, 6), "input_img_latents": [], "input_image_sizes": {},
        "attention_mask": torch.ones(1, 23, 23), "position_ids": torch.arange(23)[None]},
    "StableAudio3DiTModel": {
        "hidden_states": normal(1, 4, 16), "global_hidden_states": normal(1, 20),
        "encoder_hidden_states": normal(1, 6, 24)},
    "BriaFiboTransformer2DModel": {"text_encoder_layers": [normal(1, 6, 12)] * 3},
    "WanVACETransformer3DModel": {
        "control_hidden_states": normal(1, 8, 5, 8, 8),
        "control_hidden_states_scale": torch.ones(1)},
    "ZImageTransformer2DModel": {
        "x": [normal(4, 1, 8, 8)], "t": torch.tensor([0.5]), "cap_feats": [normal(6, 24)]},
    "MiniMaxMusic3Transformer1DModel": {
        "hidden_states": normal(1, 4, 16), "encoder_hidden_states": normal(1, 24, 16)},
    # UNets and control networks
    "UNet1DModel": {"sample": normal(1, 2, 64)},
    "I2VGenXLUNet": {"image_latents": normal(1, 4, 5, 8, 8), "image_embeddings": normal(1, 32)},
    "UNetSpatioTemporalConditionModel": {"encoder_hidden_states": normal(1, 1, 32)},
    "StableCascadeUNet": {"timestep_ratio": torch.tensor([0.5]),
                          "clip_text_pooled": normal(1, 1, 20)},
    "UVit2DModel": {
        "input_ids": tokens(30, 1, 8, 8), "pooled_text_emb": normal(1, 20),
        "micro_conds": normal(1, 5), "encoder_hidden_states": normal(1, 6, 24)},
    "ControlNetModel": {"controlnet_cond": normal(1, 3, 16, 16)},
    "SD3ControlNetModel": {"controlnet_cond": normal(1, 4, 8, 8)},
    "FluxControlNetModel": {"controlnet_cond": normal(1, 16, 4)},
    "QwenImageControlNetModel": {"controlnet_cond": normal(1, 16, 4)},
    "SanaControlNetModel": {"controlnet_cond": normal(1, 4, 8, 8)},
    # autoencoders
    **_same("AutoencoderOobleck",
            AUDIO),
    "MMAudioVAE": {"sample": normal(1, 16, 32)},
    **_same("AutoencoderKLQwenImage AutoencoderKLWan AutoencoderKLQwenImage21",
            {"sample": normal(1, 3, 5, 16, 16)}),
    "AutoencoderKLCosmos": {"sample": normal(1, 3, 9, 32, 32)},
    "AutoencoderKLLTXVideo": {"sample": normal(1, 3, 9, 32, 32)},
    "AutoencoderKLLTX2Video": {"sample": normal(1, 3, 9, 64, 64)},
    "AutoencoderKLMochi": {"sample": normal(1, 3, 7, 32, 32)},
    **_same("AutoencoderKLHunyuanImageRefiner AutoencoderKLHunyuanVideo15",
            {"sample": normal(1, 4, 5, 32, 32)}),
    "AutoencoderDC": {"sample": normal(1, 3, 32, 32)},
    "AutoencoderKLTemporalDecoder": {"num_frames": 1},
}  # fmt: skip
