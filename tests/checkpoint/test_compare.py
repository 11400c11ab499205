"""Weights alone: a fold against what the plan makes of its source; every wrong bit is named."""

from __future__ import annotations

import json
import os
import pickle
import random
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from flashnorm import (
    CheckpointError,
    FoldError,
    Plan,
    Site,
    algebra,
    fold_checkpoint,
    verify_weights,
)
from flashnorm.checkpoint import blocks, compare, stream
from flashnorm.checkpoint.contents import match_tensors
from flashnorm.checkpoint.header import read_header
from flashnorm.checkpoint.source import open_source
from flashnorm.checkpoint.target import plan_target
from flashnorm.plan import Consumer, Gain, Span

from .helpers import (
    HIDDEN,
    INDEX,
    SINGLE,
    llama_plan,
    llama_tensors,
    load,
    write_checkpoint,
    write_index,
    write_raw,
)
from .test_biases import layer_plan, layer_tensors

LAYERS, SHARDS = 2, 3
PLAN = llama_plan(LAYERS)
pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """A checkpoint of three shards and its fold; not to be written to."""
    folder = tmp_path_factory.mktemp("pair")
    write_checkpoint(folder / "a", llama_tensors(LAYERS), shards=SHARDS)
    fold_checkpoint(folder / "a", folder / "b", plan=PLAN)
    return folder


@pytest.fixture
def a(pair):
    return pair / "a"


@pytest.fixture
def b(pair, tmp_path):
    """A fold of `a` to be spoilt."""
    return Path(shutil.copytree(pair / "b", tmp_path / "b"))


def proved(a, b, plan=PLAN, **options):
    report = verify_weights(a, b, plan=plan, **options)
    assert report.ok, str(report)
    return report


def wrong(a, b, plan=PLAN):
    report = verify_weights(a, b, plan=plan)
    assert not report.ok
    assert "is NOT" in str(report)
    return report


def only_file(a, b, match, file):
    """The one difference of a file; no tensor is wrong."""
    report = wrong(a, b)
    assert not report.wrong_count
    (found,) = report.files
    assert found.file == file
    assert match in found.problem
    return found


def places(path):
    """(file, begin in the file, entry) of every tensor."""
    source = open_source(path)
    for name, place in source.where.items():
        yield name, path / place.shard, len(source.shards[place.shard].raw), place.entry


def flip(file, byte, bit):
    with open(file, "r+b") as opened:
        opened.seek(byte)
        old = opened.read(1)[0]
        opened.seek(byte)
        opened.write(bytes([old ^ 1 << bit]))


def rewrite_header(file, change):
    """Another header over the same tensors."""
    header, data = read_header(file), file.read_bytes()
    fields = json.loads(header.raw[8:])
    write_raw(file, change(fields) or fields, data[len(header.raw) :])


# --- what is right ----------------------------------------------------------------------------


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_a_fold_is_proved(tmp_path, dtype, shards, strict):
    tensors = llama_tensors(LAYERS, dtype=dtype, tied=True)
    config = {"tie_word_embeddings": True}
    a = write_checkpoint(tmp_path / "a", tensors, shards=shards, **config)
    plan, seen = llama_plan(LAYERS, untied=True), []
    fold_checkpoint(a, tmp_path / "b", plan=plan, strict=strict)
    report = proved(a, tmp_path / "b", plan, progress=lambda *said: seen.append(said))
    assert report.mode == ("strict" if strict else "compat")
    assert report.compared == len(load(tmp_path / "b"))
    assert report.nbytes == sum(t.nbytes for t in load(tmp_path / "b").values())
    assert seen[-1][:2] == (report.nbytes, report.nbytes)
    assert report.notes == ()


