"""What becomes of the files of an adapter, what is refused, and the command."""

from __future__ import annotations

import copy
import dataclasses
import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

import flashnorm
from flashnorm import algebra
from flashnorm.adapters.config import CONFIG, HARMLESS, REFUSED, WEIGHTS
from flashnorm.adapters.edits import Edit
from flashnorm.adapters.tensors import module_axes
from flashnorm.checkpoint.header import read_header
from flashnorm.cli import app
from flashnorm.errors import CheckpointError, FoldError
from flashnorm.plan import PLAN_VERSION, Entry, Span
from tests.errors import relative
from tests.zoo import tiny_model

peft = pytest.importorskip("peft")

from tests.adapting import (  # noqa: E402 (after the question whether PEFT is there)
    EXACT,
    EXPERTS,
    folded_model,
    logits,
    made,
    name_base,
    quietly,
    settings,
)


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    folder = tmp_path_factory.mktemp("llama")
    case = made(folder, "llama", target_modules=["q_proj", "o_proj", "up_proj"])
    case.adapter.joinpath("README.md").write_text("a model card")
    case.adapter.joinpath("optimizer.pt").write_bytes(b"state")
    case.adapter.joinpath("checkpoint-5").mkdir()
    case.adapter.joinpath("checkpoint-5", "trainer_state.json").write_text("{}")
    flashnorm.fold_checkpoint(case.base, folder / "folded")
    return case


@pytest.fixture
def own(llama, tmp_path):
    """A copy of the adapter to spoil."""
    shutil.copytree(llama.adapter, tmp_path / "own")
    return tmp_path / "own"


def refused(adapter, out, words, kind=CheckpointError, plan=None, **options):
    """The fold is refused in these words, and nothing is left behind."""
    before = sorted(out.parent.iterdir())
    with pytest.raises(kind, match=words):
        quietly(flashnorm.fold_adapter, adapter, plan, out, **options)
    assert sorted(out.parent.iterdir()) == before


def test_what_is_written(llama, tmp_path):
    """Dtypes, order and metadata stay; what does not absorb is the same bytes."""
    done = flashnorm.fold_adapter(llama.adapter, None, tmp_path / "out")
    before, after = (load_file(d / WEIGHTS) for d in (llama.adapter, tmp_path / "out"))
    assert list(before) == list(after)
    changed = [key for key in before if not torch.equal(before[key], after[key])]
    assert set(changed) == set(done.changed)
    readers = [key for key in before if "lora_A" in key and "o_proj" not in key]
    assert sorted(changed) == sorted(readers)
    assert (done.targets, done.added) == (6, ())
    assert read_header(tmp_path / "out" / WEIGHTS).metadata == {"format": "pt"}
    assert {f.name for f in (tmp_path / "out").iterdir()} == {CONFIG, WEIGHTS, "README.md"}
    config = json.loads((tmp_path / "out" / CONFIG).read_text())
    assert config["base_model_name_or_path"] is None, "it would be loaded onto the original"
    assert config["flashnorm_folded"] is True
    assert config["flashnorm"]["source"] == "base"
    gains = {gain.parameter for gain in flashnorm.inspect(llama.base).gains()}
    assert set(config["flashnorm"]["folded"]) == gains


def test_peft_says_that_it_ignores_the_marker(llama, tmp_path):
    flashnorm.fold_adapter(llama.adapter, None, tmp_path / "out")
    with pytest.warns(UserWarning, match=r"\['flashnorm', 'flashnorm_folded'\]"):
        peft.PeftConfig.from_pretrained(tmp_path / "out")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_factors_are_rounded_once_to_their_own_dtype(dtype, llama, own, tmp_path):
    key = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
    tensors = {k: v.to(dtype) for k, v in load_file(own / WEIGHTS).items()}
    save_file(tensors, own / WEIGHTS, {"format": "pt"})
    flashnorm.fold_adapter(own, None, tmp_path / "out")
    after = load_file(tmp_path / "out" / WEIGHTS)
    gain = dict(llama.model.named_parameters())["model.layers.0.input_layernorm.weight"].detach()
    assert {value.dtype for value in after.values()} == {dtype}
    assert torch.equal(after[key], (tensors[key].double() * gain).to(dtype))


