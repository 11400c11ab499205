"""torch.nn.Transformer*, torchvision and torchaudio."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from .fill import load
from .specimen import Made, normal, specimen_maker

add, SPECIMENS = specimen_maker("torch")
add_vision, VISION = specimen_maker("torchvision")
add_audio, AUDIO = specimen_maker("torchaudio")


def _layer(cls: type, **options: Any) -> nn.Module:
    return cls(32, 2, 48, batch_first=True, dropout=0.0, **options)


def _encoder(**options: Any) -> Callable[[], Made]:
    def make() -> Made:
        layer = _layer(nn.TransformerEncoderLayer, **options)
        final = nn.LayerNorm(32) if options.get("norm_first") else None
        return nn.TransformerEncoder(layer, 2, norm=final), (normal(2, 7, 32),)

    return make


def _decoder(**options: Any) -> Callable[[], Made]:
    def make() -> Made:
        layer = _layer(nn.TransformerDecoderLayer, **options)
        model = nn.TransformerDecoder(layer, 2, norm=nn.LayerNorm(32))
        return model, (normal(2, 7, 32), normal(2, 5, 32))

    return make


def _whole(**options: Any) -> Callable[[], Made]:
    def make() -> Made:
        model = nn.Transformer(32, 2, 2, 2, 48, 0.0, batch_first=True, **options)
        return model, (normal(2, 5, 32), normal(2, 7, 32))

    return make


for _first in (False, True):
    _tag = "pre-norm" if _first else "post-norm"
    add(f"TransformerEncoder {_tag}", _encoder(norm_first=_first))
    add(f"TransformerDecoder {_tag}", _decoder(norm_first=_first))
    add(f"Transformer {_tag}", _whole(norm_first=_first))
add("TransformerEncoder gelu, no bias", _encoder(norm_first=True, activation="gelu", bias=False))


def _vision(name: str, path: str, size: int, **options: Any) -> None:
    def make() -> Made:
        return load(path)(num_classes=5, **options), (normal(2, 3, size, size),)

    add_vision(name, make)


_SWIN: dict[str, Any] = {
    "patch_size": [4, 4],
    "embed_dim": 16,
    "depths": [2, 2],
    "num_heads": [2, 4],
    "window_size": [4, 4],
}
_vision(
    "VisionTransformer",
    "torchvision.models:VisionTransformer",
    32,
    image_size=32,
    patch_size=8,
    num_layers=2,
    num_heads=2,
    hidden_dim=32,
    mlp_dim=48,
)
_vision("SwinTransformer", "torchvision.models:SwinTransformer", 64, **_SWIN)
_vision("ConvNeXt", "torchvision.models:convnext_tiny", 64)
_vision("resnet18", "torchvision.models:resnet18", 64)
_vision("mobilenet_v3", "torchvision.models:mobilenet_v3_small", 64)
_vision(
    "MaxVit",
    "torchvision.models:MaxVit",
    64,
    input_size=(64, 64),
    stem_channels=8,
    partition_size=4,
    block_channels=[8, 16],
    block_layers=[1, 1],
    head_dim=8,
    stochastic_depth_prob=0.0,
)


def _swin_v2() -> Made:
    from torchvision.models.swin_transformer import PatchMergingV2, SwinTransformerBlockV2

    swin = load("torchvision.models:SwinTransformer")
    model = swin(
        num_classes=5, block=SwinTransformerBlockV2, downsample_layer=PatchMergingV2, **_SWIN
    )
    return model, (normal(2, 3, 64, 64),)


def _video_swin() -> Made:
    swin = load("torchvision.models.video:SwinTransformer3d")
    options = {"patch_size": [2, 4, 4], "embed_dim": 16, "depths": [2, 2], "num_heads": [2, 4]}
    model = swin(window_size=[2, 4, 4], num_classes=5, **options)
    return model, (normal(1, 3, 4, 32, 32),)


def _mvit() -> Made:
    from torchvision.models.video.mvit import MSBlockConfig, MViT

    blocks = [
        MSBlockConfig(2, 16, 32, [3, 3, 3], [3, 3, 3], [1, 1, 1], [1, 2, 2]),
        MSBlockConfig(2, 32, 32, [3, 3, 3], [3, 3, 3], [1, 2, 2], [1, 1, 1]),
    ]
    model = MViT((32, 32), 4, blocks, True, True, False, True, num_classes=5)
    return model, (normal(1, 3, 4, 32, 32),)


add_vision("SwinTransformerV2", _swin_v2)
add_vision("SwinTransformer3d", _video_swin)
add_vision("MViT", _mvit)


def _wav2vec(mode: str) -> Callable[[], Made]:
    def make() -> Made:
        model = load("torchaudio.models:wav2vec2_model")(
            extractor_mode=mode,
            extractor_conv_layer_config=[(16, 10, 5), (16, 3, 2)],
            extractor_conv_bias=mode == "layer_norm",
            encoder_embed_dim=32,
            encoder_projection_dropout=0.0,
            encoder_pos_conv_kernel=8,
            encoder_pos_conv_groups=2,
            encoder_num_layers=2,
            encoder_num_heads=2,
            encoder_attention_dropout=0.0,
            encoder_ff_interm_features=48,
            encoder_ff_interm_dropout=0.0,
            encoder_dropout=0.0,
            encoder_layer_norm_first=mode == "layer_norm",
            encoder_layer_drop=0.0,
            aux_num_out=5,
        )
        return model, (normal(2, 800),)

    return make


def _lengths(path: str, **options: Any) -> Callable[[], Made]:
    def make() -> Made:
        return load(path)(**options), (normal(2, 12, 16), torch.tensor([12, 10]))

    return make


add_audio("Wav2Vec2Model group_norm", _wav2vec("group_norm"))
add_audio("Wav2Vec2Model layer_norm", _wav2vec("layer_norm"))
add_audio(
    "Conformer",
    _lengths(
        "torchaudio.models:Conformer",
        input_dim=16,
        num_heads=2,
        ffn_dim=32,
        num_layers=2,
        depthwise_conv_kernel_size=3,
    ),
)


def _emformer() -> Made:
    emformer = load("torchaudio.models:Emformer")
    model = emformer(16, 2, 32, 2, segment_length=4, right_context_length=2)
    return model, (normal(2, 10, 16), torch.tensor([8, 8]))


def _demucs() -> Made:
    model = load("torchaudio.models:HDemucs")(["a", "b"], channels=8, depth=3, nfft=256)
    return model, (normal(1, 2, 4096),)


def _conv_tasnet() -> Made:
    small = {"enc_num_feats": 16, "msk_num_feats": 16, "msk_num_hidden_feats": 24}
    model = load("torchaudio.models:ConvTasNet")(**small, msk_num_layers=2, msk_num_stacks=2)
    return model, (normal(2, 1, 400),)


add_audio("Emformer", _emformer)
add_audio("HDemucs", _demucs)
add_audio("ConvTasNet", _conv_tasnet)
