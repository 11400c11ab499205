"""Plans, markers, adapters, inputs and measurements that say what cannot be."""

from __future__ import annotations

import copy
import json
import time

import pytest
import torch
from safetensors.torch import load_file, save_file

import flashnorm
from flashnorm.adapters.config import CONFIG, WEIGHTS, scaling
from flashnorm.checkpoint.engine import open_streamed
from flashnorm.cli import boundary
from flashnorm.cli.inputs import read_inputs, read_plan
from flashnorm.errors import CheckpointError, FlashNormError, PlanError
from flashnorm.kernels import measurements
from flashnorm.kernels.gpu import cached
from flashnorm.marker import absent_tensors, marker
from flashnorm.plan import Plan
from tests.attacks.sandbox import SHAPE, Sandbox
from tests.checkpoint.helpers import llama_plan, llama_tensors, write_checkpoint

GOOD = llama_plan(1, hidden=SHAPE["hidden"])


def put(whole, path, value):
    """A copy of a JSON value with one part replaced."""
    whole = copy.deepcopy(whole)
    *before, last = path
    part = whole
    for key in before:
        part = part[key]
    part[last] = value
    return whole


# --- plans --------------------------------------------------------------------------------------

SITE = ("sites", 0)
CONSUMER = (*SITE, "consumers", 0)


@pytest.mark.parametrize(
    ("path", "value", "said"),
    [
        (SITE, {"path": "a"}, "no plan: .*missing"),
        ((*SITE, "more"), 1, "is no Site"),
        ((*SITE, "path"), 3, "path is '3'"),
        ((*SITE, "kind"), ["rms"], "kind is"),
        ((*SITE, "width"), -1, "a place or a length of it is negative"),
        ((*SITE, "width"), 2**63, "width is"),
        ((*SITE, "width"), True, "width is 'True'"),
        ((*SITE, "eps"), float("nan"), "eps is 'nan'"),
        ((*SITE, "eps"), "1e-6", "eps is"),
        ((*SITE, "gain_state"), "melted", "gain_state is 'melted'"),
        ((*SITE, "gain_state"), [], "gain_state is"),
        ((*SITE, "gain"), None, "is folded but has no gain"),
        ((*SITE, "gain", "scale"), 0, "the gain is 0 times its parameter"),
        ((*SITE, "gain", "scale"), float("inf"), "scale is 'inf'"),
        ((*SITE, "gain", "offset"), 10**400, "offset is"),
        ((*SITE, "bias"), "folded", "its bias is folded, but it has none"),
        ((*SITE, "bias"), "carried", "its bias is carried, but it has none"),
        ((*SITE, "consumers"), {}, "consumers is no list"),
        ((*CONSUMER, "axis"), -(2**63), "axis is"),
        ((*CONSUMER, "spans", 0, "start"), -1, "a place or a length of it is negative"),
        ((*CONSUMER, "axis"), 1.0, "axis is '1.0'"),
        ((*CONSUMER, "spans", 0, "length"), -3, "a place or a length of it is negative"),
        (("sites",), None, "sites is no list"),
        (("sites",), {}, "sites is no list"),
        (("untied",), [["a"]], "no plan: zip"),
        (("notes",), [7], "notes is '7'"),
        (("entry",), [], "plan is no Plan"),
    ],
)
def test_plans_that_are_none(tmp_path, path, value, said):
    data = put(GOOD.to_json(), path, value)
    with pytest.raises(PlanError, match=said):
        Plan.from_json(data)
    (tmp_path / "plan.json").write_text(json.dumps(data))
    with pytest.raises(FlashNormError, match="holds no plan that can be read"):
        read_plan(tmp_path / "plan.json")


@pytest.mark.parametrize("data", [[], None, 3, "plan", {}])
def test_values_that_are_no_plan(data):
    with pytest.raises(PlanError, match=r"a plan is a JSON object|plan version"):
        Plan.from_json(data)


def test_a_bias_that_is_folded_into_readers_without_one():
    data = put(put(GOOD.to_json(), (*SITE, "bias"), "folded"), (*SITE, "norm_bias"), "b")
    with pytest.raises(PlanError, match="its bias is folded into readers without one"):
        Plan.from_json(data)