@pytest.mark.parametrize("size", [1 << 9, 1 << 22], ids=["small blocks", "one block"])
@pytest.mark.parametrize("strict", [False, True])
def test_biases_and_centering_are_proved(tmp_path, monkeypatch, size, strict):
    monkeypatch.setattr(algebra, "BLOCK_ELEMENTS", size)
    monkeypatch.setattr(blocks, "FOLD_BYTES", size)
    monkeypatch.setattr(blocks, "CACHED_BYTES", size)
    monkeypatch.setattr(compare, "PART_BYTES", 64)
    tensors, plan = layer_tensors(torch.bfloat16), layer_plan()
    a, b = write_checkpoint(tmp_path / "a", tensors, shards=2), tmp_path / "b"
    fold_checkpoint(a, b, plan=plan, strict=strict)
    proved(a, b, plan)
    rng = random.Random(0)
    for name, file, begin, entry in places(b):
        index = sorted(rng.sample(range(entry.numel), 2))
        for at in index:
            flip(file, begin + entry.start + 2 * at, 0)
        (found,) = wrong(a, b, plan).wrong
        flat = sum(
            i * s for i, s in zip(found.first, torch.empty(entry.shape).stride(), strict=True)
        )
        assert (found.tensor, found.count, flat) == (name, 2, index[0])
        for at in index:
            flip(file, begin + entry.start + 2 * at, 0)
    proved(a, b, plan)


def test_a_copy_is_a_copy(a, tmp_path):
    """Without a marker nothing folds, and no plan is made; weights may be of any kind."""
    b = tmp_path / "b"
    shutil.copytree(a, b)
    (a.parent / "pytorch_model.bin").write_bytes(b"")
    report = verify_weights(a, b)
    assert report.ok
    assert report.mode == "copy"
    assert "compared as a copy" in report.notes[0]
    name, file, begin, entry = next(places(b))
    flip(file, begin + entry.start, 3)
    (found,) = verify_weights(a, b).wrong
    assert found.tensor == name


def test_nothing_to_fold(a, tmp_path):
    plan = replace(PLAN, sites=())
    fold_checkpoint(a, tmp_path / "b", plan=plan)
    assert proved(a, tmp_path / "b", plan).mode == "copy"
    assert verify_weights(a, tmp_path / "b").ok


def test_two_folds_that_are_equal_are_copies(b, tmp_path):
    shutil.copytree(b, tmp_path / "c")
    report = verify_weights(b, tmp_path / "c")
    assert report.ok
    assert "both were folded before" in report.notes[0]


@pytest.mark.parametrize("shards", [1, 2, 5])
def test_tensors_in_other_files_are_found_by_name(a, b, tmp_path, shards):
    c, tensors = tmp_path / "c", load(b)
    write_checkpoint(c, dict(reversed(tensors.items())), shards=shards)
    shutil.copy(b / "config.json", c)
    report = proved(a, c)
    assert report.compared == len(tensors)
    assert any("other files" in note for note in report.notes)
    name, file, begin, entry = list(places(c))[3]
    flip(file, begin + entry.start + 5, 3)
    (found,) = wrong(a, c).wrong
    assert (found.tensor, found.file, found.first) == (name, file.name, (0, 2)[-len(entry.shape) :])


def test_another_order_in_the_same_files_is_a_note(a, b):
    for file in b.glob("*.safetensors"):
        tensors = load_file(file)
        save_file(dict(reversed(tensors.items())), file, metadata={"format": "pt"})
        rewrite_header(file, lambda fields: dict(reversed(fields.items())))
    assert any("another order" in note for note in proved(a, b).notes)


def test_papers_and_remarks_are_notes(a, b):
    (b / "README.md").write_text("# my fold")
    edit_config(b, lambda c: c["flashnorm"].update(source="elsewhere", version="0.0.9"))
    notes = " ".join(proved(a, b).notes)
    assert "README.md" in notes
    assert 'version "0.0.9"' in notes
    assert 'source "elsewhere"' in notes


# --- what is wrong ----------------------------------------------------------------------------


def test_one_bit_of_any_tensor_is_named(a, b):
    rng = random.Random(1)
    before = {name: value.clone() for name, value in load(b).items()}  # no mapping
    for name, file, begin, entry in places(b):
        at, bit = rng.randrange(entry.numel), rng.randrange(16)
        byte = begin + entry.start + 2 * at + bit // 8
        flip(file, byte, bit % 8)
        report = wrong(a, b)
        (found,) = report.wrong
        assert (found.tensor, found.file, found.what) == (name, file.name, "values")
        assert (found.count, found.numel) == (1, entry.numel)
        now, old = load(b)[name][found.first], before[name][found.first]
        assert found.found.startswith(repr(now.item()))
        assert found.expected.startswith(repr(old.item()))
        assert not now.isfinite() or found.largest == abs(now.double() - old.double())
        said = " ".join(str(report).split())
        assert f"{name} in {file.name} {list(found.first)} is {found.found}, expected" in said
        assert json.loads(json.dumps(report.to_json()))["wrong"][0]["tensor"] == name
        flip(file, byte, bit % 8)
    proved(a, b)


