"""Random tiny checkpoints of transformers' types: folded on disk, loaded, held against the source.

Only models of transformers have checkpoints whose plan can be made from a config, so here the
random part is the config: the type, its widths, and every switch that moves a norm or a bias.
"""

from __future__ import annotations

import re
import tempfile
import warnings
from pathlib import Path
from random import Random

import torch
import transformers
from torch import nn

import flashnorm
from tests.fuzz.oracle import EXACT, Verdict, worded
from tests.zoo.build import tiny_inputs, tiny_model
from tests.zoo.fold import outputs, relative
from tests.zoo.shrink import tiny_config

TYPES = (
    *("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "olmo", "olmo2"),
    *("phi", "phi3", "gpt2", "gpt_neox", "gptj", "gpt_neo", "bloom", "opt", "falcon", "stablelm"),
    *("cohere", "cohere2", "granite", "starcoder2", "mixtral", "qwen2_moe", "olmoe", "nemotron"),
    *("mpt", "codegen", "persimmon", "glm", "smollm3", "exaone4", "helium", "arcee", "biogpt"),
)
# Switches that decide where norms and biases are, in the words of all configs.
SWITCHES = re.compile(
    r"tie_word_embeddings|\w*bias|use_parallel_residual|parallel_attn|\w*qk_(layer)?norm|"
    r"apply_residual_connection_post_layernorm|do_layer_norm_before|new_decoder_architecture|"
    r"multi_query|alibi|layer_norm_elementwise_affine|scale_attn_by_inverse_layer_idx"
)


def examine_disk(seed: int) -> Verdict:
    """The verdict on the checkpoint of a seed."""
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    rng = Random(f"disk {seed}")
    name = rng.choice(TYPES)
    changes = _changes(rng, name)
    verdict = Verdict(seed)
    try:
        model = tiny_model(name, seed, _config(name, changes)).double()
        inputs = tiny_inputs(model)
        truth = outputs(model, inputs)
    except Exception:  # a config that its own model does not take
        verdict.invalid = True
        return verdict
    options = {key: rng.random() < 0.5 for key in ("strict", "untie", "center")}
    what = f"{name} {changes} {options}"
    try:
        _judge(model, inputs, truth, options, rng, verdict)
    except flashnorm.FlashNormError as error:
        verdict.refused[worded(str(error))] += 1
    except Exception as error:
        verdict.wrong, verdict.detail = f"crash: {type(error).__name__}", f"{what}\n{error}"
    if verdict.wrong == "fold_checkpoint":
        verdict.detail = f"{what}\n{verdict.detail}"
    return verdict


def _changes(rng: Random, name: str) -> dict[str, object]:
    held = vars(tiny_config(name))
    switches = sorted(k for k, v in held.items() if isinstance(v, bool) and SWITCHES.fullmatch(k))
    changes: dict[str, object] = {key: rng.random() < 0.5 for key in switches}
    if isinstance(heads := held.get("num_key_value_heads"), int) and heads > 1:
        changes["num_key_value_heads"] = rng.choice((1, heads))
    return changes


def _config(name: str, changes: dict[str, object]):
    return tiny_config(name, **changes)


def _judge(
    model: nn.Module,
    inputs: dict,
    truth: list[torch.Tensor],
    options: dict[str, bool],
    rng: Random,
    verdict: Verdict,
) -> None:
    with tempfile.TemporaryDirectory() as place, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        src, dst = Path(place, "src"), Path(place, "dst")
        model.save_pretrained(src, max_shard_size=rng.choice(("20KB", "1GB")))
        plan = flashnorm.fold_checkpoint(src, dst, **options)
        found = type(model).from_pretrained(dst, dtype=torch.float64, attn_implementation="eager")
    verdict.sites = verdict.norms = len(plan.sites)
    verdict.folded = len(plan.folded)
    verdict.weightless = sum(site.gain_state == "none" for site in plan.sites)
    verdict.refused.update(worded(s.reason) for s in plan.sites if s.gain_state == "kept")
    error = relative(outputs(found.eval(), inputs), truth)
    if not error <= EXACT:
        verdict.wrong, verdict.detail = "fold_checkpoint", f"off by {error:.2e}\n{plan}"