# --- markers ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "absent",
    [
        [],
        "x",
        {"a": 1},
        {"a": [[8], "BF16"]},
        {"a": [[8], "BF16", "1"]},
        {"a": [[8], "BF16", float("nan")]},
        {"a": [[8], {}, 1]},
        {"a": [[-1], "BF16", 1]},
        {"a": [[2**48], "BF16", 1]},
        {"a": [8, "BF16", 1]},
        {"a": [[1] * 9, "BF16", 1]},
    ],
)
def test_tables_of_what_was_left_out(absent):
    with pytest.raises(CheckpointError, match=r"in the marker of config\.json (is no map|has no)"):
        absent_tensors({"absent": absent})


@pytest.mark.parametrize(
    "absent",
    [
        {"a": [[2**40], "BF16", 1.0]},
        {"a": [[8], "BF17", 1.0]},
        {"model.norm.weight": [[8], "BF16", 1.0]},
    ],
    ids=["larger than all that is stored", "dtype", "stored as well"],
)
def test_what_was_left_out_fits_the_checkpoint(tmp_path, absent):
    said = marker(GOOD, "strict", "x")
    said["flashnorm"]["absent"] = absent
    path = write_checkpoint(tmp_path / "src", llama_tensors(1, **SHAPE), **said)
    with pytest.raises(CheckpointError, match=r"was left out, as .*, which cannot be"):
        open_streamed(path)


# --- adapters -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "pattern",
    [
        *("(a+)+", "(a|a)*", "(.*)*x", ".*.*.*.*x", "a?a?a?a?aaaa", "(a|a)(a|a)(a|a)(a|a)"),
        *("x" * 1001, "(?=a)", "(a{9}){9}"),
    ],
)
def test_patterns_that_take_for_ever(pattern):
    start = time.perf_counter()
    with pytest.raises(CheckpointError, match="may take for ever to match"):
        scaling({"alpha_pattern": {pattern: 1}}, "a" * 200, 2)
    assert time.perf_counter() - start < 1


@pytest.mark.parametrize(
    ("pattern", "alpha"),
    [
        ("layers.0.self_attn.q_proj", 9),
        (r"layers\.\d+\.self_attn\..*", 9),
        (r"^model\.layers\.(0|1|2|3)\.self_attn\.[qk]_proj", 9),
        (r"layers\.1\..*", 4),
    ],
)
def test_patterns_of_adapters_that_there_are(pattern, alpha):
    config = {"alpha_pattern": {pattern: 9}, "lora_alpha": 4}
    assert scaling(config, "model.layers.0.self_attn.q_proj", 2) == alpha / 2


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"alpha_pattern": []}, 2.0),
        ({"alpha_pattern": [1]}, "is no map of patterns"),
        ({"alpha_pattern": {"(": 1}}, "is no pattern"),
        ({"alpha_pattern": {"m": None}}, "sets the alpha of m to 'None'"),
        ({"lora_alpha": "4"}, "sets the alpha"),
        ({"lora_alpha": 10**400}, "sets the alpha"),
        ({"lora_alpha": float("nan")}, "sets the alpha"),
    ],
)
def test_alphas(config, said):
    if isinstance(said, float):
        assert scaling({"lora_alpha": 4} | config, "m", 2) == said
        return
    with pytest.raises(CheckpointError, match=said):
        scaling(config, "m", 2)


@pytest.fixture(scope="module")
def box(tmp_path_factory):
    return Sandbox.at(tmp_path_factory.mktemp("around"))


@pytest.fixture
def adapter(box, tmp_path):
    """A copy of a good adapter, and what changes its config and its tensors."""
    tensors = load_file(box.adapter / WEIGHTS)
    config = json.loads((box.adapter / CONFIG).read_text())

    def fold(change=None, **settings):
        if change:
            change(tensors)
        (tmp_path / "a").mkdir()
        save_file(tensors, tmp_path / "a" / WEIGHTS)
        (tmp_path / "a" / CONFIG).write_text(json.dumps(config | settings))
        return flashnorm.fold_adapter(tmp_path / "a", GOOD, tmp_path / "out", base=box.single)

    return fold


def test_the_adapter_is_good(adapter):
    assert adapter().changed


Q = "base_model.model.model.layers.0.self_attn.q_proj.lora_"


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"A": torch.ones(0, 8), "B": torch.ones(8, 0)}, "have the rank 0"),
        ({"B": torch.ones(8)}, "does not fit the parameter"),
        ({"A": torch.ones(8)}, "does not fit the parameter"),
        ({"A": torch.ones(3, 8)}, "do not multiply"),
        ({"A": torch.tensor(1.0)}, "does not fit the parameter"),
    ],
)
def test_factors_that_are_none(adapter, changed, said):
    with pytest.raises(CheckpointError, match=said):
        adapter(lambda held: held.update({f"{Q}{k}.weight": v for k, v in changed.items()}))


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"target_parameters": 3}, "target_parameters in .* is no list of names"),
        ({"target_parameters": [3]}, "target_parameters in .* is no list of names"),
        ({"init_lora_weights": {}}, "init_lora_weights"),
        ({"peft_type": ["LORA"]}, "is of type"),
    ],
)
def test_settings_that_are_none(adapter, settings, said):
    with pytest.raises(CheckpointError, match=said):
        adapter(**settings)


