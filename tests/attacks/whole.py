"""Attacks on what users call: a damaged checkpoint, adapter or GGUF file from end to end."""

from __future__ import annotations

import shutil
from random import Random

import flashnorm
from flashnorm.adapters.config import WEIGHTS
from flashnorm.checkpoint.source import INDEX, SINGLE
from flashnorm.plan import Plan
from tests.attacks import mutate, targets
from tests.attacks.sandbox import Sandbox, link
from tests.attacks.targets import Attack


def fold(rng: Random, box: Sandbox) -> None:
    place, kind = box.scratch / "model", rng.choice(("header", "index", "shard", "config", "plan"))
    plan = box.plan
    if kind == "header":
        link(box.single, place, (SINGLE,))
        targets.write_header(rng, box, place / SINGLE)
    elif kind == "index":
        link(box.sharded, place, (INDEX,))
        targets.write_index(rng, box, place)
    elif kind == "shard":
        name = "model-00001-of-00002.safetensors"
        link(box.sharded, place, (name,))
        targets.write_header(rng, box, place / name, box.sharded / name)
    elif kind == "config":
        link(box.single, place, ("config.json",))
        targets.write_config(rng, box, place)
    else:
        link(box.single, place)
        plan = Plan.from_json(mutate.changed(rng, plan.to_json()))
    flashnorm.fold_checkpoint(place, box.target, plan=plan, strict=rng.random() < 0.3)


def inspect(rng: Random, box: Sandbox) -> None:
    place = link(box.single, box.scratch / "model", ("config.json",))
    targets.write_config(rng, box, place)
    flashnorm.inspect(place)


def adapter(rng: Random, box: Sandbox) -> None:
    kind = rng.choice(("config", "header", "plan"))
    place, plan = box.scratch / "adapter", box.plan
    if kind == "config":
        link(box.adapter, place, ("adapter_config.json",))
        targets.write_adapter_config(rng, box, place)
    elif kind == "header":
        link(box.adapter, place, (WEIGHTS,))
        targets.write_header(rng, box, place / WEIGHTS, box.adapter / WEIGHTS)
    else:
        link(box.adapter, place)
        plan = Plan.from_json(mutate.changed(rng, plan.to_json()))
    flashnorm.fold_adapter(place, plan, box.target, base=box.single)


def load_gguf(rng: Random, box: Sandbox) -> None:
    file = box.scratch / "x.gguf"
    targets.write_gguf(rng, box, file)
    flashnorm.load_gguf(file)


WHOLE: dict[str, tuple[Attack, int]] = {
    "fold_checkpoint": (fold, 5),
    "inspect": (inspect, 2),
    "fold_adapter": (adapter, 3),
    "load_gguf": (load_gguf, 2),
}


def cleared(box: Sandbox) -> None:
    """Neither scratch nor target."""
    targets.cleared(box)
    if box.target.exists():
        shutil.rmtree(box.target)