def test_several_steps_are_rounded_once():
    generator = torch.Generator().manual_seed(0)
    tensor = torch.randn(64, 8, generator=generator).bfloat16()
    gain = 1 + 0.3 * torch.randn(8, generator=generator)
    spans = (Span(0, 0, 8),)
    edit = Edit([lambda t: algebra.fold_gain_(t, gain, 1, spans), lambda t: algebra.center_(t, 0)])
    wide = tensor.double() * gain.double()
    done, lost = edit.apply("x", tensor)
    assert torch.equal(done, (wide - wide.mean(0)).bfloat16())
    assert lost == 0


def test_an_overflow_is_refused(own, tmp_path):
    tensors = {k: (v * 0 + 60000).half() for k, v in load_file(own / WEIGHTS).items()}
    save_file(tensors, own / WEIGHTS)
    refused(own, tmp_path / "out", "overflows torch.float16", FoldError)


def test_a_second_fold_is_refused(llama, tmp_path):
    flashnorm.fold_adapter(llama.adapter, None, tmp_path / "once")
    words = "was folded already, as flashnorm_folded in adapter_config.json says"
    refused(tmp_path / "once", tmp_path / "out", words, base=llama.base)


def test_an_adapter_that_no_fold_concerns_is_copied_with_a_warning(tmp_path):
    case = made(tmp_path, "llama", target_modules=["o_proj", "down_proj"])
    with pytest.warns(UserWarning, match="fits both bases; the target is a copy of it") as warned:
        done = flashnorm.fold_adapter(case.adapter, None, tmp_path / "out")
    assert warned[-1].filename == __file__
    assert (done.targets, done.changed) == (4, ())
    for name in (CONFIG, WEIGHTS):
        same = json.loads if name == CONFIG else bytes
        assert same((tmp_path / "out" / name).read_bytes()) == same(
            (case.adapter / name).read_bytes()
        )
    model, _ = folded_model(case)
    assert relative(logits(model, tmp_path / "out", case.inputs), case.logits) < EXACT


def test_dora_is_refused(tmp_path):
    case = made(tmp_path, "llama", target_modules=["q_proj"], use_dora=True)
    refused(case.adapter, tmp_path / "out", "use_dora: DoRA scales by the norm of the merged")


@pytest.mark.parametrize("kind", ["IA3Config", "LoHaConfig", "OFTConfig", "VeraConfig"])
def test_other_types_are_refused(kind, llama, tmp_path):
    options = {"feedforward_modules": []} if kind == "IA3Config" else {}
    config = getattr(peft, kind)(target_modules=["q_proj"], **options)
    model = quietly(peft.get_peft_model, copy.deepcopy(llama.model).float(), config)
    quietly(model.save_pretrained, tmp_path / "other")
    name_base(tmp_path / "other", llama.base)
    refused(tmp_path / "other", tmp_path / "out", "only LoRA can be folded exactly")


def test_every_option_of_this_peft_is_known():
    """A new one is refused until somebody has read what it does."""
    options = set(peft.LoraConfig().to_dict())
    assert options <= HARMLESS | set(REFUSED)
    assert not HARMLESS & set(REFUSED)


@pytest.mark.parametrize("key", [*REFUSED, "use_something_new"])
def test_options_that_are_no_plain_lora_are_refused(key, own, tmp_path):
    settings(own, **{key: True})
    refused(own, tmp_path / "out", f"sets {key}")


@pytest.mark.parametrize("start", ["pissa", "pissa_niter_4", "olora", "corda", "loftq", "lora_ga"])
def test_starts_that_change_the_base_are_refused(start, own, tmp_path):
    settings(own, init_lora_weights=start)
    refused(own, tmp_path / "out", f"init_lora_weights to '{start}', which changes the weights")


@pytest.mark.parametrize(
    ("name", "target", "norm"), [("llama", "q_proj", "norm"), ("gpt2", "c_attn", "ln_1")]
)
def test_gains_of_its_own_are_refused(name, target, norm, tmp_path):
    case = made(tmp_path, name, target_modules=[target], modules_to_save=[norm])
    refused(case.adapter, tmp_path / "out", f"holds a gain of its own, .*{norm}.weight")


def test_a_bias_of_b_that_peft_does_not_allow_is_refused(tmp_path):
    case = made(tmp_path, "gpt2", target_modules=["c_attn", "wte"], fan_in_fan_out=True)
    refused(case.adapter, tmp_path / "out", "h.0.attn.c_attn: .*beside the target transformer.wte")