@pytest.mark.parametrize(
    ("dtype", "said"),
    [
        (torch.int64, "7 (0x0000000000000007)"),
        (torch.int32, "7 (0x00000007)"),
        (torch.uint8, "7 (0x07)"),
        (torch.int8, "7 (0x07)"),
        (torch.bool, "True (0x07)"),
        (torch.float8_e4m3fn, "0.013671875 (0x07)"),
        (torch.complex64, "0x0000000000000007"),
    ],
)
def test_elements_of_any_dtype_are_shown(tmp_path, dtype, said):
    tensors = {"odd": torch.zeros(3, 7, dtype=torch.uint8), "x": torch.zeros(3, 7).to(dtype)}
    a = write_checkpoint(tmp_path / "a", tensors)
    b = Path(shutil.copytree(a, tmp_path / "b"))
    file, header = b / SINGLE, read_header(b / SINGLE)
    entry = next(e for e in header.entries if e.name == "x")
    width = entry.nbytes // entry.numel
    for bit in range(3):
        flip(file, len(header.raw) + entry.start + 17 * width, bit)
    (found,) = verify_weights(a, b).wrong
    assert (found.tensor, found.first, found.count) == ("x", (2, 3), 1)
    assert found.found == said
    assert (found.largest is None) == dtype.is_complex


def test_elements_below_a_byte_are_counted_as_bytes(tmp_path):
    a = write_checkpoint(tmp_path / "a", {"y": torch.zeros(2)})
    entry = {"dtype": "F4", "shape": [3, 8], "data_offsets": [0, 12]}
    write_raw(a / SINGLE, {"x": entry}, bytes(12))
    b = Path(shutil.copytree(a, tmp_path / "b"))
    flip(b / SINGLE, (b / SINGLE).stat().st_size - 2, 5)
    (found,) = verify_weights(a, b).wrong
    assert (found.first, found.found, found.count) == ((10,), "32 (0x20)", 1)


def test_bits_count_where_values_are_equal(tmp_path):
    a = write_checkpoint(tmp_path / "a", {"x": torch.tensor([0.0, float("nan")])})
    b = Path(shutil.copytree(a, tmp_path / "b"))
    size = (b / SINGLE).stat().st_size
    assert verify_weights(a, b).ok
    flip(b / SINGLE, size - 5, 7)
    (found,) = verify_weights(a, b).wrong
    assert (found.found, found.largest) == ("-0.0 (0x80000000)", 0.0)
    flip(b / SINGLE, size - 4, 0)
    report = verify_weights(a, b)
    assert report.wrong[0].count == 2
    assert report.to_json()["wrong"][0]["largest"] == "nan"


def test_swapped_tensors(a, b):
    name = "model.layers.1.self_attn.{}_proj.weight"
    pair = {name.format("q"): name.format("k"), name.format("k"): name.format("q")}
    for file in b.glob("*.safetensors"):
        rewrite_header(file, lambda f: {pair.get(k, k): v for k, v in f.items()})
    assert {one.tensor for one in wrong(a, b).wrong} == set(pair)


def edit_tensors(path, change):
    """Change the tensors of a fold; the index stays true."""
    tensors, places = {}, {}
    for file in sorted(path.glob("*.safetensors")):
        found = load_file(file)
        change(found)
        save_file(found, file, metadata={"format": "pt"})
        tensors |= found
        places |= dict.fromkeys(found, file.name)
    write_index(path, places, tensors)


def test_missing_and_extra_tensors(a, b):
    def change(found):
        if found.pop("model.norm.weight", None) is not None:
            found["model.extra.weight"] = torch.ones(2, 3)

    edit_tensors(b, change)
    report = wrong(a, b)
    said = {(one.tensor, one.what, one.found, one.expected) for one in report.wrong}
    assert said == {
        ("model.norm.weight", "missing", "", f"BF16 [{HIDDEN}]"),
        ("model.extra.weight", "extra", "F32 [2, 3]", ""),
    }
    assert any("weight_map" in one.problem for one in report.files)


