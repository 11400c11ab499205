"""What is attacked: a function for each thing that reads what others wrote."""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from random import Random

from rich.console import Console

from flashnorm.adapters.config import (
    check_plain_lora,
    folded_adapter_config,
    read_adapter_config,
    scaling,
)
from flashnorm.adapters.tensors import read_tensors
from flashnorm.checkpoint.config import check_not_folded, check_not_quantized, folded_config
from flashnorm.checkpoint.engine import open_streamed
from flashnorm.checkpoint.header import Entry, read_header
from flashnorm.checkpoint.source import INDEX, SINGLE, open_source, read_config
from flashnorm.checkpoint.workdir import JOURNAL, Workdir
from flashnorm.cli.inputs import read_inputs, read_plan
from flashnorm.gguf.file import look
from flashnorm.kernels import measurements
from flashnorm.kernels.cpu import crossovers
from flashnorm.kernels.gpu import cached
from flashnorm.marker import marker
from flashnorm.report import show
from flashnorm.runtime.package import store
from tests.attacks import mutate
from tests.attacks.sandbox import Sandbox, header_of, link

Attack = Callable[[Random, Sandbox], None]


def header(rng: Random, box: Sandbox) -> None:
    file = box.scratch / "x.safetensors"
    write_header(rng, box, file)
    read_header(file)


def write_header(rng: Random, box: Sandbox, file: Path, source: Path | None = None) -> None:
    """A damaged safetensors file."""
    good = source or box.single / SINGLE
    if rng.random() < 0.2:
        raw = good.read_bytes()
        end = 8 + int.from_bytes(raw[:8], "little")
        file.write_bytes(mutate.bytes_changed(rng, raw, end=rng.choice((8, end))))
        return
    fields, data = header_of(good)
    text = mutate.text(rng, mutate.changed(rng, fields))
    length = rng.choice(mutate.NUMBERS) % 2**64 if rng.random() < 0.05 else len(text)
    file.write_bytes(length.to_bytes(8, "little") + text + data)


def index(rng: Random, box: Sandbox) -> None:
    place = link(box.sharded, box.scratch / "model", (INDEX,))
    write_index(rng, box, place)
    open_source(place)


def write_index(rng: Random, box: Sandbox, place: Path) -> None:
    good = json.loads((box.sharded / INDEX).read_text())
    (place / INDEX).write_bytes(mutate.text(rng, mutate.changed(rng, good)))


def config(rng: Random, box: Sandbox) -> None:
    write_config(rng, box, box.scratch)
    found = read_config(box.scratch)
    check_not_folded(found)
    check_not_quantized(found)
    done = folded_config(found, box.plan, absent=None, fold_dtype="float32", source="x")
    work = Workdir(box.scratch / "x", "")
    work.path.mkdir()
    work.write_json("config.json", done)


def write_config(rng: Random, box: Sandbox, place: Path, **more: object) -> None:
    good = json.loads((box.single / "config.json").read_text()) | more
    (place / "config.json").write_bytes(mutate.text(rng, mutate.changed(rng, good)))


def marked(rng: Random, box: Sandbox) -> None:
    """A checkpoint that says that it was folded with strict."""
    place = link(box.single, box.scratch / "model", ("config.json",))
    said = marker(box.plan, "strict", "x")
    said["flashnorm"]["absent"] = {"a.weight": [[8], "BF16", 1.0], "b.weight": [[4, 2], "F32", 0]}
    write_config(rng, box, place, **said)
    streamed = open_streamed(place, plan=box.plan)
    str(streamed)
    for _ in streamed.tensors():
        pass


def gguf(rng: Random, box: Sandbox) -> None:
    file = box.scratch / "x.gguf"
    write_gguf(rng, box, file)
    found = look(file)
    for stored in found.tensors[:2]:
        found.values(stored)


def write_gguf(rng: Random, box: Sandbox, file: Path) -> None:
    raw = box.gguf.read_bytes()
    file.write_bytes(mutate.bytes_changed(rng, raw, end=rng.choice((24, 400, 4000))))


def plan(rng: Random, box: Sandbox) -> None:
    file = box.scratch / "plan.json"
    file.write_bytes(mutate.text(rng, mutate.changed(rng, box.plan.to_json())))
    found = read_plan(file)
    found.gains(), found.absorptions(), found.norm_biases(), found.bias_absorptions()
    json.dumps(found.to_json())
    Console(file=io.StringIO()).print(str(found), show(found), markup=False)


