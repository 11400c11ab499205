"""Models that are folded and accelerated as transformers loads them."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
import warnings

import pytest
import torch
import transformers
from safetensors.torch import load_file
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSeq2SeqLM

import flashnorm
from flashnorm import AutoFlashNormForCausalLM, FlashNormConfig, FlashNormError
from flashnorm.runtime.accelerate import RECORD
from tests.engines.models import write

IDS = torch.tensor([[5, 9, 33, 7, 12]])


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return write("llama", tmp_path_factory.mktemp("auto") / "llama")


def plain(path, auto=AutoModelForCausalLM, **options):
    return auto.from_pretrained(path, **options)


def loaded(path, auto=AutoModelForCausalLM, config=None, **options):
    config = config or FlashNormConfig(strict=True)
    return auto.from_pretrained(path, quantization_config=config, **options)


@torch.no_grad()
def logits(model, ids=IDS):
    return model(ids).logits.double()


def close(model, original):
    """Equal but for the rounding of float32: 2^-24 a sum of some hundred products."""
    expected = logits(original)
    return bool((logits(model) - expected).abs().max() < 1e-5 * expected.abs().max())


def accelerated(model):
    return RECORD in vars(model) and len(flashnorm.acceleration(model).fused) > 0


def unmarked(model):
    """Nothing says that there was a quantizer."""
    assert not hasattr(model, "hf_quantizer")
    assert not hasattr(model, "quantization_method")
    assert not hasattr(model, "is_quantized")
    for module in model.modules():
        if isinstance(module, transformers.PreTrainedModel):
            assert not hasattr(module.config, "quantization_config")
            assert not hasattr(module.config, "_is_quantized")
    return True


def test_a_model_is_accelerated_as_it_is_loaded(llama):
    model, original = loaded(llama), plain(llama)
    assert accelerated(model)
    assert not accelerated(original)
    assert unmarked(model)
    assert close(model, original)
    assert not model.training
    for name, value in original.state_dict().items():
        assert torch.equal(model.state_dict()[name], value)
    assert _config(model) == _config(original)


def _config(model):
    return {k: v for k, v in model.config.to_dict().items() if k != "_name_or_path"}


def test_what_is_saved_is_the_original(llama, tmp_path):
    loaded(llama).save_pretrained(tmp_path / "ours")
    plain(llama).save_pretrained(tmp_path / "theirs")
    for name in ("config.json", "generation_config.json"):
        assert (tmp_path / "ours" / name).read_text() == (tmp_path / "theirs" / name).read_text()
    ours, theirs = (
        load_file(tmp_path / which / "model.safetensors") for which in ("ours", "theirs")
    )
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.parametrize("untie", [False, True])
def test_a_model_is_folded_as_it_is_loaded_and_saved_folded(llama, tmp_path, untie):
    model = loaded(llama, config=FlashNormConfig(fold=True, untie=untie, strict=True))
    assert accelerated(model)
    assert unmarked(model)
    folded = flashnorm.folding(model).folded
    assert len(folded) == (5 if untie else 4)
    by_hand = flashnorm.fold_(plain(llama), untie=untie)
    assert close(model, plain(llama))
    assert _config(model) == _config(by_hand)
    model.save_pretrained(tmp_path / "folded")
    config = json.loads((tmp_path / "folded" / "config.json").read_text())
    assert config["flashnorm_folded"]
    assert "quantization_config" not in config
    again = plain(tmp_path / "folded")
    assert not accelerated(again)
    assert torch.equal(logits(again), logits(by_hand))


def test_folded_alone_is_what_fold_does(llama):
    model = loaded(llama, config=FlashNormConfig(fold=True, accelerate=False))
    assert not accelerated(model)
    assert unmarked(model)
    assert torch.equal(logits(model), logits(flashnorm.fold_(plain(llama))))


@pytest.mark.parametrize("options", [{}, {"dtype": torch.bfloat16}, {"device_map": "cpu"}], ids=str)
def test_arguments_mean_what_they_do_without(llama, options):
    model, original = loaded(llama, **options), plain(llama, **options)
    assert accelerated(model)
    assert unmarked(model)
    kinds = [(n, p.dtype, p.device) for n, p in original.named_parameters()]
    assert [(n, p.dtype, p.device) for n, p in model.named_parameters()] == kinds
    tokens = [m.generate(IDS, max_new_tokens=8, do_sample=False) for m in (model, original)]
    assert torch.equal(*tokens)


def test_a_config_of_ones_own_is_not_written_to(llama):
    config = transformers.AutoConfig.from_pretrained(llama)
    before = copy.deepcopy(config.to_dict())
    model = AutoModelForCausalLM.from_pretrained(
        llama, config=config, quantization_config=FlashNormConfig()
    )
    assert accelerated(model)
    assert config.to_dict() == before


def test_loading_info_comes_with_it(llama):
    model, info = loaded(llama, output_loading_info=True)
    assert accelerated(model)
    assert not info["missing_keys"]
    model, _ = AutoFlashNormForCausalLM.from_pretrained(llama, output_loading_info=True)
    assert accelerated(model)


def test_other_automatic_classes(llama, tmp_path):
    base = loaded(llama, AutoModel)
    assert accelerated(base)
    assert unmarked(base)
    config = transformers.T5Config(
        d_model=32, d_ff=48, d_kv=16, num_layers=1, num_heads=2, vocab_size=64
    )
    torch.manual_seed(3)
    t5 = transformers.T5ForConditionalGeneration(config)
    with torch.no_grad():
        for parameter in t5.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.3 * torch.randn_like(parameter))
    t5.save_pretrained(tmp_path)
    model, original = (f(tmp_path, AutoModelForSeq2SeqLM) for f in (loaded, plain))
    assert accelerated(model)
    assert unmarked(model)
    with torch.no_grad():
        ours, theirs = (
            m(input_ids=IDS, decoder_input_ids=IDS[:, :2]).logits for m in (model, original)
        )
    assert (ours - theirs).abs().max() < 1e-5 * theirs.abs().max()


def test_a_pipeline_takes_it(llama):
    pipe = transformers.pipeline(
        "text-generation",
        model=str(llama),
        model_kwargs={"quantization_config": FlashNormConfig()},
        device="cpu",
    )
    assert accelerated(pipe.model)
    bare = transformers.pipeline("text-generation", model=str(llama), device="cpu")
    said = [
        p("w5 w9 w33", max_new_tokens=6, do_sample=False)[0]["generated_text"] for p in (pipe, bare)
    ]
    assert said[0] == said[1]


def test_a_trainer_takes_it_for_a_plain_model(llama, tmp_path):
    pytest.importorskip("accelerate", reason="a Trainer needs it")
    model = loaded(llama, config=FlashNormConfig(training=True, strict=True))
    assert flashnorm.acceleration(model).training
    arguments = transformers.TrainingArguments(
        output_dir=str(tmp_path), max_steps=1, report_to=[], use_cpu=True, save_strategy="no"
    )
    rows = [{"input_ids": IDS[0], "labels": IDS[0]}] * 8
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    transformers.Trainer(model=model, args=arguments, train_dataset=rows).train()
    assert all(not torch.equal(before[n], p) for n, p in model.named_parameters())


def test_the_class_that_liger_users_know(llama):
    original = plain(llama)
    model = AutoFlashNormForCausalLM.from_pretrained(llama, dtype=torch.float32)
    assert type(model) is type(original)
    assert accelerated(model)
    assert close(model, original)
    folded = AutoFlashNormForCausalLM.from_pretrained(
        llama, flashnorm=FlashNormConfig(fold=True, accelerate=False)
    )
    assert flashnorm.folding(folded).folded
    with pytest.raises(TypeError, match="flashnorm=, not as quantization_config="):
        AutoFlashNormForCausalLM.from_pretrained(llama, quantization_config=FlashNormConfig())


# What cannot be done.


def refuse(monkeypatch, step):
    """Let a step fail half way."""

    def failing(model, **_):
        raise FlashNormError("no, because it is raining")

    monkeypatch.setattr(f"flashnorm.engines.loaded.{step}", failing)


@pytest.mark.parametrize(("step", "done"), [("fold_", "folded"), ("accelerate_", "accelerated")])
def test_a_model_is_not_lost_where_a_step_fails(llama, monkeypatch, step, done):
    refuse(monkeypatch, step)
    wanted = FlashNormConfig(fold=True)
    with pytest.warns(UserWarning, match=f"was loaded but not {done}: no, because it is raining"):
        model = loaded(llama, config=wanted)
    assert unmarked(model)
    assert close(model, plain(llama))
    assert accelerated(model) == (step == "fold_")
    with pytest.raises(FlashNormError, match="raining"):
        loaded(llama, config=FlashNormConfig(fold=True, strict=True))
    with pytest.warns(UserWarning, match="raining"):
        AutoFlashNormForCausalLM.from_pretrained(llama, flashnorm=wanted)


def test_an_error_that_is_not_ours_is_named(llama, monkeypatch):
    def failing(model, **_):
        raise RuntimeError("two\nlines")

    monkeypatch.setattr("flashnorm.engines.loaded.accelerate_", failing)
    with pytest.warns(UserWarning, match="not accelerated: RuntimeError: two lines"):
        loaded(llama, config=FlashNormConfig())


def test_a_quantized_checkpoint_is_refused_before_it_is_read(llama, tmp_path):
    config = json.loads((llama / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "gptq", "bits": 4, "group_size": 32}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(FlashNormError, match=r"quantized \(gptq\).*accelerate_\(model\)"):
        loaded(tmp_path)


def test_a_gguf_file_is_refused_with_the_mend(llama):
    config = transformers.AutoConfig.from_pretrained(llama)
    with pytest.raises(FlashNormError, match=r"GGUF file model\.gguf.*AutoFlashNormForCausalLM"):
        AutoModelForCausalLM.from_pretrained(
            llama, config=config, gguf_file="model.gguf", quantization_config=FlashNormConfig()
        )


def test_other_quantization_configs_go_on(llama):
    """The check before transformers chooses a quantizer is for ours alone."""
    FlashNormConfig()
    with pytest.raises(ValueError, match="gguf_file="):
        loaded(llama, config=transformers.GgufConfig())


def test_an_adapter_of_the_original_is_refused_on_a_base_that_is_folded(llama, tmp_path):
    peft = pytest.importorskip("peft", reason="the adapter is its")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        lora = peft.LoraConfig(target_modules=["q_proj", "v_proj"], init_lora_weights=False)
        torch.manual_seed(5)
        peft.get_peft_model(plain(llama), lora).save_pretrained(tmp_path)
    original = plain(tmp_path)
    assert not close(original, plain(llama))
    with pytest.raises(FlashNormError, match=r"adapter.*fold=False"):
        loaded(tmp_path, config=FlashNormConfig(fold=True, accelerate=False))
    assert close(loaded(tmp_path), original)
    fold = FlashNormConfig(fold=True, strict=True)
    for config in (FlashNormConfig(strict=True), fold):
        model = AutoFlashNormForCausalLM.from_pretrained(tmp_path, flashnorm=config)
        assert close(model, original)


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"untie": True}, ValueError, "untie=True is for fold=True"),
        ({"accelerate": False, "training": True}, ValueError, "are for accelerate=True"),
        ({"accelerate": False, "package": "here"}, ValueError, "are for accelerate=True"),
        ({"folds": True}, TypeError, "folds"),
    ],
)
def test_options_that_mean_nothing_are_errors(options, error, words):
    with pytest.raises(error, match=words):
        FlashNormConfig(**options)


def test_a_config_goes_to_json_and_comes_back():
    config = FlashNormConfig(fold=True, package=flashnorm.Package("somewhere"))
    data = json.loads(config.to_json_string())
    assert data["package"] == "somewhere"
    again = FlashNormConfig.from_dict(data)
    assert again.fold
    assert again.to_dict() == config.to_dict()


def test_importing_flashnorm_is_enough(llama):
    code = (
        "import flashnorm, sys; assert 'transformers' not in sys.modules\n"
        "config = flashnorm.FlashNormConfig(strict=True)\n"
        "from transformers import AutoModelForCausalLM as A\n"
        f"model = A.from_pretrained({str(llama)!r}, quantization_config=config)\n"
        "print(len(flashnorm.acceleration(model).fused))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=180, check=False
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 0
