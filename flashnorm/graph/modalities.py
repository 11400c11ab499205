"""Images, videos, sound and series for a model's forward, by its argument names and its config.

What an argument is called says what it holds; the sizes are read from the config or its parts. An
argument may be laid out in several ways (a clip is [batch, frames, ...], patches may come flat), so
there are alternatives of each, and the first combination that the model accepts is the one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import product
from typing import Any

import torch
from torch import Tensor

BATCH, TOKENS, FRAMES = 2, 6, 2
IMAGE = 64  # pixels where no config says how many
MOST = 48  # combinations that are tried
Fragment = dict[str, Any]


class Sizes:
    """Sizes from a config: a field of its own, else of the nearest part that has it."""

    def __init__(self, config: Any) -> None:
        self.configs = list(_with_parts(config))

    def get(self, default: Any, *names: str) -> Any:
        for name in names:
            for config in self.configs:
                value = getattr(config, name, None)
                if value is not None:
                    return value
        return default

    def number(self, default: int, *names: str) -> int:
        value = self.get(default, *names)
        value = value[0] if isinstance(value, (list, tuple)) and value else value
        return value if isinstance(value, int) else default

    def pair(self, default: int, *names: str) -> tuple[int, int]:
        value = self.get(default, *names)
        if isinstance(value, dict):
            value = list(value.values())
        if isinstance(value, (list, tuple)) and len(value) >= 2:
            return int(value[-2]), int(value[-1])
        value = value[0] if isinstance(value, (list, tuple)) else value
        return int(value), int(value)


def _with_parts(config: Any) -> Iterator[Any]:
    queue: list[Any] = [config]
    while queue:
        current = queue.pop(0)
        if current is None:
            continue
        yield current
        parts = vars(current).values() if hasattr(current, "__dict__") else ()
        queue += [part for part in parts if hasattr(part, "to_dict") and part is not current]


def combinations(
    accepted: frozenset[str], required: frozenset[str], config: Any
) -> Iterator[Fragment]:
    """Inputs without text: every kind of thing that a forward asks for, the richest first."""
    sizes = Sizes(config)
    made = {name: list(maker(accepted, sizes)) for name, maker in MAKERS.items()}
    made = {name: found for name, found in made.items() if name in accepted and found}
    for chosen in _choices(made, required):
        for fragments in list(product(*chosen))[:MOST]:
            merged: Fragment = {}
            for fragment in fragments:
                merged |= fragment
            yield {k: v for k, v in merged.items() if k in accepted}


def _choices(
    made: dict[str, list[Fragment]], required: frozenset[str]
) -> Iterator[list[list[Fragment]]]:
    """All that can be made, then each one with what is required, then what is required alone."""
    must = [found for name, found in made.items() if name in required]
    kinds = {n: found for n, found in made.items() if n not in required and n not in INNER}
    if len(kinds) > 1:
        yield [*must, *kinds.values()]
    for found in kinds.values():
        yield [*must, found]
    if must:
        yield must


def _noise(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(len(shape)))


def _ids(*shape: int, limit: int = 8) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(2, max(limit, 3), shape, generator=generator)


def _image(accepted: frozenset[str], sizes: Sizes) -> Iterator[Fragment]:
    yield from ({"pixel_values": p, **rest} for p, rest in _pixels(accepted, sizes))


def _pixels(accepted: frozenset[str], sizes: Sizes) -> Iterator[tuple[Tensor, Fragment]]:
    channels = sizes.number(3, "num_channels", "in_channels", "in_chans", "image_channels")
    height, width = sizes.pair(IMAGE, "image_size", "img_size", "crop_size", "input_size")
    frames = sizes.number(FRAMES, "num_frames", "frames_per_clip")
    if accepted & {"grid_thw", "image_grid_thw", "image_grid_hw"}:
        yield from _patches(sizes, channels)
    if accepted & {"spatial_shapes", "pixel_position_ids", "image_position_ids"}:
        yield from _flat_patches(sizes, channels, height, width)
    if "target_sizes" in accepted:
        side, patch = 4, sizes.number(16, "patch_size")
        grid = torch.tensor([[side, side]] * BATCH)
        row = _noise(1, channels, patch, BATCH * side * side * patch)
        yield row, {"target_sizes": grid}
    square = {
        "image_sizes": torch.tensor([[height, width]] * BATCH),
        "aspect_ratio_ids": torch.ones(BATCH, 1, dtype=torch.long),
        "aspect_ratio_mask": torch.ones(BATCH, 1, 4, dtype=torch.long),
        "pixel_attention_mask": torch.ones(BATCH, 1, height, width, dtype=torch.bool),
        "spatial_sizes": torch.tensor([[height, width]] * BATCH),
    }
    tiles = sizes.number(2, "max_num_tiles")
    tile_mask = torch.ones(BATCH, 1, tiles, dtype=torch.long)
    plain = {k: v for k, v in square.items() if k != "pixel_attention_mask"}
    yield _noise(BATCH, channels, height, width), {}
    yield _noise(BATCH, channels, height, width), plain
    yield _noise(BATCH, frames, channels, height, width), {}
    yield _noise(BATCH, 1, channels, height, width), square
    yield _noise(BATCH, 2, channels, height, width), {"image_sizes": square["image_sizes"]}
    yield (
        _noise(BATCH, 1, tiles, channels, height, width),
        {**square, "aspect_ratio_mask": tile_mask},
    )
    yield _noise(BATCH, channels, IMAGE, IMAGE), {}
    yield _noise(BATCH, channels, 2 * IMAGE, 2 * IMAGE), {}
    yield from _flat_patches(sizes, channels, height, width)


def _patches(sizes: Sizes, channels: int) -> Iterator[tuple[Tensor, Fragment]]:
    """Patches of all images in one row, with the number of patches of each: [N, C t p p]."""
    patch = sizes.number(16, "patch_size")
    depth = sizes.number(1, "temporal_patch_size", "patch_temporal")
    merge = sizes.number(2, "spatial_merge_size", "merge_size", "merge_kernel_size")
    side = 2 * merge
    grid = torch.tensor([[1, side, side]] * BATCH)
    rest = {
        "grid_thw": grid,
        "image_grid_thw": grid,
        "image_grid_hw": grid[:, 1:],
        "merge_sizes": torch.full((BATCH,), merge),
    }
    count = BATCH * side * side
    yield _noise(count, channels * depth * patch * patch), rest
    yield _noise(count, channels * patch * patch), rest
    yield _noise(count, channels, patch, patch), rest
    yield _noise(count, channels, depth, patch, patch), rest
    yield _noise(1, count, channels, patch, patch), rest


def _flat_patches(
    sizes: Sizes, channels: int, height: int, width: int
) -> Iterator[tuple[Tensor, Fragment]]:
    """Patches of each image in a row: [B, N, C p p]."""
    patch = sizes.number(16, "patch_size")
    rows, columns = max(height // patch, 2), max(width // patch, 2)
    place = torch.cartesian_prod(torch.arange(columns), torch.arange(rows)).expand(BATCH, -1, 2)
    rest = {
        "spatial_shapes": torch.tensor([[rows, columns]] * BATCH),
        "pixel_attention_mask": torch.ones(BATCH, rows * columns, dtype=torch.bool),
        "pixel_position_ids": place,
        "image_position_ids": place,
    }
    yield _noise(BATCH, rows * columns, channels * patch * patch), rest


def _renamed(name: str, made: Callable[..., Iterator[tuple[Tensor, Fragment]]]) -> Callable:
    return lambda accepted, sizes: ({name: t, **rest} for t, rest in made(accepted, sizes))


def _video(accepted: frozenset[str], sizes: Sizes) -> Iterator[Fragment]:
    for pixels, rest in _pixels(accepted, sizes):
        grid = rest.get("grid_thw")
        yield {"pixel_values_videos": pixels, "video_grid_thw": grid, **rest}


def _flattened(accepted: frozenset[str], sizes: Sizes) -> Iterator[Fragment]:
    """Patches with their row and column in front."""
    patch = sizes.number(16, "patch_size")
    width = sizes.number(3, "num_channels") * patch * patch
    places = torch.arange(1, 5).view(1, 4, 1).expand(BATCH, 4, 2)
    yield {"flattened_patches": torch.cat((places, _noise(BATCH, 4, width)), dim=-1)}


def _hidden(accepted: frozenset[str], sizes: Sizes) -> Iterator[Fragment]:
    """Patches where a grid is asked for, else what a layer before would have given."""
    if "grid_thw" in accepted:
        channels = sizes.number(3, "num_channels", "in_channels", "in_chans")
        for patches, rest in _patches(sizes, channels):
            yield {"hidden_states": patches, **rest}
    width = sizes.number(64, "hidden_size", "d_model", "embed_dim")
    for shape in ((BATCH, TOKENS, width), (BATCH, width, TOKENS), (BATCH, width, 8, 8)):
        yield {"hidden_states": _noise(*shape)}
    yield from ({"hidden_states": p, **rest} for p, rest in _pixels(accepted, sizes))


def _embeds(name: str) -> Callable[..., Iterator[Fragment]]:
    def make(accepted: frozenset[str], sizes: Sizes) -> Iterator[Fragment]:
        for field in ("hidden_size", "d_model", "latent_dim", "encoder_hidden_size"):
            if width := sizes.number(0, field):
                yield {name: _noise(BATCH, TOKENS, width)}
                yield {name: _noise(BATCH, width, TOKENS)}

    return make


def _spectrum(name: str) -> Callable[..., Iterator[Fragment]]:
    """A spectrogram, [B, bands, frames] or [B, frames, bands]."""

    def make(accepted: frozenset[str], sizes: Sizes) -> Iterator[Fragment]:
        bands = sizes.number(
            80,
            "num_mel_bins",
            "n_mel_bins",
            "n_mels",
            "num_mels",
            "mel_bins",
            "feature_projection_input_dim",
            "input_feat_size",
            "input_feat_per_channel",
            "model_in_dim",
            "input_dim",
            "input_size",
            "feat_dim",
        )
        positions = sizes.number(32, "max_source_positions")
        frames = sizes.number(64, "max_length")
        for long in dict.fromkeys((2 * positions, 64, frames, 128, 200)):
            mask = torch.ones(BATCH, long, dtype=torch.bool)
            masks = {"input_features_mask": mask, "audio_mel_mask": ~mask}
            rest = (
                {**masks, "attention_mask": mask.long()} if "input_ids" not in accepted else masks
            )
            if "feature_lens" in accepted:
                lengths = torch.full((BATCH,), long)
                yield {name: _noise(bands, BATCH * long), "feature_lens": lengths}
            for shape in ((BATCH, bands, long), (BATCH, long, bands)):
                yield {name: _noise(*shape)}
                yield {name: _noise(*shape), **rest}
            yield {name: _noise(BATCH, 1, long, bands), "is_longer": torch.ones(BATCH, 1) > 0}

    return make


def _wave(accepted: frozenset[str], sizes: Sizes) -> Iterator[Fragment]:
    """Samples, [B, samples] or [B, channels, samples], or a spectrogram by that name."""
    channels = sizes.number(1, "audio_channels", "channels")
    for samples in (1024, 4800, 16000):
        yield {"input_values": _noise(BATCH, samples)}
        yield {"input_values": _noise(BATCH, channels, samples)}
    yield from _spectrum("input_values")(accepted, sizes)


def _series(accepted: frozenset[str], sizes: Sizes) -> Iterator[Fragment]:
    """A past, and a future where it is asked for, with features of each moment."""
    past = sizes.number(32, "context_length")
    future = sizes.number(8, "prediction_length")
    lags = sizes.get([0], "lags_sequence")
    long = past + max(lags)
    channels = sizes.number(1, "input_size", "num_input_channels")
    features = sizes.number(0, "num_time_features")
    for tail in ((), (channels,)):
        yield {
            "past_values": _noise(BATCH, long, *tail),
            "past_time_features": _noise(BATCH, long, features),
            "past_observed_mask": torch.ones(BATCH, long, *tail),
            "past_values_padding": torch.zeros(BATCH, long, dtype=torch.long),
            "freq": torch.zeros(BATCH, 1, dtype=torch.long),
            "future_values": _noise(BATCH, future, *tail),
            "future_time_features": _noise(BATCH, future, features),
        }
        yield {"past_values": _noise(BATCH, long, *tail)}


def _regions(accepted: frozenset[str], sizes: Sizes) -> Iterator[Fragment]:
    """What a detector would have seen: features of regions, and their boxes."""
    width = sizes.number(64, "visual_feat_dim")
    boxes = torch.rand(BATCH, TOKENS, 4, generator=torch.Generator().manual_seed(0))
    yield {"visual_feats": _noise(BATCH, TOKENS, width), "visual_pos": boxes}


def _decisions(accepted: frozenset[str], sizes: Sizes) -> Iterator[Fragment]:
    """States, actions and rewards of some steps."""
    yield {
        "states": _noise(BATCH, TOKENS, sizes.number(17, "state_dim")),
        "actions": _noise(BATCH, TOKENS, sizes.number(4, "act_dim", "action_dim")),
        "rewards": _noise(BATCH, TOKENS, 1),
        "returns_to_go": _noise(BATCH, TOKENS, 1),
        "timesteps": torch.arange(TOKENS).expand(BATCH, TOKENS),
        "attention_mask": torch.ones(BATCH, TOKENS),
    }


# What a layer before would have given: made only where it is required.
INNER = ("inputs_embeds",)
MAKERS: dict[str, Callable[..., Iterator[Fragment]]] = {
    "pixel_values": _image,
    "image": _renamed("image", _pixels),
    "prompt_pixel_values": _renamed("prompt_pixel_values", _pixels),
    "pixel_values_videos": _video,
    "flattened_patches": _flattened,
    "hidden_states": _hidden,
    "inputs_embeds": _embeds("inputs_embeds"),
    "patch_embeds": _embeds("patch_embeds"),
    "query_embeds": _embeds("query_embeds"),
    "latents": _embeds("latents"),
    "encoder_hidden_states": _embeds("encoder_hidden_states"),
    "vision_features": _embeds("vision_features"),
    "text_features": _embeds("text_features"),
    "input_features": _spectrum("input_features"),
    "spectrogram": _spectrum("spectrogram"),
    "mel_spectrogram": _spectrum("mel_spectrogram"),
    "audio_mel": _spectrum("audio_mel"),
    "input_values": _wave,
    "past_values": _series,
    "visual_feats": _regions,
    "states": _decisions,
}