@pytest.mark.parametrize("what", ["dtype", "shape"])
def test_another_dtype_or_shape(a, b, what):
    def change(found):
        for name in found.keys() & {"lm_head.weight"}:
            value = found[name]
            found[name] = value.float() if what == "dtype" else value.view(HIDDEN, -1)

    edit_tensors(b, change)
    (found,) = wrong(a, b).wrong
    assert (found.tensor, found.what) == ("lm_head.weight", what)


@pytest.mark.parametrize("gain", [gain.parameter for gain in PLAN.gains()][-2:])
def test_a_gain_that_was_not_folded(a, b, gain):
    """The gain and its readers as they were, which computes the same: quick says what is wrong."""
    before = load(a)
    site = next(s for s in PLAN.sites if s.gain.parameter == gain)
    names = {gain, *(c.parameter for c in site.consumers)}
    edit_tensors(b, lambda found: found.update({k: before[k] for k in found.keys() & names}))
    report = wrong(a, b)
    assert {one.tensor for one in report.wrong} == names
    assert not report.files


def test_a_fold_with_another_plan(a, tmp_path):
    plan = replace(PLAN, sites=PLAN.sites[1:])
    fold_checkpoint(a, tmp_path / "b", plan=plan)
    proved(a, tmp_path / "b", plan)
    report = wrong(a, tmp_path / "b")
    site = PLAN.sites[0]
    names = {site.gain.parameter, *(c.parameter for c in site.consumers)}
    assert {one.tensor for one in report.wrong} == names
    assert [one.file for one in report.files] == ["config.json"]


def test_a_wrong_reference(b, tmp_path):
    other = write_checkpoint(tmp_path / "other", llama_tensors(LAYERS, seed=1), shards=SHARDS)
    report = wrong(other, b)
    gains = {gain.parameter for gain in PLAN.gains()}
    assert {one.tensor for one in report.wrong} == load(b).keys() - gains
    assert all(one.largest > 0 for one in report.wrong)


def test_what_differs_is_bounded(tmp_path):
    tensors = {f"x{i}": torch.zeros(2) for i in range(250)}
    a = write_checkpoint(tmp_path / "a", tensors)
    b = write_checkpoint(tmp_path / "b", {k: v + 1 for k, v in tensors.items()})
    report = verify_weights(a, b)
    assert (len(report.wrong), report.wrong_count) == (100, 250)
    assert "and 230 more tensors" in str(report)


def edit_config(path, change):
    config = json.loads((path / "config.json").read_text())
    change(config)
    (path / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda c: c.update(rms_norm_eps=1e-5), "rms_norm_eps is 1e-05, expected 1e-06"),
        (lambda c: c.update(rms_norm_eps=True), "rms_norm_eps is true"),
        (lambda c: c.pop("hidden_size"), "hidden_size is missing, expected 48"),
        (lambda c: c.update(sliding_window=3), "sliding_window is 3, expected nothing"),
        (lambda c: c["flashnorm"]["folded"].pop(), "flashnorm.folded is"),
        (lambda c: c.update(flashnorm_folded=1), "flashnorm_folded is 1, expected true"),
        (lambda c: c.update(vocab_size=96.0), "vocab_size is 96.0, expected 96"),
    ],
)
def test_a_changed_config(a, b, change, match):
    edit_config(b, change)
    only_file(a, b, match, "config.json")


def test_a_changed_header_and_index(a, b):
    file = sorted(b.glob("*.safetensors"))[1]
    rewrite_header(file, lambda fields: fields["__metadata__"].update(format="np"))
    only_file(a, b, '__metadata__.format is "np", expected "pt"', file.name)
    shutil.copy(a / file.name, b)  # headers are equal, and now weights are not
    assert not wrong(a, b).files
    shutil.copy(a.parent / "b" / file.name, b)
    index = json.loads((b / INDEX).read_text())
    index["metadata"]["total_size"] += 1
    (b / INDEX).write_text(json.dumps(index))
    only_file(a, b, "metadata.total_size", INDEX)


