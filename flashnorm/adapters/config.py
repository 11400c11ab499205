"""What adapter_config.json says of an adapter, and what it says of the folded one."""

from __future__ import annotations

import math
import os
import re
from copy import deepcopy
from pathlib import Path
from typing import Any

from flashnorm.checkpoint.source import read_object
from flashnorm.errors import CheckpointError
from flashnorm.marker import folded_by, marker
from flashnorm.plan import Plan

PathName = str | os.PathLike[str]

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"

# Options that choose targets or start the training; none changes what A and B mean afterwards.
HARMLESS = {
    *("task_type", "peft_type", "auto_mapping", "peft_version", "base_model_name_or_path"),
    *("revision", "inference_mode", "r", "target_modules", "exclude_modules", "lora_alpha"),
    *("lora_dropout", "fan_in_fan_out", "bias", "use_rslora", "modules_to_save", "lora_bias"),
    *("init_lora_weights", "layers_to_transform", "layers_pattern", "rank_pattern"),
    *("alpha_pattern", "megatron_core", "trainable_token_indices", "eva_config", "lora_ga_config"),
    *("corda_config", "loftq_config", "qalora_group_size", "target_parameters", "runtime_config"),
}
# Options that have to be off, and what stands in the way where they are on.
REFUSED = {
    "use_dora": "DoRA scales by the norm of the merged weight, which a folded gain changes",
    "use_qalora": "QA-LoRA pools the input features before A, so a gain per feature cannot pass",
    "layer_replication": "the model that it acts on has other layers than those of the plan",
    "alora_invocation_tokens": "aLoRA acts on some of the tokens only",
    "arrow_config": "Arrow routes by the singular vectors of the adapter, which a gain changes",
    "kasa_config": "KaSA truncates the weights of the base, which a folded gain changes",
    "use_bdlora": "BD-LoRA stores blocks of A and B, not the matrices",
    "monteclora_config": "MonteCLoRA draws its factors at random",
    "velora_config": "VeLoRA is not plain LoRA",
    "megatron_config": "the layers of Megatron are not those of the plan",
    "ensure_weight_tying": "it ties factors of embedding and head, which a fold tells apart",
}
LARGEST_ALPHA = 1e30
LONGEST_PATTERN = 1000
_REPEAT = re.compile(r"(?<!\\)[*+?{]")
_GROUP_REPEAT = re.compile(r"\)[*+?{]")
STARTS = (True, False, "gaussian", "orthogonal", "eva")


def read_adapter_config(path: Path) -> dict[str, Any]:
    """adapter_config.json of the directory `path`; raises CheckpointError where it is not sound."""
    if not path.is_dir():
        raise CheckpointError(f"{path} is not a directory: give the directory of a PEFT adapter")
    return read_object(path / CONFIG, "PEFT adapter")


def check_plain_lora(config: dict[str, Any]) -> None:
    """Raise CheckpointError unless this is a LoRA whose delta is `scaling · B A` and no more."""
    if key := folded_by(config):
        raise CheckpointError(
            f"this adapter was folded already, as {key} in {CONFIG} says: fold the original instead"
        )
    if (kind := config.get("peft_type")) != "LORA":
        raise CheckpointError(f"the adapter is of type {kind!r}; only LoRA can be folded exactly")
    targets = config.get("target_parameters") or []
    if not isinstance(targets, list) or not all(isinstance(name, str) for name in targets):
        raise CheckpointError(f"target_parameters in {CONFIG} is no list of names")
    for key, why in REFUSED.items():
        if config.get(key):
            raise CheckpointError(f"{CONFIG} sets {key}: {why}; merge it into the original base")
    for key, value in config.items():
        if value and key not in HARMLESS and key not in REFUSED:
            raise CheckpointError(
                f"{CONFIG} sets {key}, an option that flashnorm does not know, so that it cannot "
                "say whether the fold would be exact; merge the adapter into the original base"
            )
    _check_start(config.get("init_lora_weights", True))


def _check_start(start: Any) -> None:
    """Some starts take `scaling · B A` out of the base's weights, again at each loading."""
    if start not in STARTS:
        raise CheckpointError(
            f"{CONFIG} sets init_lora_weights to {start!r}, which changes the weights of the base "
            "when the adapter is loaded; convert it to a plain LoRA first "
            "(path_initial_model_for_weight_conversion of PEFT's save_pretrained)"
        )


def scaling(config: dict[str, Any], module: str, rank: int) -> float:
    """The factor before `B A` for one module: alpha / r, or alpha / √r with use_rslora."""
    alpha = config.get("lora_alpha", 8)
    for pattern, value in _patterns(config).items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            alpha = value
            break
    if type(alpha) not in (int, float) or not abs(alpha) < LARGEST_ALPHA:
        raise CheckpointError(f"{CONFIG} sets the alpha of {module} to {str(alpha)[:40]!r}")
    return float(alpha / math.sqrt(rank) if config.get("use_rslora") else alpha / rank)


def _patterns(config: dict[str, Any]) -> dict[str, Any]:
    """alpha_pattern. Raises CheckpointError for what is none, or may take for ever to match."""
    found = config.get("alpha_pattern") or {}
    if not isinstance(found, dict):
        raise CheckpointError(f"alpha_pattern in {CONFIG} is no map of patterns")
    for pattern in found:
        if len(pattern) > LONGEST_PATTERN or not _is_quick(pattern):
            raise CheckpointError(
                f"the pattern {pattern[:80]!r} in {CONFIG} may take for ever to match: write the "
                "names of the modules instead, or merge the adapter into the original base"
            )
        try:
            re.compile(pattern)
        except (re.error, RecursionError, OverflowError) as error:
            raise CheckpointError(f"{pattern[:80]!r} in {CONFIG} is no pattern: {error}") from error
    return found


def _is_quick(pattern: str) -> bool:
    """Few things of a pattern can be matched in several ways, and none of them repeats a group."""
    choices = len(_REPEAT.findall(pattern)) + pattern.count("|") * (pattern.count("(") > 2)
    return choices <= 3 and not _GROUP_REPEAT.search(pattern) and "(?" not in pattern


def folded_adapter_config(
    config: dict[str, Any], plan: Plan, *, base: str, folded: PathName | None, lora_bias: bool
) -> dict[str, Any]:
    """The config of the folded adapter: it names the folded base or none, and has the marker."""
    config = deepcopy(config)
    config["base_model_name_or_path"] = None if folded is None else os.fspath(folded)
    config["revision"] = None
    if lora_bias:
        config["lora_bias"] = True
        config["init_lora_weights"] = True  # no other start goes with it, and all are loaded anyway
    return config | marker(plan, "compat", base)