def adapter_config(rng: Random, box: Sandbox) -> None:
    write_adapter_config(rng, box, box.scratch)
    found = read_adapter_config(box.scratch)
    check_plain_lora(found)
    scaling(found, "model.layers.0.self_attn.q_proj", 2)
    done = folded_adapter_config(found, box.plan, base="x", folded=None, lora_bias=True)
    json.dumps(done, indent=2)


def write_adapter_config(rng: Random, box: Sandbox, place: Path) -> None:
    good = json.loads((box.adapter / "adapter_config.json").read_text())
    (place / "adapter_config.json").write_bytes(mutate.text(rng, mutate.changed(rng, good)))


def adapter_tensors(rng: Random, box: Sandbox) -> None:
    """Names and shapes as a valid header may have them, that fit no model."""
    good, _ = header_of(box.adapter / "adapter_model.safetensors")
    entries = []
    for name, field in good.items():
        if rng.random() < 0.05:
            parts = name.split(".")
            parts[rng.randrange(len(parts))] = rng.choice((*mutate.UNICODE, *parts))
            name = ".".join(parts)
        shape = list(field["shape"])
        if rng.random() < 0.05:
            shape[rng.randrange(2)] = rng.choice((0, 1, 3, 2**40))
        if rng.random() < 0.05:
            shape = rng.choice((shape[:1], [], [*shape, 1]))
        dtype = "I8" if rng.random() < 0.02 else field["dtype"]
        entries.append(Entry(name, dtype, tuple(shape), 0, 0))
    said = json.loads((box.adapter / "adapter_config.json").read_text())
    said["target_parameters"] = rng.choice(([], [], [], ["weight"], ["q_proj.weight", "x"]))
    read_tensors(entries, said, box.base, box.base.canonical(box.plan))


def inputs(rng: Random, box: Sandbox) -> None:
    if rng.random() < 0.3:
        file = box.scratch / "x.safetensors"
        write_header(rng, box, file)
    else:
        file = box.scratch / "x.json"
        good = [{"input_ids": [[1, 2, 3]], "more": {"mask": [[True, False]], "scale": [0.5]}}]
        file.write_bytes(mutate.text(rng, mutate.changed(rng, good)))
    read_inputs([file])


def journal(rng: Random, box: Sandbox) -> None:
    """What a killed run has left."""
    work = Workdir(box.scratch / "x", "abc")
    work.path.mkdir()
    good = {"fingerprint": "abc", "notes": {SINGLE: 7, "y": 1}}
    (work.path / JOURNAL).write_bytes(mutate.text(rng, mutate.changed(rng, good)))
    (work.path / SINGLE).write_bytes(b"x")
    work.begin()
    work.note(SINGLE)


def package(rng: Random, box: Sandbox) -> None:
    place = box.scratch / "package"
    place.mkdir(mode=0o700)
    (place / store.LIBRARY).write_bytes(b"no code")
    asked = {"torch": "2", "processor": "x"}
    store.write(place, store.Description(asked, ("a", "b")))
    good = json.loads((place / store.DESCRIPTION).read_text())
    (place / store.DESCRIPTION).write_bytes(mutate.text(rng, mutate.changed(rng, good)))
    store.read(place, asked)


def measured(rng: Random, box: Sandbox) -> None:
    row = {"packed": 16, "library": 512, "note": "x"}
    tile = {"rows": 16, "columns": 64, "depth": 64, "warps": 4, "stages": 3, "splits": 1}
    cpu = {"version": 1, "machines": {"m": {"avx2": {"bfloat16 narrow": row}}}}
    gpu = {"version": 1, "devices": {"d": {"k": {"way": "gemm", "note": "x", "tile": tile}}}}
    file = box.scratch / "measured.json"
    for good, parse in ((cpu, crossovers._parse), (gpu, cached._parse)):
        file.write_bytes(mutate.text(rng, mutate.changed(rng, good)))
        measurements.read(file, 1, parse)


QUICK: dict[str, tuple[Attack, int]] = {  # and how often, beside the others
    "header": (header, 6),
    "index": (index, 3),
    "config": (config, 2),
    "marker": (marked, 2),
    "gguf": (gguf, 5),
    "plan": (plan, 3),
    "adapter config": (adapter_config, 2),
    "adapter tensors": (adapter_tensors, 3),
    "inputs": (inputs, 2),
    "journal": (journal, 1),
    "package": (package, 1),
    "measurements": (measured, 1),
}


def cleared(box: Sandbox) -> None:
    """Nothing in the scratch directory."""
    for file in box.scratch.iterdir():
        if file.is_dir() and not file.is_symlink():
            shutil.rmtree(file)
        else:
            file.unlink()