def test_a_reader_without_its_bias_is_refused(tmp_path):
    case = made(tmp_path, "gpt2", target_modules=["c_proj"], modules_to_save=["c_fc"])
    tensors = load_file(case.adapter / WEIGHTS)
    kept = {k: v for k, v in tensors.items() if not k.endswith("c_fc.bias")}
    assert len(kept) < len(tensors)
    save_file(kept, case.adapter / WEIGHTS)
    refused(case.adapter, tmp_path / "out", "holds .*c_fc.weight, but not .*c_fc.bias")


def rename(adapter, old, new):
    tensors = load_file(adapter / WEIGHTS)
    save_file({k.replace(old, new): v.clone() for k, v in tensors.items()}, adapter / WEIGHTS)


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("mlp.up_proj", "mlp.experts.0.up_proj", "acts on model.layers.0.mlp.experts.0.up_proj"),
        ("base_model.model.", "", "has not the prefix base_model.model."),
        ("lora_B", "lora_C", r"lora_C.weight is not of a plain LoRA"),
        ("lora_B.weight", "lora_B.bias", "holds only A, B bias for"),
        ("q_proj.lora_A", "v_proj.lora_A", "holds only"),
        ("up_proj", "down_proj", r"does not fit the parameter model.layers.0.mlp.down_proj.weight"),
        ("o_proj.lora_A", "magnitude", "holds model.layers.0.self_attn.magnitude|acts on"),
        ("self_attn.q_proj", "input_layernorm", "input_layernorm, a LlamaRMSNorm"),
    ],
)
def test_tensors_that_do_not_fit_the_base_are_refused(old, new, words, own, tmp_path):
    rename(own, old, new)
    refused(own, tmp_path / "out", words)


def test_convolutions_in_groups_are_refused():
    """PEFT's A is not grouped, so it mixes features that the weight keeps apart."""
    assert module_axes("conv", torch.nn.Conv1d(4, 4, 3)) == {0: 0, 1: 1}
    with pytest.raises(CheckpointError, match=r"acts on conv, a Conv1d: .*ungrouped convolutions"):
        module_axes("conv", torch.nn.Conv1d(4, 4, 3, groups=4))


def test_a_norm_inside_of_the_target_is_refused(llama, tmp_path):
    """A gets the input of the module, which has not passed that norm."""
    plan = flashnorm.inspect(llama.base)
    inner = dataclasses.replace(plan.sites[0], path="model.layers.0.self_attn.q_proj.inner")
    plan = dataclasses.replace(plan, sites=(inner, *plan.sites[1:]))
    refused(llama.adapter, tmp_path / "out", "q_proj: its weight reads a norm that", plan=plan)


def test_what_goes_around_a_centered_module_is_refused(tmp_path):
    case = made(tmp_path, "llama", target_modules=["q_proj"], trainable_token_indices=[20])
    plan = flashnorm.inspect(case.base)
    for path in ("model.embed_tokens", "model.layers.0.self_attn.q_proj"):
        centered = dataclasses.replace(plan, entries=(Entry(path),))
        refused(case.adapter, tmp_path / "out", f"{path}.* acts beside a module", plan=centered)


def test_rows_of_an_untied_embedding_are_refused(tmp_path):
    case = made(tmp_path, "gemma", target_modules=["q_proj"], trainable_token_indices=[20])
    plan = flashnorm.inspect(case.base, untie=True)
    refused(case.adapter, tmp_path / "out", "from which the plan unties the head", plan=plan)


def test_nested_factors_have_to_match_the_targeted_parameters(tmp_path):
    case = made(tmp_path, "qwen3_moe", target_modules=[], target_parameters=EXPERTS)
    settings(case.adapter, target_parameters=EXPERTS[:1])
    refused(case.adapter, tmp_path / "out", "holds 2 pairs of factors for model.layers.0.mlp.ex")


def test_places_that_cannot_be(llama, own, tmp_path):
    refused(tmp_path / "nothing", tmp_path / "out", "nothing is not a directory")
    refused(llama.base, tmp_path / "out", "has no adapter_config.json: not a PEFT adapter")
    refused(own, own, "is the source itself")
    refused(own, llama.base, "exists already")
    settings(own, base_model_name_or_path="some/where")
    refused(own, tmp_path / "out", r"names 'some/where' as its base.*say where .*--base")
    folded = llama.base.parent / "folded"
    refused(own, tmp_path / "out", "folded was folded already", base=folded)
    (own / WEIGHTS).rename(own / "adapter_model.bin")
    refused(own, tmp_path / "out", "holds its weights as a pickle", base=llama.base)
    (own / "adapter_model.bin").unlink()
    refused(own, tmp_path / "out", f"has no {WEIGHTS}", base=llama.base)
    (own / CONFIG).write_text("{")
    refused(own, tmp_path / "out", "is not valid JSON")


