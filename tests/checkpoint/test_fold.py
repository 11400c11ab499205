"""Round trips: what a folded checkpoint holds, tensor by tensor and byte by byte."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

import flashnorm
from flashnorm import Plan, Site, algebra, fold_checkpoint
from flashnorm.plan import Cancelling

from .helpers import (
    INDEX,
    SINGLE,
    header_order,
    llama_plan,
    llama_tensors,
    load,
    snapshot,
    write_checkpoint,
)


def test_nothing_to_fold_gives_a_copy(tmp_path):
    source = write_checkpoint(tmp_path / "src", llama_tensors(2))
    plan = Plan((Site("model.norm", "rms", 48, 1e-6, "kept", "the head is tied"),))
    with pytest.warns(UserWarning, match="no gain of this checkpoint folds"):
        assert fold_checkpoint(source, tmp_path / "dst", plan=plan) == plan
    assert snapshot(tmp_path / "dst") == snapshot(source)


DTYPES = [torch.bfloat16, torch.float16, torch.float32, torch.float64]
LAYERS = 3
# A few of any thousand random fp16 weights are that small; one test below counts them.
pytestmark = pytest.mark.filterwarnings("ignore:.*became subnormal")


def expected(tensors, plan):
    """The fold in memory, by the same algebra."""
    after = {key: value.clone() for key, value in tensors.items()}
    for new, old in plan.untied:
        after[new] = after[old].clone()
    for name, pairs in plan.absorptions().items():
        for gain, consumer in pairs:
            g = algebra.effective_gain(tensors[gain.parameter], gain)
            algebra.fold_gain_(after[name], g, consumer.axis, consumer.spans)
    for gain in plan.gains():
        algebra.identity_gain_(after[gain.parameter], gain)
    return after


def assert_same(found, wanted):
    assert found.keys() == wanted.keys()
    for key in wanted:
        assert found[key].dtype == wanted[key].dtype
        assert torch.equal(found[key], wanted[key]), key


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("offset", [0.0, 1.0])
@pytest.mark.parametrize("shards", [1, 3])
def test_compat_equals_the_fold_in_memory(tmp_path, dtype, offset, shards):
    tensors = llama_tensors(LAYERS, dtype=dtype, offset=offset)
    src = write_checkpoint(tmp_path / "src", tensors, shards=shards)
    before = snapshot(src)
    plan = llama_plan(LAYERS, offset=offset)
    assert fold_checkpoint(src, tmp_path / "dst", plan=plan) is plan
    assert_same(load(tmp_path / "dst"), expected(tensors, plan))
    assert snapshot(src) == before
    assert not list(tmp_path.glob(".*")), "nothing stays beside the target"


def test_a_scale_that_a_model_in_memory_loses_stays_on_disk(tmp_path):
    src, plan = write_checkpoint(tmp_path / "src", llama_tensors(1)), llama_plan(1)
    cancelled = replace(plan, cancellings=(Cancelling(plan.sites[0].path),))
    fold_checkpoint(src, tmp_path / "dst", plan=plan)
    fold_checkpoint(src, tmp_path / "again", plan=cancelled)
    assert snapshot(tmp_path / "again") == snapshot(tmp_path / "dst")


def test_the_fold_keeps_the_function_in_float64(tmp_path):
    """norm(x)·g Wᵀ = norm(x) W*ᵀ, from the files alone, with no algebra function between."""
    tensors = llama_tensors(1, dtype=torch.float64, offset=1.0)
    src = write_checkpoint(tmp_path / "src", tensors)
    fold_checkpoint(src, tmp_path / "dst", plan=llama_plan(1, offset=1.0))
    after = load(tmp_path / "dst")
    x = torch.randn(7, 48, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    for norm, reader in (
        ("model.layers.0.input_layernorm", "model.layers.0.self_attn.k_proj"),
        ("model.layers.0.post_attention_layernorm", "model.layers.0.mlp.up_proj"),
        ("model.norm", "lm_head"),
    ):
        y = [
            (x * (1 + part[f"{norm}.weight"])) @ part[f"{reader}.weight"].T
            for part in (tensors, after)
        ]
        torch.testing.assert_close(y[1], y[0], rtol=0, atol=48 * 2.0**-52)
        assert not torch.equal(tensors[f"{reader}.weight"], after[f"{reader}.weight"])


@pytest.mark.parametrize("shards", [1, 3])
def test_compat_keeps_headers_order_and_files(tmp_path, shards):
    tensors = llama_tensors(LAYERS)
    src = write_checkpoint(tmp_path / "src", tensors, shards=shards)
    (src / "original").mkdir()
    (src / "original" / "params.json").write_text("{}")
    for stray in ("pytorch_model.bin", "original/consolidated.00.pth", "model.gguf", "a.ckpt"):
        (src / stray).write_bytes(b"weights before the fold")
    (src / "adapter_model.safetensors").write_bytes(b"trained on the original base")
    (src / "pytorch_model.bin.index.json").write_text("{}")
    dst = tmp_path / "dst"
    fold_checkpoint(src, dst, plan=llama_plan(LAYERS))
    files = {"config.json", "tokenizer.json", "chat_template.jinja", "original/params.json"}
    for file in src.glob("model*.safetensors"):
        files.add(file.name)
        length = 8 + int.from_bytes(file.read_bytes()[:8], "little")
        assert (dst / file.name).read_bytes()[:length] == file.read_bytes()[:length]
    if shards > 1:
        files.add(INDEX)
        assert (dst / INDEX).read_bytes() == (src / INDEX).read_bytes()
    assert set(snapshot(dst)) == files


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("offset", [0.0, 1.0])
def test_strict_removes_the_gains_and_keeps_the_rest_true(tmp_path, shards, offset):
    tensors = llama_tensors(LAYERS, offset=offset)
    # A Llama does not begin with gains of zero, so here it is a model of one's own.
    own = {"model_type": "custom"} if offset else {}
    src = write_checkpoint(tmp_path / "src", tensors, shards=shards, **own)
    plan, dst = llama_plan(LAYERS, offset=offset), tmp_path / "dst"
    fold_checkpoint(src, dst, plan=plan, strict=True)
    gains = {gain.parameter for gain in plan.gains()}
    wanted = {k: v for k, v in expected(tensors, plan).items() if k not in gains}
    assert_same(load(dst), wanted)
    for file in src.glob("*.safetensors"):
        kept = [name for name in header_order(file) if name not in gains]
        assert header_order(dst / file.name) == kept
    if shards > 1:
        check_index(src, dst, wanted)


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("shards", [1, 3])
def test_untie_adds_the_head_beside_its_source(tmp_path, shards, strict):
    tensors = llama_tensors(LAYERS, tied=True)
    nested = {"model_type": "custom", "text_config": {"tie_word_embeddings": True}}
    config = {"tie_word_embeddings": True, **nested}
    src = write_checkpoint(tmp_path / "src", tensors, shards=shards, **config)
    plan, dst = llama_plan(LAYERS, untied=True), tmp_path / "dst"
    fold_checkpoint(src, dst, plan=plan, strict=strict)
    wanted = expected(tensors, plan)
    if strict:
        wanted = {k: v for k, v in wanted.items() if "norm" not in k}
    assert_same(load(dst), wanted)
    assert torch.equal(wanted["model.embed_tokens.weight"], tensors["model.embed_tokens.weight"])
    after = json.loads((dst / "config.json").read_text())
    assert after["tie_word_embeddings"] is False
    assert after["text_config"]["tie_word_embeddings"] is False
    if shards > 1:
        check_index(src, dst, wanted)
        weight_map = json.loads((dst / INDEX).read_text())["weight_map"]
        assert weight_map["lm_head.weight"] == weight_map["model.embed_tokens.weight"]


def check_index(src, dst, wanted):
    index = json.loads((dst / INDEX).read_text())
    before = json.loads((src / INDEX).read_text())["weight_map"]
    holds = {n: f.name for f in dst.glob("*.safetensors") for n in header_order(f)}
    assert index["weight_map"] == holds
    assert [key for key in index["weight_map"] if key in before] == [
        k for k in before if k in holds
    ]
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in wanted.values())
    assert index["metadata"]["total_parameters"] == sum(t.numel() for t in wanted.values())


def test_untie_folds_a_stored_head_in_place(tmp_path):
    tensors = llama_tensors(1, tied=True)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    src = write_checkpoint(tmp_path / "src", tensors, tie_word_embeddings=True)
    plan = llama_plan(1, untied=True)
    fold_checkpoint(src, tmp_path / "dst", plan=plan)
    assert_same(load(tmp_path / "dst"), expected(tensors, plan))


def test_names_may_lack_the_prefix_of_the_base_model(tmp_path):
    tensors = {key.removeprefix("model."): value for key, value in llama_tensors(1).items()}
    src = write_checkpoint(tmp_path / "src", tensors)
    plan = llama_plan(1)
    fold_checkpoint(src, tmp_path / "dst", plan=plan)
    wanted = expected(llama_tensors(1), plan)
    assert_same(load(tmp_path / "dst"), {k.removeprefix("model."): v for k, v in wanted.items()})


def test_a_model_of_ones_own_has_its_own_names(tmp_path):
    tensors = llama_tensors(1)
    src = write_checkpoint(tmp_path / "src", tensors, model_type="custom")
    plan = llama_plan(1)
    fold_checkpoint(src, tmp_path / "dst", plan=plan)
    assert_same(load(tmp_path / "dst"), expected(tensors, plan))


def test_the_marker_says_what_was_done(tmp_path):
    src = write_checkpoint(tmp_path / "src", llama_tensors(1, tied=True), custom=[1.5])
    plan, dst = llama_plan(1, head=False), tmp_path / "dst"
    fold_checkpoint(src, dst, plan=plan)
    before = json.loads((src / "config.json").read_text())
    after = json.loads((dst / "config.json").read_text())
    assert after.pop("flashnorm_folded") is True
    assert after.pop("flashnorm") == {
        "version": flashnorm.__version__,
        "mode": "compat",
        "folded": [
            "model.layers.0.input_layernorm.weight",
            "model.layers.0.post_attention_layernorm.weight",
        ],
        "kept": ["model.norm"],
        "centered": [],
        "fold_dtype": "float32",
        "source": "src",
    }
    assert after == before
    assert str(tmp_path) not in (dst / "config.json").read_text()


@pytest.mark.parametrize(
    ("offset", "dtype", "strict", "wanted"),
    [
        (1.0, torch.bfloat16, True, ("strict", "float64")),
        (0.0, torch.float64, False, ("compat", "float64")),
        (0.0, torch.float16, False, ("compat", "float32")),
    ],
)
def test_the_marker_names_the_mode_and_the_dtype(tmp_path, offset, dtype, strict, wanted):
    tensors = llama_tensors(1, dtype=dtype, offset=offset)
    src = write_checkpoint(tmp_path / "src", tensors, model_type="custom")
    fold_checkpoint(src, tmp_path / "dst", plan=llama_plan(1, offset=offset), strict=strict)
    marker = json.loads((tmp_path / "dst" / "config.json").read_text())["flashnorm"]
    assert (marker["mode"], marker["fold_dtype"]) == wanted


def test_progress_counts_every_byte_once(tmp_path):
    src = write_checkpoint(tmp_path / "src", llama_tensors(LAYERS), shards=3)
    calls = []
    fold_checkpoint(
        src, tmp_path / "dst", plan=llama_plan(LAYERS), progress=lambda *call: calls.append(call)
    )
    done = [call[0] for call in calls]
    sizes = {file.name: file.stat().st_size for file in src.glob("*.safetensors")}
    assert done == sorted(done)
    assert done[-1] == sum(sizes.values())
    assert {call[1] for call in calls} == {sum(sizes.values())}
    assert {call[2] for call in calls} == set(sizes)


def test_gains_of_one_are_noticed(tmp_path):
    tensors = llama_tensors(1)
    for key in tensors:
        if "norm" in key:
            tensors[key].fill_(1)
    src = write_checkpoint(tmp_path / "src", tensors)
    with pytest.warns(UserWarning, match="every gain of this checkpoint is exactly one"):
        fold_checkpoint(src, tmp_path / "dst", plan=llama_plan(1))
    assert_same(load(tmp_path / "dst"), tensors)


def test_subnormals_are_counted_in_one_warning(tmp_path):
    tensors = llama_tensors(2, dtype=torch.float16)
    tiny = 2.0**-14
    for i in range(2):
        tensors[f"model.layers.{i}.mlp.up_proj.weight"][3, 5] = tiny
        tensors[f"model.layers.{i}.post_attention_layernorm.weight"][5] = 0.5
    src = write_checkpoint(tmp_path / "src", tensors, shards=2)
    plan = llama_plan(2)
    gains = {g: algebra.effective_gain(tensors[g.parameter], g) for g in plan.gains()}
    count = sum(
        algebra.check_fold(name, tensors[name], g.parameter, gains[g], c.axis, c.spans)
        for name, pairs in plan.absorptions().items()
        for g, c in pairs
    )
    assert count >= 2
    with pytest.warns(UserWarning, match=f"^{count} weights became subnormal") as found:
        fold_checkpoint(src, tmp_path / "dst", plan=plan)
    assert [warning.filename for warning in found] == [__file__]


def test_a_single_file_has_the_same_name(tmp_path):
    src = write_checkpoint(tmp_path / "src", llama_tensors(1))
    fold_checkpoint(str(src), str(tmp_path / "dst"), plan=llama_plan(1))
    assert (tmp_path / "dst" / SINGLE).is_file()