def test_a_base_that_is_no_text(box, tmp_path):
    (tmp_path / CONFIG).write_text(json.dumps({"peft_type": "LORA", "base_model_name_or_path": 3}))
    save_file(load_file(box.adapter / WEIGHTS), tmp_path / WEIGHTS)
    with pytest.raises(CheckpointError, match="names 3 as its base, which is no text"):
        flashnorm.fold_adapter(tmp_path, GOOD, box.target)


@pytest.mark.parametrize("content", ["[]", "[" * 5000, '{"flashnorm": 1}', "\udc80"])
def test_a_folded_base_that_is_none(box, tmp_path, content):
    (tmp_path / "config.json").write_bytes(content.encode("utf-8", "surrogateescape"))
    with pytest.raises(CheckpointError, match=r"can be read|no marker"):
        flashnorm.fold_adapter(box.adapter, GOOD, box.target, base=box.single, folded=tmp_path)


# --- inputs, measurements -----------------------------------------------------------------------


@pytest.mark.parametrize(
    "content",
    [
        '{"a": [{}]}',
        '{"a": [null]}',
        f'{{"a": [{2**64}]}}',
        '{"a": ["b"]}',
        '{"a": [[1], [1, 2]]}',
        '{"a": ' + "[" * 3000,
        '{"a": ' + "[" * 90 + "]" * 90 + "}",
        "3",
        "[]",
    ],
)
def test_inputs_that_are_none(tmp_path, content):
    (tmp_path / "x.json").write_text(content)
    if content.startswith('{"a": [[[') and content.endswith("}"):
        assert read_inputs([tmp_path / "x.json"])[0]["a"].ndim == 90
        return
    with pytest.raises(FlashNormError, match=r"x\.json"):
        read_inputs([tmp_path / "x.json"])


@pytest.mark.parametrize("dtype", ["F4", "F6_E2M3", "BF17"])
def test_inputs_in_dtypes_that_torch_lacks(tmp_path, dtype):
    head = json.dumps({"a": {"dtype": dtype, "shape": [8], "data_offsets": [0, 6]}}).encode()
    file = tmp_path / "x.safetensors"
    file.write_bytes(len(head).to_bytes(8, "little") + head + bytes(6))
    with pytest.raises(FlashNormError, match="holds no inputs that can be read"):
        read_inputs([file])


@pytest.mark.parametrize("content", [b"\xff\xfe", b"[" * 5000, b'{"version": 1}', b"[]", b"9" * 99])
def test_measurements_that_are_none(tmp_path, content, caplog):
    (tmp_path / "x").write_bytes(content)
    assert measurements.read(tmp_path / "x", 1, lambda found: found["devices"]) == {}
    assert "is not a file of measurements" in caplog.text
    assert measurements.read(tmp_path, 1, dict) == {}


@pytest.mark.parametrize("wrong", [{"rows": 2**40}, {"depth": -1}, {"warps": "4"}, {"splits": 1.5}])
def test_tiles_that_no_launch_has(wrong):
    tile = {"rows": 16, "columns": 64, "depth": 64, "warps": 4, "stages": 3}
    assert cached._entry({"way": "gemm", "note": "", "tile": tile}).tile.rows == 16
    with pytest.raises(ValueError, match="no tile"):
        cached._entry({"way": "gemm", "note": "", "tile": tile | wrong})


# --- what is said ---------------------------------------------------------------------------------


def test_names_are_no_commands_of_the_terminal(capsys):
    message = "tensor \x1b]0;evil\x07\x9b2J\u202e of x\nis no tensor"
    boundary._report(message, boundary.Options(False, False))
    said = capsys.readouterr().err
    assert said == "error: tensor \\x1b]0;evil\\x07\\x9b2J\\u202e of x\nis no tensor\n"


def test_names_that_are_no_text_are_json(capsys):
    boundary._print_json({"path": "\udcff", "x": "β"})
    assert json.loads(capsys.readouterr().out) == {"path": "\udcff", "x": "β"}
