"""Tiny bases with random adapters of real PEFT, and what both give together in true float64."""

from __future__ import annotations

import copy
import dataclasses
import json
import warnings
from pathlib import Path

import peft
import torch

import flashnorm
from flashnorm.adapters.config import CONFIG
from flashnorm.plan import Plan
from flashnorm.verification.precision import float64_truth
from tests.zoo import tiny_config, tiny_inputs, tiny_model

EXACT = 1e-12  # max |Δlogit| / max |logit| in float64
WRONG = 1e-3
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
FEED_FORWARD = ["gate_proj", "up_proj", "down_proj"]
EVERY = [*ATTENTION, *FEED_FORWARD, "lm_head"]
EXPERTS = ["experts.gate_up_proj", "experts.down_proj"]


@dataclasses.dataclass
class Made:
    """A base in float64 on disk, an adapter on it, and what both give together."""

    base: Path
    adapter: Path
    model: torch.nn.Module
    inputs: dict
    logits: torch.Tensor


def made(folder: Path, name: str, seed: int = 1, shape: dict | None = None, **config) -> Made:
    """A tiny model with random gains and an adapter whose every tensor is random.

    `shape` changes the config of the model.
    """
    changed = tiny_config(name, **shape) if shape else None
    model = tiny_model(name, config=changed).double()
    inputs = tiny_inputs(model)
    base, adapter = folder / "base", folder / "adapter"
    if not base.exists():
        quietly(model.save_pretrained, base)
    wrapped = quietly(peft.get_peft_model, copy.deepcopy(model), peft.LoraConfig(**config))
    randomize_(wrapped, seed)
    quietly(wrapped.save_pretrained, adapter)
    name_base(adapter, base)
    return Made(base, adapter, model, inputs, logits(model, adapter, inputs))


def name_base(adapter: Path, base: Path) -> None:
    settings(adapter, base_model_name_or_path=str(base))


def settings(adapter: Path, **changes) -> dict:
    config = json.loads((adapter / CONFIG).read_text())
    config |= changes
    (adapter / CONFIG).write_text(json.dumps(config))
    return config


def randomize_(model, seed: int) -> None:
    """B is zero at first, which would hide everything; trained copies move too."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                noise = torch.randn(parameter.shape, generator=generator)
                parameter.copy_(0.3 * noise)
            elif parameter.requires_grad:
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))


def quietly(function, *arguments, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return function(*arguments, **options)


def logits(model, adapter: Path | None, inputs: dict, *, seed: int | None = None) -> torch.Tensor:
    """What a model and an adapter give, loaded by PEFT as users do; a seed is for training."""
    model = copy.deepcopy(model)
    if adapter is not None:
        model = quietly(peft.PeftModel.from_pretrained, model, adapter).eval()
    assert {p.dtype for p in model.parameters() if p.is_floating_point()} == {torch.float64}
    if seed is not None:
        model.train()
        torch.manual_seed(seed)
    with torch.no_grad(), float64_truth():
        return model(**copy.deepcopy(inputs)).logits


def folded_model(case: Made, **options) -> tuple[torch.nn.Module, Plan]:
    model = copy.deepcopy(case.model)
    plan = flashnorm.folding(flashnorm.fold_(model, copy.deepcopy(case.inputs), **options))
    assert plan.folded
    return model, plan