def test_other_files(a, b):
    (b / "tokenizer.json").write_text('{"version": "1.1"}')
    only_file(a, b, "from byte 15 on", "tokenizer.json")
    (b / "tokenizer.json").unlink()
    only_file(a, b, "is missing", "tokenizer.json")
    shutil.copy(a / "tokenizer.json", b)
    for name in ("adapter_config.json", "license.py", "pytorch_model.bin", "old.safetensors"):
        (b / name).write_text("{}")
        only_file(a, b, "would not write it", name)
        (b / name).unlink()
    with open(b / "chat_template.jinja", "a") as file:
        file.write(" ")
    only_file(a, b, "from byte 14 on", "chat_template.jinja")


# --- what cannot be told ----------------------------------------------------------------------


def refused(a, b, match, error=CheckpointError, **options):
    with pytest.raises(error, match=match):
        verify_weights(a, b, **options)


def test_a_truncated_shard(a, b):
    file = sorted(b.glob("*.safetensors"))[1]
    os.truncate(file, file.stat().st_size - 1)
    refused(a, b, rf"/b: {file.name} is truncated", plan=PLAN)
    file.unlink()
    refused(a, b, rf"/b: the shard {file.name} .* missing", plan=PLAN)


def test_folds_of_others_are_refused(a, b):
    refused(b, a, r"/b was folded already, as flashnorm_folded .* name the original first")
    edit_config(b, lambda c: c["flashnorm"].update(fold_dtype="float16"))
    refused(a, b, "was folded in float16.*without --quick", plan=PLAN)
    edit_config(b, lambda c: c["flashnorm"].update(mode="other"))
    refused(a, b, "folded by another tool, as flashnorm_folded.*without --quick")
    edit_config(b, lambda c: c.pop("flashnorm"))
    refused(a, b, "folded by another tool, as flashnorm_folded.*without --quick")
    edit_config(b, lambda c: c.pop("flashnorm_folded") and c.update(flash_norm=True))
    refused(a, b, "folded by another tool, as flash_norm.*without --quick")


def test_a_marker_that_was_lost(a, b):
    edit_config(b, lambda c: [c.pop(key) for key in ("flashnorm", "flashnorm_folded")])
    report = verify_weights(a, b)
    assert report.wrong_count
    assert "no marker of a fold, so it was compared as a copy" in report.notes[0]
    assert any("flashnorm is missing" in one.problem for one in wrong(a, b).files)


def test_no_directories_are_refused(a, tmp_path):
    (tmp_path / "x.gguf").write_bytes(b"GGUF")
    refused(tmp_path / "x.gguf", a, r"x\.gguf is a GGUF file.*without --quick")
    refused(a, tmp_path, r"is a GGUF file.*without --quick")
    refused("some/model", a, r"some/model is no directory.*without --quick")


def test_what_the_fold_refuses(tmp_path):
    tensors = llama_tensors(LAYERS, dtype=torch.float16)
    a = write_checkpoint(tmp_path / "a", tensors)
    fold_checkpoint(a, tmp_path / "b", plan=PLAN)
    shutil.rmtree(a)
    tensors["model.norm.weight"][3] = tensors["lm_head.weight"][0, 3] = 6e4
    a = write_checkpoint(tmp_path / "a", tensors)
    refused(a, tmp_path / "b", r"lm_head\.weight: .* overflows", FoldError, plan=PLAN)