def test_a_plan_of_another_model_is_refused(llama, tmp_path):
    other = flashnorm.inspect(tiny_model("gpt2"))
    words = "the plan names the parameter transformer.h.0.ln_1.weight, which"
    refused(llama.adapter, tmp_path / "out", words, plan=other)


def test_a_base_without_weights_has_no_gains(llama, tmp_path):
    config = llama.base / "config.json"
    words = "the values of .* are not at hand"
    refused(llama.adapter, tmp_path / "out", words, plan=flashnorm.inspect(config), base=config)


def test_the_folded_base_is_held_against_the_plan(llama, tmp_path):
    refused(llama.adapter, tmp_path / "out", "carries no marker", folded=llama.base)
    folded = llama.base.parent / "folded"
    plan = flashnorm.inspect(llama.base)
    part = dataclasses.replace(plan, sites=plan.sites[:-1])
    refused(llama.adapter, tmp_path / "out", "by another plan", plan=part, folded=folded)
    flashnorm.fold_adapter(llama.adapter, plan, tmp_path / "out", folded=folded)
    config = json.loads((tmp_path / "out" / CONFIG).read_text())
    assert config["base_model_name_or_path"] == str(folded)


def test_an_interrupt_leaves_nothing(llama, tmp_path, monkeypatch):
    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("flashnorm.adapters.fold.write_weights", stop)
    with pytest.raises(KeyboardInterrupt):
        flashnorm.fold_adapter(llama.adapter, None, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_an_untied_head(tmp_path):
    """The head's factors follow the plan that unties it, the embedding's stay."""
    targets = ["q_proj", "lm_head", "embed_tokens"]
    case = made(tmp_path, "gemma", target_modules=targets)
    model, plan = folded_model(case, untie=True)
    assert plan.untied
    done = flashnorm.fold_adapter(case.adapter, plan, tmp_path / "out")
    assert any("lm_head.lora_A" in key for key in done.changed)
    assert not any("embed_tokens" in key for key in done.changed)
    assert relative(logits(model, tmp_path / "out", case.inputs), case.logits) < EXACT


def command(*arguments, code=0):
    result = CliRunner().invoke(app, ["fold-adapter", *map(str, arguments)])
    assert result.exit_code == code, f"{result.stdout}\n{result.stderr}"
    return result


def test_the_command(llama, tmp_path):
    """With the plan that `inspect --json` prints, or that of `fold --json`, or none."""
    plan = flashnorm.inspect(llama.base)
    (tmp_path / "plan.json").write_text(json.dumps(plan.to_json()))
    (tmp_path / "fold.json").write_text(json.dumps({"plan": plan.to_json()}))
    shown = command(llama.adapter, "--plan", tmp_path / "plan.json", tmp_path / "a").stdout
    assert " ".join(shown.split()) == f"{tmp_path / 'a'} is written: 4 tensors changed"
    command(llama.adapter, tmp_path / "b", "--plan", tmp_path / "fold.json", "--base", llama.base)
    folded = llama.base.parent / "folded"
    result = command(llama.adapter, tmp_path / "c", "--folded", folded, "--json")
    data = json.loads(result.stdout)
    assert (data["target"], data["targets"], len(data["changed"])) == (str(tmp_path / "c"), 6, 4)
    bytes_of = {(tmp_path / name / WEIGHTS).read_bytes() for name in "abc"}
    assert len(bytes_of) == 1


@pytest.mark.parametrize(
    "text",
    [
        *("{", "[]", "{}", '{"version": 1}'),
        f'{{"version": {PLAN_VERSION}}}',
        f'{{"version": {PLAN_VERSION}, "sites": [{{}}]}}',
    ],
)
def test_a_file_that_holds_no_plan(text, llama, tmp_path):
    (tmp_path / "plan.json").write_text(text)
    result = command(llama.adapter, tmp_path / "o", "--plan", tmp_path / "plan.json", code=2)
    assert "holds no plan that can be read" in result.stderr
    assert result.stderr.count("\n") == 1


def test_the_command_refuses_in_one_line(llama, tmp_path):
    result = command(llama.adapter, llama.base, "--json", code=2)
    assert "exists already" in json.loads(result.stdout)["error"]
    assert result.stderr.startswith("error: ")
    assert "--json" in command("--help").stdout
