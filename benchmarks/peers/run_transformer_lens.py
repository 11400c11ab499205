"""Fold the tiny checkpoints with TransformerLens, through its own conversions of architectures.

    python -m benchmarks.peers.run_transformer_lens --work DIR [type ...]

From 4.0 on: `TransformerBridge.boot_transformers` and `enable_compatibility_mode`. Before:
`HookedTransformer`, its configuration and weight conversions, `load_and_process_state_dict`. Runs
of each model: loaded alone (4.0 on), converted with nothing folded (is the conversion right?), with
`fold_ln`, and with `center_writing_weights` as well. Other processing is off, so that logits should
stay equal.
"""

from __future__ import annotations

import argparse
import json
import logging
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import nn
from transformers import PreTrainedTokenizerFast
from transformers.utils import logging as transformers_logging

from benchmarks.peers.common import (
    Result,
    about,
    attempt,
    error,
    load,
    logits,
    noted,
    read_inputs,
    run_all,
    true_logits,
    versions,
)

BRIDGE = int(version("transformer-lens").split(".")[0]) >= 4
if BRIDGE:  # here, so that a broken environment stops everything
    from transformer_lens.model_bridge import TransformerBridge
else:
    from transformer_lens import HookedTransformer
    from transformer_lens import loading_from_pretrained as loading
    from transformer_lens.utilities.architectures import POST_NORM_ARCHITECTURES
KEY = "transformer-lens-bridge" if BRIDGE else "transformer-lens-hooked"
RUNS: dict[str, dict] = {  # what is processed
    "converted": {"fold_ln": False, "center_writing_weights": False},
    "folded": {"fold_ln": True, "center_writing_weights": False},
    "centered": {"fold_ln": True, "center_writing_weights": True},
}
if BRIDGE:
    RUNS = {"loaded": {}} | RUNS
OFF = {"center_unembed": False, "fold_value_biases": False}
# Architectures whose configuration HookedTransformer knows by name only, never from config.json.
BY_NAME = {
    "gemma": "google/gemma-2b",
    "gemma2": "google/gemma-2-2b",
    "gemma3_text": "google/gemma-3-1b-pt",
}


def run(path: Path) -> Result:
    prepare = bridge if BRIDGE else hooked
    return {
        name: attempt(lambda o=options: _run(path, prepare, o)) for name, options in RUNS.items()
    }


def _run(path: Path, prepare: Callable, options: dict) -> Result:
    reference, inputs = load_file(path / "reference.safetensors"), read_inputs(path)
    with noted() as said:
        model, gains = prepare(path, options)
        found = logits(_call(model), inputs)
    truth = true_logits(_call(model.to(torch.float64)), inputs)
    ours = load_file(path / "flashnorm.safetensors")
    return {
        "gains_folded": gains,
        "warnings": said,
        "error_float32": error(found, reference["float32"]),
        "error_truth": error(truth, reference["truth"]),
        "from_flashnorm": error(truth, ours["truth"]),
    }


def _call(model: nn.Module) -> Callable:
    def call(input_ids, **others):
        return model(input_ids, return_type="logits", **others)

    return call


def bridge(path: Path, options: dict) -> tuple[nn.Module, int]:
    """TransformerLens 4: its adapter around the model of transformers."""
    tokenizer = PreTrainedTokenizerFast.from_pretrained(path.parent / "tokenizer")
    source = path / "original"
    model = TransformerBridge.boot_transformers(
        str(source), hf_model=load(source), tokenizer=tokenizer, device="cpu"
    )
    before = _constant_gains(model.original_model)
    if options:
        model.enable_compatibility_mode(disable_warnings=True, **options, **OFF)
    return model, _constant_gains(model.original_model) - before


def _constant_gains(model: nn.Module) -> int:
    """Vectors called weight that are one number everywhere: folded gains."""
    vectors = [p for n, p in model.named_parameters() if n.endswith("weight") and p.ndim == 1]
    return sum(bool((p == p[0]).all()) for p in vectors if p.numel() > 1)


def hooked(path: Path, options: dict) -> tuple[nn.Module, int | None]:
    """TransformerLens 3: configuration, weights and forward of its own, with no gain to count."""
    source = path / "original"
    original, name = load(source), about(path)["name"]
    official = BY_NAME.get(name, str(_as_published(source, path / "hooked")))
    cfg = loading.get_pretrained_model_config(
        official,
        hf_cfg=original.config.to_dict(),
        fold_ln=options["fold_ln"],
        device="cpu",
        dtype=torch.float32,
    )
    if name in BY_NAME:
        _shrink(cfg, original.config)
    cfg.tokenizer_name = None
    state = loading.get_pretrained_state_dict(official, cfg, original, dtype=torch.float32)
    if cfg.original_architecture in POST_NORM_ARCHITECTURES:  # as `from_pretrained` does
        options = dict.fromkeys(options, False)
    model = HookedTransformer(cfg, move_to_device=False)
    model.load_and_process_state_dict(state, **options, **OFF)
    return model.eval(), None if options["fold_ln"] else 0


def _as_published(source: Path, target: Path) -> Path:
    """A directory with the configuration alone, with the `n_ctx` of published GPT-2 files."""
    config = json.loads((source / "config.json").read_text())
    if "n_positions" in config:
        config = {"n_ctx": config["n_positions"]} | config
    target.mkdir(exist_ok=True)
    (target / "config.json").write_text(json.dumps(config))
    return target


def _shrink(cfg, config) -> None:
    """Give the configuration of a large official model the sizes of the tiny one."""
    layers, heads = config.num_hidden_layers, config.num_attention_heads
    kv_heads = getattr(config, "num_key_value_heads", heads)
    head = getattr(config, "head_dim", None) or config.hidden_size // heads
    cfg.n_layers, cfg.n_heads, cfg.d_head, cfg.d_model = layers, heads, head, config.hidden_size
    cfg.n_key_value_heads = kv_heads
    cfg.d_mlp, cfg.n_ctx = config.intermediate_size, config.max_position_embeddings
    cfg.d_vocab = cfg.d_vocab_out = config.vocab_size
    cfg.act_fn = getattr(config, "hidden_activation", None) or config.hidden_act
    cfg.eps = getattr(config, "rms_norm_eps", 1e-5)
    cfg.rotary_dim, cfg.attn_scale = head, getattr(config, "query_pre_attn_scalar", head) ** 0.5
    kinds = getattr(config, "layer_types", None) or ["full_attention"] * layers
    cfg.attn_types = ["local" if kind == "sliding_attention" else "global" for kind in kinds]
    if window := getattr(config, "sliding_window", None):
        cfg.window_size = window


def write_tokenizer(work: Path) -> None:
    """TransformerBridge wants a tokenizer that can be loaded again from a path."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel

    words = WordLevel({f"w{i}": i for i in range(99)}, unk_token="w0")
    special = {"bos_token": "w1", "eos_token": "w2", "unk_token": "w0", "pad_token": "w3"}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(words), **special)
    tokenizer.save_pretrained(work / "tokenizer")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("types", nargs="*")
    options = parser.parse_args()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    logging.disable(logging.WARNING)
    write_tokenizer(options.work)
    run_all(options.work, options.types, KEY, run)
    facts = versions("transformer-lens")
    (options.work / f"versions-{KEY}.json").write_text(json.dumps(facts))


if __name__ == "__main__":
    main()