@pytest.mark.parametrize("side", ["a", "b"])
@pytest.mark.parametrize("how", ["shorter", "longer", "replaced", "gone"])
def test_a_file_that_changes_meanwhile(a, b, tmp_path, side, how):
    a = Path(shutil.copytree(a, tmp_path / "a"))
    file = sorted((tmp_path / side).glob("*.safetensors"))[1]

    def change(done, total, name):
        if name != file.name or not file.exists():
            return
        if how == "shorter":
            os.truncate(file, file.stat().st_size // 2)
        elif how == "longer":
            os.truncate(file, file.stat().st_size + 1)
        else:
            shutil.copy(file, tmp_path / "new")
            os.replace(tmp_path / "new", file) if how == "replaced" else file.unlink()

    refused(
        a, b, f"/{side}/{file.name} changed while it was being read", plan=PLAN, progress=change
    )


def test_a_header_that_changed_before_its_turn(a, b):
    last = sorted(b.glob("*.safetensors"))[-1]

    def change(done, total, name):
        if name != last.name:
            rewrite_header(last, lambda fields: fields["__metadata__"].update(format="np"))

    refused(a, b, f"{last.name} is not the file .*: it changed", plan=PLAN, progress=change)


def test_a_fold_sees_that_its_source_changes(a, tmp_path):
    a = Path(shutil.copytree(a, tmp_path / "a"))
    file = sorted(a.glob("*.safetensors"))[1]

    def change(done, total, name):
        if name == file.name:
            os.truncate(file, file.stat().st_size + 1)

    with pytest.raises(CheckpointError, match=f"{file.name} changed while it was being read"):
        fold_checkpoint(a, tmp_path / "dst", plan=PLAN, progress=change)
    assert not (tmp_path / "dst").exists()


# --- how it works -----------------------------------------------------------------------------


def test_shards_can_be_checked_elsewhere(a, b):
    """Arguments and findings go through pickle."""
    name, file, begin, entry = list(places(b))[-1]
    flip(file, begin + entry.start, 0)
    target = plan_target(open_source(a), PLAN, strict=False, name="a")
    found = []
    for path, shard in match_tensors(target, open_source(b)).shards:
        shard, values = pickle.loads(pickle.dumps((shard, target.values)))
        done = compare.check_shard(a / shard.name, b / path, shard, values, lambda count: None)
        found += pickle.loads(pickle.dumps(done))
    assert [one.tensor for one in found] == [name]


@pytest.mark.parametrize("workers", [1, 7])
def test_any_number_of_workers_finds_the_same(a, b, monkeypatch, workers):
    monkeypatch.setattr(blocks, "CACHED_BYTES", 64)
    monkeypatch.setattr(blocks, "FOLD_BYTES", 192)
    name, file, begin, entry = next(one for one in places(b) if one[0] == "lm_head.weight")
    for at in (5, 900, 901, entry.numel - 1):
        flip(file, begin + entry.start + 2 * at, 1)
    once = wrong(a, b).wrong
    monkeypatch.setattr(stream, "WORKERS", workers)
    monkeypatch.setattr(stream, "AHEAD", workers)
    assert wrong(a, b).wrong == once
    assert (once[0].tensor, once[0].count) == (name, 4)


CHILD = """
import resource, sys
from pathlib import Path
from flashnorm import Plan, verify_weights
from flashnorm.plan import Consumer, Gain, Site, Span

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

def verified(a, b):
    width = 1024
    reader = Consumer("w.weight", 1, (Span(0, 0, width),))
    site = Site("n", "rms", width, 1e-6, "folded", "", (reader,), Gain("n.weight"))
    return verify_weights(a, b, plan=Plan((site,)))

folder = Path(sys.argv[1])
small = [verified(folder / "small", folder / name).ok for name in ("small-b", "small-c")]
before = peak()
large = [verified(folder / "large", folder / name).ok for name in ("large-b", "large-c")]
print(small, large, peak() - before)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="there is no resource.getrusage")
def test_memory_is_bounded(tmp_path):
    """Also where every element is wrong: 64 MB of weights on each side."""
    width = 1024
    reader = Consumer("w.weight", 1, (Span(0, 0, width),))
    plan = Plan((Site("n", "rms", width, 1e-6, "folded", "", (reader,), Gain("n.weight")),))
    for size, rows in (("small", 8), ("large", 1 << 14)):
        rng = torch.Generator().manual_seed(0)
        tensors = {
            "w.weight": torch.randn(rows, width, generator=rng).bfloat16(),
            "n.weight": 1 + 0.3 * torch.randn(width, generator=rng).bfloat16(),
            "c.weight": torch.randn(rows, width, generator=rng).bfloat16(),
        }
        a = write_checkpoint(tmp_path / size, tensors)
        fold_checkpoint(a, tmp_path / f"{size}-b", plan=plan)
        c = Path(shutil.copytree(tmp_path / f"{size}-b", tmp_path / f"{size}-c"))
        save_file({k: -v for k, v in tensors.items()}, c / SINGLE, metadata={"format": "pt"})
    child = [sys.executable, "-c", CHILD, str(tmp_path)]
    ran = subprocess.run(child, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    verdicts, _, grown = ran.stdout.strip().rpartition(" ")
    assert verdicts == "[True, False] [True, False]"
    assert int(grown) < 48e6
